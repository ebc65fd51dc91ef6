#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "replay/dense_kernels.cpp"
#include "replay/dense_kernels.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>
#include <limits>

HWY_BEFORE_NAMESPACE();
namespace kvlapse::dense::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Tag = hn::ScalableTag<float>;
using Vec = hn::Vec<Tag>;

constexpr size_t kLanes = 16;  // virtual lanes of vector_math

// Products of one virtual lane, for Q queries x 2 vectors of keys: element d = lane, lane + 16, ...
template <size_t Q>
HWY_INLINE void lane_sums(const float* HWY_RESTRICT keys, size_t key_stride, size_t head_dim,
                          const float* HWY_RESTRICT queries, size_t query_stride, size_t lane,
                          Vec (&acc)[Q][2]) {
  const Tag tag;
  const size_t n = hn::Lanes(tag);
  for (size_t q = 0; q < Q; ++q) acc[q][0] = acc[q][1] = hn::Zero(tag);
  for (size_t d = lane; d < head_dim; d += kLanes) {
    const Vec k0 = hn::LoadU(tag, keys + d * key_stride), k1 = hn::LoadU(tag, keys + d * key_stride + n);
    for (size_t q = 0; q < Q; ++q) {
      const Vec x = hn::Set(tag, queries[q * query_stride + d]);
      acc[q][0] = hn::MulAdd(x, k0, acc[q][0]);
      acc[q][1] = hn::MulAdd(x, k1, acc[q][1]);
    }
  }
}

// Sum of virtual lanes lane, lane + width, ... in the order of the fixed tree: at width W, l += l + W.
template <size_t Q, size_t W>
HWY_INLINE void tree_sums(const float* keys, size_t key_stride, size_t head_dim, const float* queries,
                          size_t query_stride, size_t lane, Vec (&acc)[Q][2]) {
  if constexpr (W == kLanes) {
    lane_sums<Q>(keys, key_stride, head_dim, queries, query_stride, lane, acc);
  } else {
    Vec other[Q][2];
    tree_sums<Q, W * 2>(keys, key_stride, head_dim, queries, query_stride, lane, acc);
    tree_sums<Q, W * 2>(keys, key_stride, head_dim, queries, query_stride, lane + W, other);
    for (size_t q = 0; q < Q; ++q) {
      acc[q][0] = hn::Add(acc[q][0], other[q][0]);
      acc[q][1] = hn::Add(acc[q][1], other[q][1]);
    }
  }
}

template <size_t Q>
HWY_INLINE void logits_tile(const float* keys, size_t key_stride, size_t head_dim, const float* queries,
                            size_t query_stride, float scale, float* out, size_t out_stride) {
  const Tag tag;
  const size_t n = hn::Lanes(tag);
  Vec acc[Q][2];
  tree_sums<Q, 1>(keys, key_stride, head_dim, queries, query_stride, 0, acc);
  const Vec s = hn::Set(tag, scale);
  for (size_t q = 0; q < Q; ++q) {
    hn::StoreU(hn::Mul(acc[q][0], s), tag, out + q * out_stride);
    hn::StoreU(hn::Mul(acc[q][1], s), tag, out + q * out_stride + n);
  }
}

void LogitsBlock(const float* keys_t, size_t key_stride, size_t head_dim, const float* queries,
                 size_t query_stride, size_t n_queries, size_t n_keys, float scale, float* out,
                 size_t out_stride) {
  const Tag tag;
  const size_t width = 2 * hn::Lanes(tag);
  constexpr size_t kTile = 128;  // keys: [D][kTile] stays in the first-level cache
  const size_t tail = n_keys - n_keys % width;
  for (size_t tile = 0; tile < tail; tile += kTile) {
    const size_t tile_end = std::min(tail, tile + kTile);
    size_t q = 0;
    for (; q + 4 <= n_queries; q += 4)
      for (size_t i = tile; i < tile_end; i += width)
        logits_tile<4>(keys_t + i, key_stride, head_dim, queries + q * query_stride, query_stride, scale,
                       out + q * out_stride + i, out_stride);
    for (; q < n_queries; ++q)
      for (size_t i = tile; i < tile_end; i += width)
        logits_tile<1>(keys_t + i, key_stride, head_dim, queries + q * query_stride, query_stride, scale,
                       out + q * out_stride + i, out_stride);
  }
  // Only when the vectors are wider than the padding of 16 keys.
  for (size_t q = 0; q < n_queries; ++q)
    for (size_t i = tail; i < n_keys; ++i) {
      float lanes[kLanes] = {};
      for (size_t d = 0; d < head_dim; ++d)
        lanes[d % kLanes] =
            __builtin_fmaf(queries[q * query_stride + d], keys_t[d * key_stride + i], lanes[d % kLanes]);
      for (size_t w = kLanes / 2; w > 0; w /= 2)
        for (size_t l = 0; l < w; ++l) lanes[l] += lanes[l + w];
      out[q * out_stride + i] = lanes[0] * scale;
    }
}

// One tile of M output rows by two vectors of D.
template <size_t M, bool kIndexed>
HWY_INLINE void weighted_tile(const float* HWY_RESTRICT weights, size_t weight_stride,
                              const int32_t* HWY_RESTRICT index, size_t n_rows,
                              const float* HWY_RESTRICT rows, size_t head_dim, float* HWY_RESTRICT out) {
  const Tag tag;
  const size_t n = hn::Lanes(tag);
  Vec acc[M][2];
  for (size_t m = 0; m < M; ++m) {
    acc[m][0] = hn::LoadU(tag, out + m * head_dim);
    acc[m][1] = hn::LoadU(tag, out + m * head_dim + n);
  }
  for (size_t u = 0; u < n_rows; ++u) {
    const size_t at = kIndexed ? static_cast<size_t>(index[u]) : u;
    const float* HWY_RESTRICT row = rows + at * head_dim;
    const float* HWY_RESTRICT weight = weights + at * weight_stride;
    const Vec r0 = hn::LoadU(tag, row), r1 = hn::LoadU(tag, row + n);
    for (size_t m = 0; m < M; ++m) {
      const Vec w = hn::Set(tag, weight[m]);
      acc[m][0] = hn::MulAdd(w, r0, acc[m][0]);
      acc[m][1] = hn::MulAdd(w, r1, acc[m][1]);
    }
  }
  for (size_t m = 0; m < M; ++m) {
    hn::StoreU(acc[m][0], tag, out + m * head_dim);
    hn::StoreU(acc[m][1], tag, out + m * head_dim + n);
  }
}

template <bool kIndexed>
HWY_INLINE void weighted_rows_of(const float* weights, size_t weight_stride, size_t m, const int32_t* index,
                                 size_t n_rows, const float* rows, size_t head_dim, float* out) {
  const Tag tag;
  const size_t width = 2 * hn::Lanes(tag);
  constexpr size_t kTile = 64;  // rows of one pass: both operands stay in the first-level cache
  for (size_t tile = 0; tile < n_rows; tile += kTile) {
    const size_t count = std::min(kTile, n_rows - tile);
    const int32_t* ids = kIndexed ? index + tile : nullptr;
    const float* w = kIndexed ? weights : weights + tile * weight_stride;
    const float* r = kIndexed ? rows : rows + tile * head_dim;
    size_t d = 0;
    for (; d + width <= head_dim; d += width) {
      size_t i = 0;
      for (; i + 6 <= m; i += 6)
        weighted_tile<6, kIndexed>(w + i, weight_stride, ids, count, r + d, head_dim, out + i * head_dim + d);
      for (; i + 4 <= m; i += 4)
        weighted_tile<4, kIndexed>(w + i, weight_stride, ids, count, r + d, head_dim, out + i * head_dim + d);
      for (; i < m; ++i)
        weighted_tile<1, kIndexed>(w + i, weight_stride, ids, count, r + d, head_dim, out + i * head_dim + d);
    }
    for (; d < head_dim; ++d)
      for (size_t i = 0; i < m; ++i) {
        float acc = out[i * head_dim + d];
        for (size_t u = 0; u < count; ++u) {
          const size_t at = kIndexed ? static_cast<size_t>(ids[u]) : u;
          acc = __builtin_fmaf(w[at * weight_stride + i], r[at * head_dim + d], acc);
        }
        out[i * head_dim + d] = acc;
      }
  }
}

void WeightedRows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
                  const float* rows, size_t head_dim, float* out) {
  if (index != nullptr)
    weighted_rows_of<true>(weights, weight_stride, m, index, n, rows, head_dim, out);
  else
    weighted_rows_of<false>(weights, weight_stride, m, nullptr, n, rows, head_dim, out);
}

void SumRows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
             float* out) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  constexpr size_t kPartial = 64;
  for (size_t begin = 0; begin < n; begin += kPartial) {
    const size_t end = std::min(n, begin + kPartial);
    size_t i = 0;
    for (; i + 2 * lanes <= m; i += 2 * lanes) {
      Vec a = hn::Zero(tag), b = hn::Zero(tag);
      for (size_t u = begin; u < end; ++u) {
        const float* row =
            weights + static_cast<size_t>(index ? index[u] : static_cast<int32_t>(u)) * weight_stride + i;
        a = hn::Add(a, hn::LoadU(tag, row));
        b = hn::Add(b, hn::LoadU(tag, row + lanes));
      }
      hn::StoreU(hn::Add(hn::LoadU(tag, out + i), a), tag, out + i);
      hn::StoreU(hn::Add(hn::LoadU(tag, out + i + lanes), b), tag, out + i + lanes);
    }
    for (; i < m; ++i) {
      float partial = 0;
      for (size_t u = begin; u < end; ++u)
        partial +=
            weights[static_cast<size_t>(index ? index[u] : static_cast<int32_t>(u)) * weight_stride + i];
      out[i] += partial;
    }
  }
}

// Scalar loads of G floats beat the gather instruction on current CPUs; the columns are then taken apart in
// registers.
template <size_t G>
HWY_INLINE void gather_groups(const float* HWY_RESTRICT values, const int32_t* HWY_RESTRICT index, size_t n,
                              float* out, size_t out_stride) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  constexpr size_t kBatch = 64;
  alignas(64) float batch[kBatch * G];
  size_t begin = 0;
  for (; begin + kBatch <= n; begin += kBatch) {
    for (size_t i = 0; i < kBatch; ++i)
      std::memcpy(batch + i * G, values + static_cast<size_t>(index[begin + i]) * G, G * sizeof(float));
    for (size_t i = 0; i < kBatch; i += lanes) {
      if constexpr (G == 2) {
        Vec a, b;
        hn::LoadInterleaved2(tag, batch + i * 2, a, b);
        hn::StoreU(a, tag, out + begin + i);
        hn::StoreU(b, tag, out + out_stride + begin + i);
      } else if constexpr (G == 4) {
        Vec a, b, c, e;
        hn::LoadInterleaved4(tag, batch + i * 4, a, b, c, e);
        hn::StoreU(a, tag, out + begin + i);
        hn::StoreU(b, tag, out + out_stride + begin + i);
        hn::StoreU(c, tag, out + 2 * out_stride + begin + i);
        hn::StoreU(e, tag, out + 3 * out_stride + begin + i);
      }
    }
  }
  for (size_t i = begin; i < n; ++i)
    for (size_t g = 0; g < G; ++g) out[g * out_stride + i] = values[static_cast<size_t>(index[i]) * G + g];
}

void GatherColumns(const float* values, size_t n_columns, const int32_t* index, size_t n, float* out,
                   size_t out_stride) {
  if (n_columns == 2) return gather_groups<2>(values, index, n, out, out_stride);
  if (n_columns == 4) return gather_groups<4>(values, index, n, out, out_stride);
  for (size_t i = 0; i < n; ++i)
    for (size_t g = 0; g < n_columns; ++g)
      out[g * out_stride + i] = values[static_cast<size_t>(index[i]) * n_columns + g];
}

Peak FindPeak(const float* values, size_t n) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  Vec most = hn::Set(tag, -std::numeric_limits<float>::infinity());
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) most = hn::Max(most, hn::LoadU(tag, values + i));
  float best = hn::GetLane(hn::MaxOfLanes(tag, most));
  for (; i < n; ++i) best = std::max(best, values[i]);
  const Vec wanted = hn::Set(tag, best);
  for (i = 0; i + lanes <= n; i += lanes) {
    const intptr_t at = hn::FindFirstTrue(tag, hn::Eq(hn::LoadU(tag, values + i), wanted));
    if (at >= 0) return {best, static_cast<int32_t>(i + static_cast<size_t>(at))};
  }
  for (; i < n && values[i] != best;) ++i;
  return {best, static_cast<int32_t>(i)};
}

}  // namespace kvlapse::dense::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse::dense {

HWY_EXPORT(LogitsBlock);
HWY_EXPORT(WeightedRows);
HWY_EXPORT(SumRows);
HWY_EXPORT(GatherColumns);
HWY_EXPORT(FindPeak);

void logits_block(const float* keys_t, size_t key_stride, size_t head_dim, const float* queries,
                  size_t query_stride, size_t n_queries, size_t n_keys, float scale, float* out,
                  size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(LogitsBlock)
  (keys_t, key_stride, head_dim, queries, query_stride, n_queries, n_keys, scale, out, out_stride);
}

void weighted_rows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
                   const float* rows, size_t head_dim, float* out) {
  HWY_DYNAMIC_DISPATCH(WeightedRows)(weights, weight_stride, m, index, n, rows, head_dim, out);
}

void sum_rows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
              float* out) {
  HWY_DYNAMIC_DISPATCH(SumRows)(weights, weight_stride, m, index, n, out);
}

void gather_columns(const float* values, size_t n_columns, const int32_t* index, size_t n, float* out,
                    size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(GatherColumns)(values, n_columns, index, n, out, out_stride);
}

Peak find_peak(const float* values, size_t n) {
  return HWY_DYNAMIC_DISPATCH(FindPeak)(values, n);
}

}  // namespace kvlapse::dense
#endif
