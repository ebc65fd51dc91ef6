// PackedMatrix: a quantised matrix regrouped for integer_matmul.h. The same numbers in as many bytes, eight
// rows side by side, so that one vector holds two neighbouring columns of eight rows and a dot needs no
// shuffle.
//
// Groups of 8 rows, in each the blocks of 32 columns in order. A block:
//   8 fp16 scales; Q4_1: 8 fp16 minima;
//   Q4_0, Q4_1: 64 words of 16 bits, word 16 j + 2 r + w holding columns 8 j + 2 n + w of row r in nibble n;
//   Q8_0: 256 bytes, byte 16 p + 2 r + w holding column 2 p + w of row r.
// Rows past the last are zeros. A view: the backend owns the bytes. Immutable and thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/ops/weights.h"

namespace kvlapse {

struct PackedMatrix {
  static constexpr int64_t kRows = 8, kBlock = 32;

  TensorType type = TensorType::f32;
  int64_t rows = 0, columns = 0;
  const std::byte* data = nullptr;  // null: not packed

  int64_t n_groups() const { return (rows + kRows - 1) / kRows; }
};

// Q8_0, Q4_0 and Q4_1.
bool can_be_packed(TensorType type);
// Bytes of 8 rows of a matrix.
size_t packed_group_bytes(TensorType type, int64_t columns);

// Packs groups [begin, end) of `w` to where they belong in `out`, which holds all groups.
void pack_groups(const Matrix& w, int64_t begin, int64_t end, std::byte* out);

}  // namespace kvlapse
