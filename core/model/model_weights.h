// Weights: a model's tensors, found by role, checked (shape, type, no NaN) and handed out as the operations
// read them. Matrices stay in the mapped file in its type. Immutable after loading.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/model/model_spec.h"
#include "core/model/tensor_file.h"
#include "core/ops/weights.h"

namespace kvlapse {

// What a tensor is for, whatever a format calls it.
enum class TensorRole : uint8_t {
  embedding,
  head,
  final_norm,
  input_norm,
  ffn_norm,
  q,
  k,
  v,
  o,
  q_bias,
  k_bias,
  v_bias,
  q_norm,
  k_norm,
  gate,
  up,
  down,
};

struct Weights {
  TransformerWeights transformer;
  std::vector<std::shared_ptr<const TensorFile>> files;  // what the matrices point into
  std::vector<std::unique_ptr<std::byte[]>> owned;       // matrices that had to be rearranged
  std::string hash;  // XXH3-128 of every tensor's bytes in role order, hexadecimal
};

// Name of a role in a Hugging Face checkpoint: "model.layers.3.self_attn.q_proj.weight".
std::string huggingface_name(TensorRole role, int layer);

// Builds the weights of `spec` from the files. `name` maps a role to the files' tensor name. Throws Error
// naming file, tensor, expected and found: missing, wrong shape, type that cannot be multiplied, NaN (with
// its index).
Weights load_weights(const ModelSpec& spec, std::vector<std::shared_ptr<const TensorFile>> files,
                     const std::function<std::string(TensorRole, int layer)>& name);

}  // namespace kvlapse
