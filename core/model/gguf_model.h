// What a GGUF file says about its model: metadata to ModelSpec, and the names of its tensors. Architectures
// llama, qwen2 and qwen3; anything else, and any tensor that would be ignored, is refused by name. Pure
// functions.
#pragma once

#include <string>

#include "core/model/gguf_file.h"
#include "core/model/model_spec.h"
#include "core/model/model_weights.h"

namespace kvlapse {

ModelSpec read_gguf_model(const GgufFile& file);

// "blk.3.attn_q.weight".
std::string gguf_name(TensorRole role, int layer);

}  // namespace kvlapse
