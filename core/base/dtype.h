// Element types of activations and K/V caches, and exact scalar conversions. Bulk conversions with SIMD live
// in kernels/cpu; both round to nearest even and agree bit for bit.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvlapse {

enum class DType : uint8_t { f32, f16, bf16, f8e4m3 };

constexpr size_t dtype_bytes(DType type) {
  return type == DType::f32 ? 4 : type == DType::f8e4m3 ? 1 : 2;
}

constexpr std::string_view dtype_name(DType type) {
  switch (type) {
    case DType::f32: return "fp32";
    case DType::f16: return "fp16";
    case DType::bf16: return "bf16";
    case DType::f8e4m3: return "fp8";
  }
  return "?";
}

// Accepts the names that dtype_name gives; throws UsageError otherwise.
DType parse_dtype(std::string_view name);

constexpr float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

constexpr uint16_t f32_to_bf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

float f16_to_f32(uint16_t bits);
uint16_t f32_to_f16(float value);

}  // namespace kvlapse
