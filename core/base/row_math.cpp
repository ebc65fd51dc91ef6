#include "core/base/row_math.h"

#include <algorithm>
#include <cassert>
#include <cmath>

#include "core/base/scalar_math.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/base/row_math.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/row_math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

void DotRows(const RowView& rows, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
             float factor, float* out, size_t out_stride) {
#if KVLAPSE_SIMD
  auto run = [&](const auto* data) HWY_ATTR {
    dot_rows_of(data, rows.stride, rows.index, n, dim, x, x_stride, n_x, factor, out, out_stride);
  };
  switch (rows.type) {
    case DType::f16: return run(static_cast<const hwy::float16_t*>(rows.data));
    case DType::bf16: return run(static_cast<const hwy::bfloat16_t*>(rows.data));
    default: return run(static_cast<const float*>(rows.data));
  }
#else
  scalar::dot_rows(rows, n, dim, x, x_stride, n_x, factor, out, out_stride);
#endif
}

void ToColumns(const RowView& rows, size_t n, size_t dim, float* columns) {
  size_t i = 0;
#if KVLAPSE_SIMD
  auto run = [&](const auto* data) HWY_ATTR {
    for (; i + 8 <= n; i += 8) {
      const std::remove_reference_t<decltype(*data)>* row[8];
      for (size_t r = 0; r < 8; ++r)
        row[r] = data + (rows.index ? static_cast<size_t>(rows.index[i + r]) : i + r) * rows.stride;
      size_t d = 0;
      for (; d + 8 <= dim; d += 8) {
        Vec8 block[8];
        for (int r = 0; r < 8; ++r) block[r] = load8(row[r] + d);
        transpose8(block, columns + d * kColumnRows + i, kColumnRows);
      }
      for (; d < dim; ++d)
        for (size_t r = 0; r < 8; ++r) columns[d * kColumnRows + i + r] = widen(row[r][d]);
    }
  };
  switch (rows.type) {
    case DType::f16: run(static_cast<const hwy::float16_t*>(rows.data)); break;
    case DType::bf16: run(static_cast<const hwy::bfloat16_t*>(rows.data)); break;
    default: run(static_cast<const float*>(rows.data));
  }
#endif
  for (; i < n; ++i)
    for (size_t d = 0; d < dim; ++d) columns[d * kColumnRows + i] = scalar::element(rows, i, d);
  for (; i % 32 != 0; ++i)
    for (size_t d = 0; d < dim; ++d) columns[d * kColumnRows + i] = 0;
}

void DotColumns(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
                float factor, float* out, size_t out_stride) {
#if KVLAPSE_SIMD
  // Unrolled for the most usual short rows; longer ones pay less for the loop.
  if (dim == 64) return dot_columns_of<64>(columns, n, dim, x, x_stride, n_x, factor, out, out_stride);
  dot_columns_of<0>(columns, n, dim, x, x_stride, n_x, factor, out, out_stride);
#else
  scalar::dot_columns(columns, n, dim, x, x_stride, n_x, factor, out, out_stride);
#endif
}

void WeightedRows(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                  size_t n_x, float* out, size_t out_stride) {
#if KVLAPSE_SIMD
  auto run = [&](const auto* data) HWY_ATTR {
    weighted_rows_of(data, rows.stride, rows.index, n, dim, weights, weight_stride, n_x, out, out_stride);
  };
  switch (rows.type) {
    case DType::f16: return run(static_cast<const hwy::float16_t*>(rows.data));
    case DType::bf16: return run(static_cast<const hwy::bfloat16_t*>(rows.data));
    default: return run(static_cast<const float*>(rows.data));
  }
#else
  scalar::weighted_rows(rows, n, dim, weights, weight_stride, n_x, out, out_stride);
#endif
}

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(DotRows);
HWY_EXPORT(ToColumns);
HWY_EXPORT(DotColumns);
HWY_EXPORT(WeightedRows);

float attention_scale(int head_dim) {
  return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
}

void dot_rows(const RowView& rows, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
              float factor, float* out, size_t out_stride) {
  assert(rows.type != DType::f8e4m3);
  HWY_DYNAMIC_DISPATCH(DotRows)(rows, n, dim, x, x_stride, n_x, factor, out, out_stride);
}

void to_columns(const RowView& rows, size_t n, size_t dim, float* columns) {
  assert(n <= kColumnRows && rows.type != DType::f8e4m3);
  HWY_DYNAMIC_DISPATCH(ToColumns)(rows, n, dim, columns);
}

void dot_columns(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
                 float factor, float* out, size_t out_stride) {
  HWY_DYNAMIC_DISPATCH(DotColumns)(columns, n, dim, x, x_stride, n_x, factor, out, out_stride);
}

void weighted_rows(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                   size_t n_x, float* out, size_t out_stride) {
  assert(rows.type != DType::f8e4m3);
  HWY_DYNAMIC_DISPATCH(WeightedRows)(rows, n, dim, weights, weight_stride, n_x, out, out_stride);
}

void attention_output(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                      size_t n_x, float* out, size_t out_stride) {
  constexpr size_t kMaxDim = 512, kGroup = 4;
  assert(dim <= kMaxDim);
  float partial[kGroup * kMaxDim];
  for (size_t j = 0; j < n_x; j += kGroup) {
    const size_t group = std::min(kGroup, n_x - j);
    for (size_t k = 0; k < group; ++k) std::fill_n(out + (j + k) * out_stride, dim, 0.0f);
    for (size_t begin = 0; begin < n; begin += kValueChunk) {
      RowView chunk = rows;
      if (rows.index)
        chunk.index = rows.index + begin;
      else
        chunk.data = static_cast<const std::byte*>(rows.data) + begin * rows.stride * dtype_bytes(rows.type);
      weighted_rows(chunk, std::min(kValueChunk, n - begin), dim, weights + j * weight_stride + begin,
                    weight_stride, group, partial, kMaxDim);
      for (size_t k = 0; k < group; ++k)
        for (size_t d = 0; d < dim; ++d) out[(j + k) * out_stride + d] += partial[k * kMaxDim + d];
    }
  }
}

}  // namespace kvlapse
#endif  // HWY_ONCE
