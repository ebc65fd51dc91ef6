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
  if (const std::filesystem::path tokenizer = path / "tokenizer.json"; std::filesystem::exists(tokenizer)) {
    model.tokenizer = open_tokenizer_json(tokenizer);
    if (model.tokenizer->n_vocab() > model.spec.n_vocab)
      fail("{}: vocabulary: expected at most {} tokens (rows of the embedding), found {}", tokenizer.string(),
           model.spec.n_vocab, model.tokenizer->n_vocab());
  }
  return model;
}

}  // namespace kvlapse
