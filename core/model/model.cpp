#include "core/model/model.h"

#include "core/base/error.h"
#include "core/model/chat_template.h"
#include "core/model/gguf_model.h"
#include "core/model/model_config.h"

namespace kvlapse {
namespace {

namespace fs = std::filesystem;

void check_vocabulary(const ModelFiles& model, bool padding_allowed) {
  if (!model.tokenizer) return;
  int tokens = model.tokenizer->n_vocab(), rows = model.spec.n_vocab;
  if (tokens > rows || (tokens < rows && !padding_allowed))
    fail("{}: vocabulary: expected {}{} tokens, one a row of the embedding, found {}", model.path.string(),
         padding_allowed ? "at most " : "", rows, tokens);
}

ModelFiles open_gguf(const fs::path& path) {
  auto file = std::make_shared<const GgufFile>(path);
  ModelFiles model;
  model.path = path;
  model.format = fmt::format("GGUF v{}", file->version());
  model.spec = read_gguf_model(*file);
  model.tokenizer = gguf_tokenizer(*file);
  model.tensors = {std::move(file)};
  model.tensor_name = gguf_name;
  check_vocabulary(model, false);
  return model;
}

ModelFiles open_folder(const fs::path& path) {
  ModelFiles model;
  model.path = path;
  model.format = "Hugging Face";
  model.spec = read_model_config(path);
  model.spec.chat_template = read_chat_template(path);
  if (fs::exists(path / "tokenizer.json")) model.tokenizer = open_tokenizer_json(path / "tokenizer.json");
  if (fs::exists(path / "model.safetensors") || fs::exists(path / "model.safetensors.index.json"))
    model.tensors = open_checkpoint_files(path);
  model.tensor_name = huggingface_name;
  check_vocabulary(model, true);  // Qwen's embeddings are longer than its vocabulary
  return model;
}

// The one GGUF file of a folder; empty when there is none.
fs::path gguf_in_folder(const fs::path& folder) {
  fs::path found;
  for (const auto& entry : fs::directory_iterator(folder)) {
    if (entry.path().extension() != ".gguf") continue;
    if (!found.empty())
      fail("model '{}': expected one GGUF file, found {} and {}: name the file", folder.string(),
           found.filename().string(), entry.path().filename().string());
    found = entry.path();
  }
  return found;
}

}  // namespace

ModelFiles open_model_files(const fs::path& path) {
  if (!fs::exists(path))
    fail("model '{}': expected a GGUF file or a folder with config.json, found nothing", path.string());
  if (!fs::is_directory(path)) return open_gguf(path);
  if (fs::exists(path / "config.json")) return open_folder(path);
  fs::path gguf = gguf_in_folder(path);
  if (gguf.empty())
    fail("model '{}': expected config.json or a GGUF file in the folder, found neither", path.string());
  return open_gguf(gguf);
}

Model load_model(const fs::path& path) {
  ModelFiles files = open_model_files(path);
  if (files.tensors.empty())
    fail("model '{}': expected model.safetensors or model.safetensors.index.json, found neither",
         path.string());
  Model model;
  model.path = std::move(files.path);
  model.weights = load_weights(files.spec, std::move(files.tensors), files.tensor_name);
  model.spec = std::move(files.spec);
  model.tokenizer = std::move(files.tokenizer);
  return model;
}

}  // namespace kvlapse
