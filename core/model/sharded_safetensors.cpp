// A checkpoint over several safetensors files: model.safetensors.index.json maps tensor names to files.
#include <map>
#include <set>

#include "core/base/error.h"
#include "core/model/json_document.h"
#include "core/model/tensor_file.h"

namespace kvlapse {

std::vector<std::shared_ptr<const TensorFile>> open_checkpoint_files(const std::filesystem::path& folder) {
  const std::filesystem::path index_path = folder / "model.safetensors.index.json";
  if (!std::filesystem::exists(index_path)) return {open_safetensors(folder / "model.safetensors")};

  JsonDocument index(index_path);
  JsonNode map = index.root().get("weight_map");
  if (!map.value().is_object()) map.refuse("an object of tensor names and files");
  std::map<std::string, std::shared_ptr<const TensorFile>> files;
  for (const auto& [tensor, file] : map.value().items()) {
    JsonNode node(file, fmt::format("{}: weight_map '{}'", index_path.string(), tensor));
    const std::string& name = node.as_string();
    // A file beside the index: the index must not lead out of its folder.
    if (name.empty() || name.find('/') != std::string::npos || name == "..")
      node.refuse("the name of a file");
    auto& open = files[name];
    if (!open) open = open_safetensors(folder / name);
    if (!open->find(tensor))
      fail("{}: tensor '{}': expected in {}, found none", index_path.string(), tensor, open->describe());
  }
  if (files.empty()) fail("{}: weight_map: expected tensors, found none", index_path.string());
  std::vector<std::shared_ptr<const TensorFile>> all;
  for (auto& [name, file] : files) all.push_back(std::move(file));
  return all;
}

}  // namespace kvlapse
