#include "core/model/model.h"

#include "core/base/error.h"
#include "core/model/model_config.h"

namespace kvlapse {

Model load_model(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path))
    fail("model '{}': expected a folder with config.json and model.safetensors, found {}", path.string(),
         std::filesystem::exists(path) ? "a file" : "nothing");
  Model model;
  model.path = path;
  model.spec = read_model_config(path);
  model.weights = load_weights(model.spec, {open_safetensors(path / "model.safetensors")}, huggingface_name);
  return model;
}

}  // namespace kvlapse
