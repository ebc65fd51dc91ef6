// Dots of quantised matrix rows with activations in 16-bit integers: a faster mode than quantised_dot.h, with
// an error of the activations' rounding only (2^-16 of the largest of each block of 32). Products within a
// block are summed exactly in 32-bit integers, blocks in fp32 in one fixed order of 8 lanes: the bits depend
// on neither CPU, batch nor threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "core/base/tensor_type.h"

namespace kvlapse {

// Rows of activations as integers. Reused: assign() only allocates while it grows. One thread.
struct IntegerActivations {
  static constexpr size_t kBlock = 32, kSums = 8;
  size_t n_rows = 0, columns = 0;
  std::vector<int16_t> values;  // [n_rows][columns]
  std::vector<float> scales;    // [n_rows][columns / 32]: x = value * scale
  // [n_rows][columns / 32][8]: scale * sum of values 2l, 2l + 1, 16 + 2l and 17 + 2l of the block.
  std::vector<float> sums;

  size_t n_blocks() const { return columns / kBlock; }
  void reserve(size_t max_rows, size_t max_columns);
  void assign(const float* x, size_t x_stride, size_t rows, size_t row_columns);
};

bool has_integer_dot(TensorType type);

// y[j * y_stride + r] = row r . x row j, for n_rows rows of x.columns.
void integer_rows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows,
                  const IntegerActivations& x, float* y, size_t y_stride);

namespace scalar {
// Its definition.
float integer_dot(TensorType type, const std::byte* row, const IntegerActivations& x, size_t x_row);
}  // namespace scalar

}  // namespace kvlapse
