// config.json of a Hugging Face folder as a ModelSpec. What the engine does not compute is refused by field
// and value, so that a model never runs as something that it is not.
#pragma once

#include <filesystem>

#include "core/model/model_spec.h"
#include "core/ops/rope.h"

namespace kvlapse {

// Reads config.json and, when present, generation_config.json (further end-of-text ids). Throws Error with
// file, field, expected and found.
ModelSpec read_model_config(const std::filesystem::path& folder);

// Inverse frequencies and the attention factor of a RopeSpec, in the arithmetic of transformers (fp32 from
// fp64 powers). Sources: transformers modeling_rope_utils; Llama 3.1 (llama3), arXiv 2309.00071 (yarn).
RopeTable rope_table(const RopeSpec& spec, int head_dim);

}  // namespace kvlapse
