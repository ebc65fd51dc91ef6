// Dequantisation in the order of operations of ggml's reference code (ggml-quants.c, dequantize_row_*),
// without contraction, so that the values agree bit for bit. Plain loops: the decode path reads quantised
// blocks in its matrix products, this serves loading, checks and exact references.
#include <cstring>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/model/tensor_file.h"

namespace kvlapse {
namespace {

const uint8_t* as_u8(const std::byte* data) {
  return reinterpret_cast<const uint8_t*>(data);
}

float half_at(const uint8_t* data) {
  uint16_t bits = 0;
  std::memcpy(&bits, data, sizeof bits);
  return f16_to_f32(bits);
}

uint32_t word_at(const uint8_t* data) {
  uint32_t bits = 0;
  std::memcpy(&bits, data, sizeof bits);
  return bits;
}

int signed_byte(uint8_t byte) {
  return static_cast<int8_t>(byte);
}

void block_q8_0(const uint8_t* in, float* out) {
  float d = half_at(in);
  for (int i = 0; i < 32; ++i) out[i] = d * static_cast<float>(signed_byte(in[2 + i]));
}

void block_q4_0(const uint8_t* in, float* out) {
  float d = half_at(in);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>((in[2 + i] & 15) - 8);
    out[i + 16] = d * static_cast<float>((in[2 + i] >> 4) - 8);
  }
}

void block_q4_1(const uint8_t* in, float* out) {
  float d = half_at(in), m = half_at(in + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(in[4 + i] & 15) + m;
    out[i + 16] = d * static_cast<float>(in[4 + i] >> 4) + m;
  }
}

// The fifth bit of value i is bit i of a 32-bit word.
int five_bits(uint8_t nibble, uint32_t high, int i) {
  return nibble | (static_cast<int>((high >> i) & 1u) << 4);
}

void block_q5_0(const uint8_t* in, float* out) {
  float d = half_at(in);
  uint32_t high = word_at(in + 2);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(five_bits(in[6 + i] & 15, high, i) - 16);
    out[i + 16] = d * static_cast<float>(five_bits(in[6 + i] >> 4, high, i + 16) - 16);
  }
}

void block_q5_1(const uint8_t* in, float* out) {
  float d = half_at(in), m = half_at(in + 2);
  uint32_t high = word_at(in + 4);
  for (int i = 0; i < 16; ++i) {
    out[i] = d * static_cast<float>(five_bits(in[8 + i] & 15, high, i)) + m;
    out[i + 16] = d * static_cast<float>(five_bits(in[8 + i] >> 4, high, i + 16)) + m;
  }
}

// Q4_K and Q5_K: eight 6-bit scales and minima in 12 bytes.
struct ScaleMin {
  uint8_t scale, min;
};

ScaleMin scale_min(const uint8_t* packed, int j) {
  if (j < 4) return {static_cast<uint8_t>(packed[j] & 63), static_cast<uint8_t>(packed[j + 4] & 63)};
  return {static_cast<uint8_t>((packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4)),
          static_cast<uint8_t>((packed[j + 4] >> 4) | ((packed[j] >> 6) << 4))};
}

void block_q4_k(const uint8_t* in, float* out) {
  float d = half_at(in), dmin = half_at(in + 2);
  const uint8_t* packed = in + 4;
  const uint8_t* quants = in + 16;
  for (int j = 0; j < 8; ++j) {
    ScaleMin sm = scale_min(packed, j);
    float scale = d * static_cast<float>(sm.scale), min = dmin * static_cast<float>(sm.min);
    const uint8_t* q = quants + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) {
      int value = j % 2 == 0 ? q[i] & 15 : q[i] >> 4;
      out[32 * j + i] = scale * static_cast<float>(value) - min;
    }
  }
}

void block_q5_k(const uint8_t* in, float* out) {
  float d = half_at(in), dmin = half_at(in + 2);
  const uint8_t* packed = in + 4;
  const uint8_t* high = in + 16;
  const uint8_t* quants = in + 48;
  for (int j = 0; j < 8; ++j) {
    ScaleMin sm = scale_min(packed, j);
    float scale = d * static_cast<float>(sm.scale), min = dmin * static_cast<float>(sm.min);
    const uint8_t* q = quants + 32 * (j / 2);
    for (int i = 0; i < 32; ++i) {
      int value = (j % 2 == 0 ? q[i] & 15 : q[i] >> 4) | (((high[i] >> j) & 1) << 4);
      out[32 * j + i] = scale * static_cast<float>(value) - min;
    }
  }
}

void block_q6_k(const uint8_t* in, float* out) {
  float d = half_at(in + 208);
  for (int half = 0; half < 2; ++half) {
    const uint8_t* low = in + 64 * half;
    const uint8_t* high = in + 128 + 32 * half;
    const uint8_t* scales = in + 192 + 8 * half;
    for (int i = 0; i < 128; ++i) {
      int quarter = i / 32, lane = i % 32;
      uint8_t byte = low[lane + 32 * (quarter % 2)];
      int value = (quarter < 2 ? byte & 15 : byte >> 4) | (((high[lane] >> (2 * quarter)) & 3) << 4);
      float scale = d * static_cast<float>(signed_byte(scales[i / 16]));
      out[128 * half + i] = scale * static_cast<float>(value - 32);
    }
  }
}

template <typename Block>
void blocks(TensorType type, const uint8_t* in, int64_t n_elements, float* out, Block block) {
  for (int64_t i = 0; i < n_elements; i += block_elements(type), in += block_bytes(type)) block(in, out + i);
}

}  // namespace

void dequantize(TensorType type, const std::byte* data, int64_t n_elements, float* out) {
  if (n_elements % block_elements(type) != 0)
    fail("{}: expected a multiple of {} elements, found {}", tensor_type_name(type), block_elements(type),
         n_elements);
  const uint8_t* in = as_u8(data);
  switch (type) {
    case TensorType::f32: std::memcpy(out, data, static_cast<size_t>(n_elements) * sizeof(float)); return;
    case TensorType::f16:
      for (int64_t i = 0; i < n_elements; ++i) out[i] = half_at(in + 2 * i);
      return;
    case TensorType::bf16:
      for (int64_t i = 0; i < n_elements; ++i) {
        uint16_t bits = 0;
        std::memcpy(&bits, in + 2 * i, sizeof bits);
        out[i] = bf16_to_f32(bits);
      }
      return;
    case TensorType::q8_0: return blocks(type, in, n_elements, out, block_q8_0);
    case TensorType::q4_0: return blocks(type, in, n_elements, out, block_q4_0);
    case TensorType::q4_1: return blocks(type, in, n_elements, out, block_q4_1);
    case TensorType::q5_0: return blocks(type, in, n_elements, out, block_q5_0);
    case TensorType::q5_1: return blocks(type, in, n_elements, out, block_q5_1);
    case TensorType::q4_k: return blocks(type, in, n_elements, out, block_q4_k);
    case TensorType::q5_k: return blocks(type, in, n_elements, out, block_q5_k);
    case TensorType::q6_k: return blocks(type, in, n_elements, out, block_q6_k);
    case TensorType::i32:
    case TensorType::i64:
    case TensorType::u8: break;
  }
  fail("dequantize: expected a floating-point or quantised type, found {}", tensor_type_name(type));
}

}  // namespace kvlapse
