// fp8 (e4m3: 4 exponent bits of bias 7, 3 mantissa bits, no infinity, largest 448) with one scale a row:
// value = byte x scale. Host and device compile the same text, so a row that a kernel quantises has the CPU's
// bits.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>

namespace kvlapse {

inline constexpr float kFp8Largest = 448.0f;

constexpr float e4m3_to_f32(uint8_t byte) {
  const uint32_t sign = static_cast<uint32_t>(byte & 0x80u) << 24, magnitude = byte & 0x7fu;
  if (magnitude == 0x7f) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (magnitude >= 8) return std::bit_cast<float>(sign | ((magnitude << 20) + 0x3c000000u));
  // Subnormals are multiples of 2^-9.
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(static_cast<float>(magnitude) * 0x1p-9f));
}

// To nearest even; saturates.
constexpr uint8_t f32_to_e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7f;  // NaN, as the GPU's own conversion says it
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);
  if (magnitude < 0x3c800000u) {  // below 2^-6: the sum rounds to a multiple of 2^-9
    const float shifted = std::bit_cast<float>(magnitude) + 16384.0f;
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(shifted) - 0x46800000u));
  }
  const uint32_t odd = (magnitude >> 20) & 1u;
  return static_cast<uint8_t>(sign | ((magnitude + 0x7ffffu + odd - 0x3c000000u) >> 20));
}

// Of a row whose largest magnitude is `largest`. Zero for a row of zeros.
struct Fp8Scale {
  float scale, inverse;
};
constexpr Fp8Scale fp8_scale(float largest) {
  if (largest < 1e-30f) return {0.0f, 0.0f};
  const float scale = largest / kFp8Largest;
  return {scale, 1.0f / scale};
}

// Returns the scale.
float quantise_fp8_row(std::span<const float> row, uint8_t* out);

}  // namespace kvlapse
