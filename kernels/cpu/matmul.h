// Matrix times activations, in the summation order of vector_math.h: an output's bits depend on its matrix
// row and its activation row alone. Weights are read in their storage type and widened on the way.
// Thread-safe; no allocation.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/ops/weights.h"

namespace kvlapse {

inline constexpr int64_t kPanelRows = 8;

// Scratch floats that matmul_rows needs for a matrix of so many columns.
constexpr size_t matmul_scratch(int64_t columns) {
  return static_cast<size_t>(kPanelRows * columns);
}

// y[j * y_stride + r] = W[r] . x[j * x_stride ...] for rows r in [begin, end) and j < n_x.
void matmul_rows(const Matrix& w, int64_t begin, int64_t end, const float* x, size_t x_stride, size_t n_x,
                 float* y, size_t y_stride, float* scratch);

// One row as fp32.
void matrix_row(const Matrix& w, int64_t row, float* out);

}  // namespace kvlapse
