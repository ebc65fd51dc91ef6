// Finds a model by what the user wrote: a folder, a file, or the name of a folder under models/ (the built-in
// model, or one that `make models` fetched).
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

namespace kvlapse::cli {

inline constexpr std::string_view kBuiltinModel = "reasoner-6m";

// Folders that hold models: $KVLAPSE_MODELS, the installation's share folder, the source tree's models/.
std::vector<std::filesystem::path> model_roots();
// Empty name: the built-in model. Throws Error naming what was looked for and where.
std::filesystem::path find_model(const std::string& name);

// XXH3-128 over the weights of a model file or folder, in the order of their names: what a trace says it was
// made with.
std::string model_content_hash(const std::filesystem::path& model);

}  // namespace kvlapse::cli
