// dot_rows and weighted_rows for one element type, inlined into foreach_target translation units. Register
// tiles: two or four rows by up to three vectors for dots; up to eight accumulators of a chunk of columns for
// weighted sums.
#if defined(KVLAPSE_CORE_BASE_ROW_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVLAPSE_CORE_BASE_ROW_MATH_INL_H_
#undef KVLAPSE_CORE_BASE_ROW_MATH_INL_H_
#else
#define KVLAPSE_CORE_BASE_ROW_MATH_INL_H_
#endif

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

#if KVLAPSE_SIMD

// Register tile of dots with columns: vectors by vectors of rows.
#if HWY_TARGET == HWY_AVX2
inline constexpr int kColumnX = 3, kColumnVecs = 2;
#else
inline constexpr int kColumnX = 4, kColumnVecs = 1;
#endif

// With 32 registers: keeps the compiler from reading a vector from memory again for each
// use.
HWY_INLINE void stay_in_register([[maybe_unused]] Vec& v) {
#if HWY_TARGET != HWY_AVX2
  asm("" : "+v"(v.raw));
#endif
}

// Folded dots of R rows with X vectors. `folded` is [X][8]; rows fill columns first, first + 1, ... kTail:
// dim is no multiple of 16.
template <int R, int X, bool kTail, typename T>
HWY_INLINE void dot_group(const T* const* row, const float* const* x, size_t dim, Vec8 (*folded)[8],
                          int first) {
  Vec acc[R][X][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j)
#pragma GCC unroll 2
      for (size_t v = 0; v < kVecs; ++v) acc[r][j][v] = hn::Zero(Tag());
  size_t i = 0;
  for (; i + kVirtualLanes <= dim; i += kVirtualLanes) {
    if constexpr (X == 1) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) prefetch_ahead(row[r] + i);
    }
#pragma GCC unroll 2
    for (size_t v = 0; v < kVecs; ++v) {
      Vec b[X];
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) b[j] = load(x[j] + i + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec a = load(row[r] + i + v * kLanes);
#pragma GCC unroll 4
        for (int j = 0; j < X; ++j) acc[r][j][v] = hn::MulAdd(a, b[j], acc[r][j][v]);
      }
    }
  }
  if constexpr (kTail) {
    const size_t left = dim - i;  // lanes past the end must keep their sum, even a negative zero
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      HWY_ALIGN float a[kVirtualLanes] = {};
      for (size_t l = 0; l < left; ++l) a[l] = widen(row[r][i + l]);
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) {
        HWY_ALIGN float b[kVirtualLanes] = {};
        for (size_t l = 0; l < left; ++l) b[l] = x[j][i + l];
#pragma GCC unroll 2
        for (size_t v = 0; v < kVecs; ++v) {
          const auto mask = hn::FirstN(Tag(), left > v * kLanes ? left - v * kLanes : 0);
          const Vec sum = hn::MulAdd(load(a + v * kLanes), load(b + v * kLanes), acc[r][j][v]);
          acc[r][j][v] = hn::IfThenElse(mask, sum, acc[r][j][v]);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j) folded[j][first + r] = fold(acc[r][j]);
}

#if HWY_TARGET == HWY_AVX2
// The same for dim a multiple of 16, first lanes 0 to 7, then lanes 8 to 15: half the accumulators of a tile
// at a time leave room for twice the rows, so that loads do not bound it.
template <int R, int X, typename T>
HWY_INLINE void dot_group_by_halves(const T* const* row, const float* const* x, size_t dim, Vec8 (*folded)[8],
                                    int first) {
#pragma GCC unroll 2
  for (size_t half = 0; half < 2; ++half) {
    Vec8 acc[R][X];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) acc[r][j] = hn::Zero(Tag());
    for (size_t i = half * kLanes; i < dim; i += kVirtualLanes) {
      if (sizeof(T) == 2 && half == 0) {  // measured: helps short rows, costs long ones
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) prefetch_ahead(row[r] + i);
      }
      Vec8 b[X];
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) b[j] = load(x[j] + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Vec8 a = load(row[r] + i);
#pragma GCC unroll 4
        for (int j = 0; j < X; ++j) acc[r][j] = hn::MulAdd(a, b[j], acc[r][j]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j)
        folded[j][first + r] = half == 0 ? acc[r][j] : hn::Add(folded[j][first + r], acc[r][j]);
  }
}
#endif

// Eight rows (pointers may repeat), X vectors; the first `valid` results of each are stored.
template <int X, bool kTail, typename T>
HWY_INLINE void dot_tile(const T* const (&row)[8], size_t valid, const float* x, size_t x_stride, size_t dim,
                         float factor, float* out, size_t out_stride) {
  constexpr bool kByHalves = X > 1 && !kTail;  // where a vector has 8 lanes
  constexpr int kRows = X == 1 || kVecs == 1 || kByHalves ? 4 : 2;
  const float* vectors[X];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) vectors[j] = x + j * x_stride;
  Vec8 folded[X][8];
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += kRows) {
#if HWY_TARGET == HWY_AVX2
    if constexpr (kByHalves) {
      dot_group_by_halves<kRows, X>(row + r, vectors, dim, folded, r);
      continue;
    }
#endif
    dot_group<kRows, X, kTail>(row + r, vectors, dim, folded, r);
  }
  const Tag8 d;
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) {
    const Vec8 result = hn::Mul(tree8(folded[j]), hn::Set(d, factor));
    if (HWY_LIKELY(valid == 8)) {
      hn::StoreU(result, d, out + j * out_stride);
    } else {
      HWY_ALIGN float part[8];
      hn::Store(result, d, part);
      std::copy_n(part, valid, out + j * out_stride);
    }
  }
}

template <bool kTail, typename T>
HWY_INLINE void dot_tiles(const T* const (&row)[8], size_t valid, const float* x, size_t x_stride, size_t n_x,
                          size_t dim, float factor, float* out, size_t out_stride) {
  while (n_x > 0) {
    const size_t taken = n_x == 4 ? 2 : std::min<size_t>(3, n_x);
    if (taken == 1)
      dot_tile<1, kTail>(row, valid, x, x_stride, dim, factor, out, out_stride);
    else if (taken == 2)
      dot_tile<2, kTail>(row, valid, x, x_stride, dim, factor, out, out_stride);
    else
      dot_tile<3, kTail>(row, valid, x, x_stride, dim, factor, out, out_stride);
    x += taken * x_stride;
    out += taken * out_stride;
    n_x -= taken;
  }
}

template <typename T>
HWY_INLINE void dot_rows_of(const T* data, size_t stride, const int32_t* index, size_t n, size_t dim,
                            const float* x, size_t x_stride, size_t n_x, float factor, float* out,
                            size_t out_stride) {
  for (size_t i = 0; i < n; i += 8) {
    const size_t valid = std::min<size_t>(8, n - i);
    const T* row[8];
    for (size_t r = 0; r < 8; ++r) {
      const size_t at = i + std::min(r, valid - 1);
      row[r] = data + (index ? static_cast<size_t>(index[at]) : at) * stride;
    }
    if (HWY_LIKELY(dim % kVirtualLanes == 0))
      dot_tiles<false>(row, valid, x, x_stride, n_x, dim, factor, out + i, out_stride);
    else
      dot_tiles<true>(row, valid, x, x_stride, n_x, dim, factor, out + i, out_stride);
  }
}

// Columns [begin, begin + V * kLanes) for X vectors of weights.
template <int V, int X, typename T>
HWY_INLINE void weighted_tile(const T* data, size_t stride, const int32_t* index, size_t n,
                              const float* weights, size_t weight_stride, float* out, size_t out_stride) {
  Vec acc[X][V];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[j][v] = hn::Zero(Tag());
  for (size_t i = 0; i < n; ++i) {
    const T* row = data + (index ? static_cast<size_t>(index[i]) : i) * stride;
    Vec w[X];
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j) w[j] = hn::Set(Tag(), weights[j * weight_stride + i]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Vec a = load(row + v * kLanes);
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) acc[j][v] = hn::MulAdd(w[j], a, acc[j][v]);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) hn::StoreU(acc[j][v], Tag(), out + j * out_stride + v * kLanes);
}

template <int X, typename T>
HWY_INLINE void weighted_columns(const T* data, size_t stride, const int32_t* index, size_t n, size_t dim,
                                 const float* weights, size_t weight_stride, float* out, size_t out_stride) {
  constexpr int kWide = X == 1 ? 8 : X == 2 ? 4 : 2;
  size_t d = 0;
  auto tiles = [&](auto width) HWY_ATTR {
    constexpr int kV = decltype(width)::value;
    if constexpr (kV <= kWide)
      for (; d + kV * kLanes <= dim; d += kV * kLanes)
        weighted_tile<kV, X>(data + d, stride, index, n, weights, weight_stride, out + d, out_stride);
  };
  tiles(std::integral_constant<int, 8>());
  tiles(std::integral_constant<int, 4>());
  tiles(std::integral_constant<int, 2>());
  tiles(std::integral_constant<int, 1>());
  for (; d < dim; ++d)
    for (int j = 0; j < X; ++j) {
      float total = 0;
      for (size_t i = 0; i < n; ++i) {
        const size_t at = index ? static_cast<size_t>(index[i]) : i;
        total = std::fma(weights[j * weight_stride + i], widen(data[at * stride + d]), total);
      }
      out[j * out_stride + d] = total;
    }
}

template <typename T>
HWY_INLINE void weighted_rows_of(const T* data, size_t stride, const int32_t* index, size_t n, size_t dim,
                                 const float* weights, size_t weight_stride, size_t n_x, float* out,
                                 size_t out_stride) {
  for (size_t j = 0; j < n_x;) {
    const size_t left = n_x - j, taken = left == 5 ? 3 : std::min<size_t>(4, left);
    const float* w = weights + j * weight_stride;
    float* to = out + j * out_stride;
    if (taken == 1)
      weighted_columns<1>(data, stride, index, n, dim, w, weight_stride, to, out_stride);
    else if (taken == 2)
      weighted_columns<2>(data, stride, index, n, dim, w, weight_stride, to, out_stride);
    else if (taken == 3)
      weighted_columns<3>(data, stride, index, n, dim, w, weight_stride, to, out_stride);
    else
      weighted_columns<4>(data, stride, index, n, dim, w, weight_stride, to, out_stride);
    j += taken;
  }
}

HWY_INLINE Vec8 load8(const float* p) {
  return hn::LoadU(Tag8(), p);
}
template <typename T>
HWY_INLINE Vec8 load8(const T* p) {
  return hn::PromoteTo(Tag8(), hn::LoadU(hn::Rebind<T, Tag8>(), p));
}

// Lane r of the i-th vector stored is lane i of row[r].
HWY_INLINE void transpose8(const Vec8 (&row)[8], float* out, size_t out_stride) {
  const Tag8 d;
  const hn::Repartition<uint64_t, Tag8> d64;
  Vec8 pairs[8], fours[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {  // in each half: [a0 b0 a1 b1], [a2 b2 a3 b3]
    pairs[i] = hn::InterleaveLower(d, row[i], row[i + 1]);
    pairs[i + 1] = hn::InterleaveUpper(d, row[i], row[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4)  // [a0 b0 c0 d0], [a1 ...], [a2 ...], [a3 ...]
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const auto a = hn::BitCast(d64, pairs[i + j]), b = hn::BitCast(d64, pairs[i + 2 + j]);
      fours[i + 2 * j] = hn::BitCast(d, hn::InterleaveLower(d64, a, b));
      fours[i + 2 * j + 1] = hn::BitCast(d, hn::InterleaveUpper(d64, a, b));
    }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    hn::StoreU(hn::ConcatLowerLower(d, fours[i + 4], fours[i]), d, out + i * out_stride);
    hn::StoreU(hn::ConcatUpperUpper(d, fours[i + 4], fours[i]), d, out + (i + 4) * out_stride);
  }
}

// The sums of virtual lanes kLane, kLane + kStep, ... of the dots of X vectors with the K * kLanes rows whose
// columns start at `columns`, added as the tree wants them.
template <int kLane, int kStep, int X, int K, size_t kDim>
HWY_INLINE void column_sums(const float* columns, size_t any_dim, const float* const* x, Vec (&sum)[X][K]) {
  if constexpr (kStep == kVirtualLanes) {
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j)
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) sum[j][k] = hn::Zero(Tag());
    auto add_column = [&](size_t i) HWY_ATTR {
      Vec a[K];
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) {
        a[k] = load(columns + i * kColumnRows + k * kLanes);
        stay_in_register(a[k]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) {
        const Vec b = hn::Set(Tag(), x[j][i]);
#pragma GCC unroll 2
        for (int k = 0; k < K; ++k) sum[j][k] = hn::MulAdd(a[k], b, sum[j][k]);
      }
    };
    if constexpr (kDim) {
#pragma GCC unroll 4
      for (size_t i = kLane; i < kDim; i += kVirtualLanes) add_column(i);
    } else {
      for (size_t i = kLane; i < any_dim; i += kVirtualLanes) add_column(i);
    }
  } else {
    Vec other[X][K];
    column_sums<kLane, 2 * kStep, X, K, kDim>(columns, any_dim, x, sum);
    column_sums<kLane + kStep, 2 * kStep, X, K, kDim>(columns, any_dim, x, other);
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j)
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k) sum[j][k] = hn::Add(sum[j][k], other[j][k]);
  }
}

// X vectors by all rows of the columns, K vectors of rows at a time.
template <int X, size_t kDim>
HWY_INLINE void columns_tile(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride,
                             float factor, float* out, size_t out_stride) {
  constexpr int K = kColumnVecs;
  const float* vectors[X];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) vectors[j] = x + j * x_stride;
  for (size_t i = 0; i < n; i += K * kLanes) {
    Vec sum[X][K];
    column_sums<0, 1, X, K, kDim>(columns + i, dim, vectors, sum);
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j)
#pragma GCC unroll 2
      for (int k = 0; k < K; ++k)
        hn::StoreU(hn::Mul(sum[j][k], hn::Set(Tag(), factor)), Tag(), out + j * out_stride + i + k * kLanes);
  }
}

template <size_t kDim>
HWY_INLINE void dot_columns_of(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride,
                               size_t n_x, float factor, float* out, size_t out_stride) {
  constexpr size_t X = kColumnX;
  size_t j = 0;
  for (; j + X <= n_x; j += X)
    columns_tile<X, kDim>(columns, n, dim, x + j * x_stride, x_stride, factor, out + j * out_stride,
                          out_stride);
  for (; j < n_x; ++j)
    columns_tile<1, kDim>(columns, n, dim, x + j * x_stride, x_stride, factor, out + j * out_stride,
                          out_stride);
}

#endif  // KVLAPSE_SIMD

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
