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

#endif  // KVLAPSE_SIMD

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
