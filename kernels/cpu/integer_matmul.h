// Products of quantised matrices with activations rounded to 16-bit integers: faster than quantised_dot.h,
// and wrong by the activations' rounding only (2^-16 of the largest of each block of 32). Products within a
// block are summed exactly in 32-bit integers, blocks in fp32 in order of column: the bits of an output
// depend on its row and its activations, on neither CPU, batch nor threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/cpu/packed_matrix.h"

namespace kvlapse {

// Rows of activations as integers, in tiles of rows that are multiplied together: eights, then one tile each
// of 4, 2 and 1 for what is left. In a tile the rows alternate, so that one address serves them all. Reused:
// assign() only allocates while it grows. One thread.
struct IntegerActivations {
  static constexpr size_t kBlock = PackedMatrix::kBlock, kMaxTile = 8;
  size_t n_rows = 0, columns = 0;
  std::vector<int16_t> values;  // tile from row r at r * columns: [columns / 2][tile][2]
  std::vector<float> scales;    // tile from row r at r * n_blocks(): [n_blocks()][tile]; x = value * scale
  std::vector<float> sums;      // likewise: scale * sum of the block's values

  size_t n_blocks() const { return columns / kBlock; }
  // Rows of the tile that begins at a row.
  static constexpr size_t tile_of(size_t rows_left) {
    return rows_left >= 8 ? 8 : rows_left >= 4 ? 4 : rows_left >= 2 ? 2 : 1;
  }
  void reserve(size_t max_rows, size_t max_columns);
  void assign(const float* x, size_t x_stride, size_t rows, size_t row_columns);
};

// y[j * y_stride + r] = row r . x row j for rows r in [begin, end) of w; begin is a multiple of 8, w.columns
// == x.columns.
void integer_matmul(const PackedMatrix& w, int64_t begin, int64_t end, const IntegerActivations& x, float* y,
                    size_t y_stride);

namespace scalar {
// Its definition, from the matrix as the file has it.
float integer_dot(TensorType type, const std::byte* row, const IntegerActivations& x, size_t x_row);
}  // namespace scalar

}  // namespace kvlapse
