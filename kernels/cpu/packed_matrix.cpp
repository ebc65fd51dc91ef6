#include "kernels/cpu/packed_matrix.h"

#include <cstring>

namespace kvlapse {
namespace {

constexpr size_t kRows = PackedMatrix::kRows, kBlock = PackedMatrix::kBlock;

// fp16 numbers at the head of a block: scale, and for Q4_1 a minimum.
constexpr size_t halves_of(TensorType type) {
  return type == TensorType::q4_1 ? 2 : 1;
}

constexpr size_t packed_block_bytes(TensorType type) {
  return kRows * (halves_of(type) * 2 + (type == TensorType::q8_0 ? kBlock : kBlock / 2));
}

void pack_block(TensorType type, const std::byte* block, size_t row, std::byte* out) {
  const size_t n_halves = halves_of(type);
  for (size_t i = 0; i < n_halves; ++i) std::memcpy(out + (i * kRows + row) * 2, block + i * 2, 2);
  const auto* q = reinterpret_cast<const uint8_t*>(block + n_halves * 2);
  std::byte* values = out + n_halves * kRows * 2;
  if (type == TensorType::q8_0) {
    for (size_t c = 0; c < kBlock; ++c)
      values[c / 2 * 2 * kRows + 2 * row + c % 2] = static_cast<std::byte>(q[c]);
    return;
  }
  // In the file byte i holds columns i and i + 16.
  auto nibble = [&](size_t c) { return c < 16 ? q[c] & 15 : q[c - 16] >> 4; };
  for (size_t j = 0; j < 4; ++j)
    for (size_t w = 0; w < 2; ++w) {
      uint16_t word = 0;
      for (size_t n = 0; n < 4; ++n)
        word = static_cast<uint16_t>(word | nibble(8 * j + 2 * n + w) << (4 * n));
      std::memcpy(values + (j * 2 * kRows + 2 * row + w) * 2, &word, 2);
    }
}

}  // namespace

bool can_be_packed(TensorType type) {
  return type == TensorType::q8_0 || type == TensorType::q4_0 || type == TensorType::q4_1;
}

size_t packed_group_bytes(TensorType type, int64_t columns) {
  return static_cast<size_t>(columns) / kBlock * packed_block_bytes(type);
}

void pack_groups(const Matrix& w, int64_t begin, int64_t end, std::byte* out) {
  const size_t group_bytes = packed_group_bytes(w.type, w.columns), n_blocks = w.columns / kBlock;
  const size_t block_size = block_bytes(w.type), packed_size = packed_block_bytes(w.type);
  for (int64_t g = begin; g < end; ++g) {
    std::byte* group = out + g * group_bytes;
    std::memset(group, 0, group_bytes);
    for (size_t r = 0; r < kRows; ++r) {
      const int64_t row = g * PackedMatrix::kRows + static_cast<int64_t>(r);
      if (row >= w.rows) break;
      for (size_t b = 0; b < n_blocks; ++b)
        pack_block(w.type, w.row(row) + b * block_size, r, group + b * packed_size);
    }
  }
}

}  // namespace kvlapse
