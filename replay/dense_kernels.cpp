#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "replay/dense_kernels.cpp"
#include "replay/dense_kernels.h"

#include <hwy/foreach_target.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cstring>

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
  constexpr size_t kTile = 64;  // keys: [D][kTile] stays in the first-level cache
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

constexpr size_t kPanel = 6;         // output rows of one register tile
constexpr size_t kTileRows = 64;     // rows that are packed together
constexpr size_t kSlabFloats = 128;  // of a row; bounds the packing buffer

// M output rows by two vectors of D. Operands are packed: weights [n_rows][kPanel], rows [n_rows][2 vectors].
template <size_t M>
HWY_INLINE void packed_tile(const float* HWY_RESTRICT weights, const float* HWY_RESTRICT rows, size_t n_rows,
                            float* HWY_RESTRICT out, size_t out_stride) {
  const Tag tag;
  const size_t n = hn::Lanes(tag);
  Vec acc[M][2];
  for (size_t m = 0; m < M; ++m) {
    acc[m][0] = hn::LoadU(tag, out + m * out_stride);
    acc[m][1] = hn::LoadU(tag, out + m * out_stride + n);
  }
  for (size_t u = 0; u < n_rows; ++u, weights += kPanel, rows += 2 * n) {
    const Vec r0 = hn::Load(tag, rows), r1 = hn::Load(tag, rows + n);
    for (size_t m = 0; m < M; ++m) {
      const Vec w = hn::Set(tag, weights[m]);
      acc[m][0] = hn::MulAdd(w, r0, acc[m][0]);
      acc[m][1] = hn::MulAdd(w, r1, acc[m][1]);
    }
  }
  for (size_t m = 0; m < M; ++m) {
    hn::StoreU(acc[m][0], tag, out + m * out_stride);
    hn::StoreU(acc[m][1], tag, out + m * out_stride + n);
  }
}

template <size_t M>
HWY_INLINE void pack_weights(const float* weights, size_t weight_stride, const int32_t* index, size_t n_rows,
                             float* HWY_RESTRICT packed) {
  for (size_t u = 0; u < n_rows; ++u)
    std::memcpy(packed + u * kPanel,
                weights + static_cast<size_t>(index ? index[u] : static_cast<int32_t>(u)) * weight_stride,
                M * sizeof(float));
}

template <size_t M>
HWY_INLINE void panel(const float* weights, size_t weight_stride, const int32_t* index, size_t n_rows,
                      const float* packed_rows, size_t slab, float* out, size_t out_stride) {
  const size_t width = 2 * hn::Lanes(Tag());
  alignas(64) float packed[kTileRows * kPanel];
  pack_weights<M>(weights, weight_stride, index, n_rows, packed);
  for (size_t d = 0; d < slab; d += width)
    packed_tile<M>(packed, packed_rows + d * kTileRows, n_rows, out + d, out_stride);
}

// Rows are copied into panels first: picked by index they lie a power of two apart and would evict each other
// from the first-level cache.
void WeightedRows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
                  const float* rows, size_t head_dim, float* out) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag), width = 2 * lanes;
  alignas(64) float packed_rows[kTileRows * kSlabFloats];
  const size_t whole = head_dim - head_dim % width;
  for (size_t first = 0; first < n; first += kTileRows) {
    const size_t count = std::min(kTileRows, n - first);
    const int32_t* ids = index ? index + first : nullptr;
    const float* w = index ? weights : weights + first * weight_stride;
    const float* r = index ? rows : rows + first * head_dim;
    for (size_t begin = 0; begin < whole; begin += kSlabFloats) {
      const size_t slab = std::min(kSlabFloats, whole - begin);
      for (size_t u = 0; u < count; ++u) {
        const float* row = r + static_cast<size_t>(ids ? ids[u] : static_cast<int32_t>(u)) * head_dim + begin;
        for (size_t d = 0; d < slab; d += width) {
          float* to = packed_rows + d * kTileRows + u * width;
          hn::Store(hn::LoadU(tag, row + d), tag, to);
          hn::Store(hn::LoadU(tag, row + d + lanes), tag, to + lanes);
        }
      }
      size_t i = 0;
      for (; i + kPanel <= m; i += kPanel)
        panel<kPanel>(w + i, weight_stride, ids, count, packed_rows, slab, out + i * head_dim + begin,
                      head_dim);
      for (; i + 4 <= m; i += 4)
        panel<4>(w + i, weight_stride, ids, count, packed_rows, slab, out + i * head_dim + begin, head_dim);
      for (; i + 2 <= m; i += 2)
        panel<2>(w + i, weight_stride, ids, count, packed_rows, slab, out + i * head_dim + begin, head_dim);
      for (; i < m; ++i)
        panel<1>(w + i, weight_stride, ids, count, packed_rows, slab, out + i * head_dim + begin, head_dim);
    }
    for (size_t d = whole; d < head_dim; ++d)
      for (size_t i = 0; i < m; ++i) {
        float acc = out[i * head_dim + d];
        for (size_t u = 0; u < count; ++u) {
          const size_t at = ids ? static_cast<size_t>(ids[u]) : u;
          acc = __builtin_fmaf(w[at * weight_stride + i], r[at * head_dim + d], acc);
        }
        out[i * head_dim + d] = acc;
      }
  }
}

void AddParts(const float* const* parts, size_t n_parts, size_t n, float* out) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  size_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    Vec acc[4];
    for (size_t v = 0; v < 4; ++v) acc[v] = hn::LoadU(tag, out + i + v * lanes);
    for (size_t p = 0; p < n_parts; ++p)
      for (size_t v = 0; v < 4; ++v) acc[v] = hn::Add(acc[v], hn::LoadU(tag, parts[p] + i + v * lanes));
    for (size_t v = 0; v < 4; ++v) hn::StoreU(acc[v], tag, out + i + v * lanes);
  }
  for (; i < n; ++i)
    for (size_t p = 0; p < n_parts; ++p) out[i] += parts[p][i];
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

#if HWY_MAX_BYTES >= 32
// out[c * out_stride + r] = row r [c], for 8 rows of 8.
template <typename RowAt>
HWY_INLINE void transpose8(RowAt&& row, float* HWY_RESTRICT out, size_t out_stride) {
  const hn::FixedTag<float, 8> d;
  const hn::FixedTag<double, 4> pairs;
  using V = hn::Vec<decltype(d)>;
  V r[8], t[8];
  for (size_t i = 0; i < 8; ++i) r[i] = hn::LoadU(d, row(i));
  for (size_t i = 0; i < 8; i += 2) {
    t[i] = hn::InterleaveLower(d, r[i], r[i + 1]);
    t[i + 1] = hn::InterleaveUpper(d, r[i], r[i + 1]);
  }
  for (size_t i = 0; i < 8; i += 4)
    for (size_t j = 0; j < 2; ++j) {
      const auto a = hn::BitCast(pairs, t[i + j]), b = hn::BitCast(pairs, t[i + j + 2]);
      r[i + 2 * j] = hn::BitCast(d, hn::InterleaveLower(pairs, a, b));
      r[i + 2 * j + 1] = hn::BitCast(d, hn::InterleaveUpper(pairs, a, b));
    }
  for (size_t i = 0; i < 4; ++i) {
    hn::StoreU(hn::ConcatLowerLower(d, r[i + 4], r[i]), d, out + i * out_stride);
    hn::StoreU(hn::ConcatUpperUpper(d, r[i + 4], r[i]), d, out + (i + 4) * out_stride);
  }
}
constexpr size_t kBlock = 8;
#else
template <typename RowAt>
HWY_INLINE void transpose8(RowAt&& row, float* HWY_RESTRICT out, size_t out_stride) {
  for (size_t c = 0; c < 8; ++c)
    for (size_t r = 0; r < 8; ++r) out[c * out_stride + r] = row(r)[c];
}
constexpr size_t kBlock = 8;
#endif

void GatherColumns(const float* values, size_t stride, size_t n_columns, const int32_t* index, size_t n,
                   float* out, size_t out_stride) {
  size_t i = 0;
  for (; n_columns % kBlock == 0 && i + kBlock <= n; i += kBlock)
    for (size_t c = 0; c < n_columns; c += kBlock)
      transpose8([&](size_t r) HWY_ATTR { return values + static_cast<size_t>(index[i + r]) * stride + c; },
                 out + c * out_stride + i, out_stride);
  for (; i < n; ++i)
    for (size_t c = 0; c < n_columns; ++c)
      out[c * out_stride + i] = values[static_cast<size_t>(index[i]) * stride + c];
}

void Transpose(const float* rows, size_t row_stride, size_t n_rows, size_t n, float* out, size_t out_stride) {
  size_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    size_t m = 0;
    for (; m + kBlock <= n_rows; m += kBlock)
      transpose8([&](size_t r) HWY_ATTR { return rows + (m + r) * row_stride + i; }, out + i * out_stride + m,
                 out_stride);
    for (; m < n_rows; ++m)
      for (size_t j = i; j < i + kBlock; ++j) out[j * out_stride + m] = rows[m * row_stride + j];
  }
  for (; i < n; ++i)
    for (size_t m = 0; m < n_rows; ++m) out[i * out_stride + m] = rows[m * row_stride + i];
}

size_t FindAbove(const float* values, size_t n, float threshold, int32_t* out) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  const Vec least = hn::Set(tag, threshold);
  size_t found = 0, i = 0;
  for (; i + lanes <= n; i += lanes) {
    if (hn::AllFalse(tag, hn::Gt(hn::LoadU(tag, values + i), least))) continue;
    for (size_t j = i; j < i + lanes; ++j)
      if (values[j] > threshold) out[found++] = static_cast<int32_t>(j);
  }
  for (; i < n; ++i)
    if (values[i] > threshold) out[found++] = static_cast<int32_t>(i);
  return found;
}

void AboveBits(const float* rows, size_t row_stride, size_t n_rows, size_t n, float threshold, uint32_t* out,
               size_t out_stride) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  const Vec least = hn::Set(tag, threshold);
  for (size_t r = 0; r < n_rows; ++r)
    for (size_t i = 0; i < n; i += 32) {
      const float* row = rows + r * row_stride + i;
      uint32_t word = 0;
      if (lanes % 8 == 0 && lanes <= 32) {
        uint8_t bytes[16] = {};
        for (size_t j = 0; j < 32; j += lanes)
          hn::StoreMaskBits(tag, hn::Gt(hn::LoadU(tag, row + j), least), bytes + j / 8);
        std::memcpy(&word, bytes, sizeof(word));
      } else {
        for (size_t j = 0; j < 32; ++j) word |= static_cast<uint32_t>(row[j] > threshold) << j;
      }
      out[r * out_stride + i / 32] = word;
    }
}

Products CombineProducts(const float* a, float a_scale, const float* b, float b_scale, size_t n) {
  const Tag tag;
  const size_t lanes = hn::Lanes(tag);
  constexpr size_t kMostVectors = kLanes / 4;
  Vec xx[kMostVectors], ax[kMostVectors];
  for (size_t v = 0; v < kMostVectors; ++v) xx[v] = ax[v] = hn::Zero(tag);
  const Vec sa = hn::Set(tag, a_scale), sb = hn::Set(tag, b_scale);
  alignas(64) float lane_xx[kLanes] = {}, lane_ax[kLanes] = {};
  size_t i = 0;
  if (lanes <= kLanes && lanes >= 4) {
    for (; i + kLanes <= n; i += kLanes)
      for (size_t v = 0; v < kLanes / lanes; ++v) {
        const Vec x = hn::LoadU(tag, a + i + v * lanes);
        const Vec y = hn::MulAdd(x, sa, hn::Mul(sb, hn::LoadU(tag, b + i + v * lanes)));
        xx[v] = hn::MulAdd(y, y, xx[v]);
        ax[v] = hn::MulAdd(x, y, ax[v]);
      }
    for (size_t v = 0; v < kLanes / lanes; ++v) {
      hn::StoreU(xx[v], tag, lane_xx + v * lanes);
      hn::StoreU(ax[v], tag, lane_ax + v * lanes);
    }
  }
  for (; i < n; ++i) {
    const float y = __builtin_fmaf(a[i], a_scale, b_scale * b[i]);
    lane_xx[i % kLanes] = __builtin_fmaf(y, y, lane_xx[i % kLanes]);
    lane_ax[i % kLanes] = __builtin_fmaf(a[i], y, lane_ax[i % kLanes]);
  }
  for (size_t w = kLanes / 2; w > 0; w /= 2)
    for (size_t l = 0; l < w; ++l) {
      lane_xx[l] += lane_xx[l + w];
      lane_ax[l] += lane_ax[l + w];
    }
  return {lane_xx[0], lane_ax[0]};
}

}  // namespace kvlapse::dense::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse::dense {

HWY_EXPORT(LogitsBlock);
HWY_EXPORT(WeightedRows);
HWY_EXPORT(SumRows);
HWY_EXPORT(AddParts);
HWY_EXPORT(GatherColumns);
HWY_EXPORT(Transpose);
HWY_EXPORT(FindAbove);
HWY_EXPORT(AboveBits);
HWY_EXPORT(CombineProducts);

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

void add_parts(const float* const* parts, size_t n_parts, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(AddParts)(parts, n_parts, n, out);
}

void gather_columns(const float* values, size_t stride, size_t n_columns, const int32_t* index, size_t n,
                    float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(GatherColumns)(values, stride, n_columns, index, n, out, out_stride);
}

void transpose(const float* rows, size_t row_stride, size_t n_rows, size_t n, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(Transpose)(rows, row_stride, n_rows, n, out, out_stride);
}

size_t find_above(const float* values, size_t n, float threshold, int32_t* out) {
  return HWY_DYNAMIC_DISPATCH(FindAbove)(values, n, threshold, out);
}

void above_bits(const float* rows, size_t row_stride, size_t n_rows, size_t n, float threshold, uint32_t* out,
                size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(AboveBits)(rows, row_stride, n_rows, n, threshold, out, out_stride);
}

Products combine_products(const float* a, float a_scale, const float* b, float b_scale, size_t n) {
  return HWY_DYNAMIC_DISPATCH(CombineProducts)(a, a_scale, b, b_scale, n);
}

}  // namespace kvlapse::dense
#endif
