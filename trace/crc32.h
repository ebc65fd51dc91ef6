// CRC-32 as zip has it (ISO 3309), in pieces.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvlapse {

class Crc32 {
 public:
  void add(std::span<const std::byte> bytes) {
    for (std::byte b : bytes) state_ = kTable[(state_ ^ static_cast<uint32_t>(b)) & 0xffu] ^ (state_ >> 8);
  }
  uint32_t value() const { return ~state_; }

 private:
  static constexpr std::array<uint32_t, 256> kTable = [] {
    std::array<uint32_t, 256> table{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int bit = 0; bit < 8; ++bit) c = (c & 1u) != 0 ? 0xedb88320u ^ (c >> 1) : c >> 1;
      table[i] = c;
    }
    return table;
  }();
  uint32_t state_ = ~uint32_t{0};
};

}  // namespace kvlapse
