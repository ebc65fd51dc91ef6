// Model: everything that a model folder or file holds: description, weights, tokenizer. Immutable after
// loading.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "core/model/model_spec.h"
#include "core/model/model_weights.h"
#include "core/model/tokenizer.h"

namespace kvlapse {

struct Model {
  std::filesystem::path path;
  ModelSpec spec;
  Weights weights;
  std::unique_ptr<Tokenizer> tokenizer;  // null when the folder has no tokenizer.json
};

// A Hugging Face folder. Throws Error with file, field, expected and found.
Model load_model(const std::filesystem::path& path);

}  // namespace kvlapse
