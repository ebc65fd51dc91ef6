// Model: everything that a model folder or file holds: description, weights, tokenizer. Immutable after
// loading.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

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

// A GGUF file, a Hugging Face folder (config.json, safetensors), or a folder with one GGUF file and no
// config.json. Throws Error with file, field, expected and found.
Model load_model(const std::filesystem::path& path);

// The same without reading weights: what `load_model` would build them from.
struct ModelFiles {
  std::filesystem::path path;
  std::string format;  // "GGUF v3", "Hugging Face"
  ModelSpec spec;
  std::vector<std::shared_ptr<const TensorFile>> tensors;  // empty: a folder without weights
  std::function<std::string(TensorRole, int layer)> tensor_name;
  std::unique_ptr<Tokenizer> tokenizer;
};
ModelFiles open_model_files(const std::filesystem::path& path);

}  // namespace kvlapse
