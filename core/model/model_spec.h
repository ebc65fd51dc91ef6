// ModelSpec: what a decoder-only transformer is, whichever file described it (config.json or GGUF metadata).
// An architecture, layer kind or option that the engine does not compute is refused by field name and value.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "core/cache/geometry.h"

namespace kvlapse {

enum class Architecture : uint8_t { llama, qwen2, qwen3 };
enum class LayerKind : uint8_t { full };  // sliding, linear and MLA layers are refused when the file is read

struct LayerSpec {
  LayerKind kind = LayerKind::full;
  int n_q_heads = 0, n_kv_heads = 0, head_dim = 0;
};

struct RopeSpec {
  enum class Scaling : uint8_t { none, linear, llama3, yarn };
  double theta = 10000;
  Scaling scaling = Scaling::none;
  double factor = 1;
  double low_freq_factor = 1, high_freq_factor = 4;  // llama3
  double beta_fast = 32, beta_slow = 1;              // yarn
  double attention_factor = 0;                       // yarn; 0: 0.1 ln(factor) + 1
  int original_context = 0;                          // llama3, yarn
  std::vector<float> frequency_divisors;  // [D/2] or empty: a scaling that a file gives as its result
};

struct ModelSpec {
  Architecture architecture = Architecture::qwen3;
  std::string name;  // for people: folder or file name
  int n_vocab = 0, width = 0, ffn_width = 0, n_layers = 0, context = 0;
  LayerSpec layer;  // all layers alike
  float norm_eps = 1e-6f;
  RopeSpec rope;
  bool tied_embeddings = false;
  bool qkv_bias = false;  // Qwen2
  bool qk_norm = false;   // Qwen3
  // GGUF orders the rows of q and k for interleaved RoPE in `llama` files; the loader hands out half-split
  // rows.
  bool interleaved_rope_rows = false;
  std::vector<int32_t> eos_ids;
  std::string chat_template;  // Jinja source, empty when the model has none

  CacheGeometry cache_geometry(int n_slots, DType dtype) const {
    return {n_layers, layer.n_q_heads, layer.n_kv_heads, layer.head_dim, n_slots, dtype};
  }
};

}  // namespace kvlapse
