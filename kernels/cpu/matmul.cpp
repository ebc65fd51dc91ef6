#include "kernels/cpu/matmul.h"

#include <algorithm>

#include "core/base/row_math.h"
#include "core/model/tensor_file.h"
#include "kernels/cpu/activations.h"
#include "kernels/cpu/quantised_dot.h"

namespace kvlapse {
namespace {

// From so many activation rows on, widening a panel of weights once costs less than widening it per tile.
constexpr size_t kPanelFrom = 4;

bool is_float(TensorType type) {
  return type == TensorType::f32 || type == TensorType::f16 || type == TensorType::bf16;
}

DType float_type(TensorType type) {
  return type == TensorType::f16 ? DType::f16 : type == TensorType::bf16 ? DType::bf16 : DType::f32;
}

}  // namespace

void matmul_rows(const Matrix& w, int64_t begin, int64_t end, const float* x, size_t x_stride, size_t n_x,
                 float* y, size_t y_stride, float* scratch) {
  const auto columns = static_cast<size_t>(w.columns);
  if (is_float(w.type) && (w.type == TensorType::f32 || n_x < kPanelFrom)) {
    const RowView rows{w.row(begin), float_type(w.type), columns, nullptr};
    dot_rows(rows, static_cast<size_t>(end - begin), columns, x, x_stride, n_x, 1.0f, y + begin, y_stride);
    return;
  }
  if (has_quantised_dot(w.type) && n_x < kPanelFrom) {
    quantised_rows(w.type, w.row(begin), w.row_bytes(), static_cast<size_t>(end - begin), columns, x,
                   x_stride, n_x, y + begin, y_stride);
    return;
  }
  for (int64_t r = begin; r < end; r += kPanelRows) {
    const int64_t n = std::min(kPanelRows, end - r);
    for (int64_t i = 0; i < n; ++i) matrix_row(w, r + i, scratch + i * w.columns);
    dot_rows({scratch, DType::f32, columns, nullptr}, static_cast<size_t>(n), columns, x, x_stride, n_x, 1.0f,
             y + r, y_stride);
  }
}

void matrix_row(const Matrix& w, int64_t row, float* out) {
  const auto columns = static_cast<size_t>(w.columns);
  if (is_float(w.type))
    widen(float_type(w.type), w.row(row), columns, out);
  else if (has_quantised_dot(w.type))
    widen_quantised(w.type, w.row(row), columns, out);
  else
    dequantize(w.type, w.row(row), w.columns, out);
}

}  // namespace kvlapse
