// Storage types of weights: plain floats and GGUF's quantised blocks (layouts: ggml). Names as files give
// them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvlapse {

enum class TensorType : uint8_t {
  f32,
  f16,
  bf16,
  q8_0,
  q4_0,
  q4_1,
  q5_0,
  q5_1,
  q4_k,
  q5_k,
  q6_k,
  i32,
  i64,
  u8
};

std::string_view tensor_type_name(TensorType type);
int block_elements(TensorType type);  // elements in one block: 1, 32 or 256
size_t block_bytes(TensorType type);  // bytes of one block

}  // namespace kvlapse
