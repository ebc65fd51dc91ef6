// The numbers of a transformer as the operations read them: matrices in the type of their file (mapped, never
// copied), vectors in fp32. Views: whoever loaded them keeps the memory. Immutable and thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "core/base/tensor_type.h"
#include "core/ops/rope.h"

namespace kvlapse {

// [rows, columns], rows contiguous: y = W x.
struct Matrix {
  TensorType type = TensorType::f32;
  int64_t rows = 0, columns = 0;
  const std::byte* data = nullptr;

  size_t row_bytes() const { return static_cast<size_t>(columns) / block_elements(type) * block_bytes(type); }
  size_t bytes() const { return row_bytes() * rows; }
  const std::byte* row(int64_t r) const { return data + row_bytes() * r; }
};

struct LayerWeights {
  std::vector<float> input_norm, ffn_norm;    // [width]
  std::vector<float> q_norm, k_norm;          // [D], empty without QK-norm
  std::vector<float> q_bias, k_bias, v_bias;  // [rows], empty without
  Matrix q, k, v, o;                          // [Hq D, width], [H D, width] twice, [width, Hq D]
  Matrix gate, up, down;                      // [ffn, width] twice, [width, ffn]
};

struct TransformerWeights {
  int n_vocab = 0, width = 0, ffn_width = 0;
  int n_q_heads = 0, n_kv_heads = 0, head_dim = 0;
  float norm_eps = 1e-6f;
  RopeTable rope;
  Matrix embedding, head;  // [V, width]; the same data when tied
  std::vector<float> final_norm;
  std::vector<LayerWeights> layers;

  uint64_t bytes() const;  // of all matrices, a tied head once
};

}  // namespace kvlapse
