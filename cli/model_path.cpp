#include "cli/model_path.h"

#include <cstdlib>

#include "core/base/error.h"

namespace kvlapse::cli {

namespace fs = std::filesystem;

std::vector<fs::path> model_roots() {
  std::vector<fs::path> roots;
  if (const char* set = std::getenv("KVLAPSE_MODELS")) roots.emplace_back(set);
  std::error_code error;
  fs::path program = fs::canonical("/proc/self/exe", error);
  if (error) return roots;
  fs::path folder = program.parent_path();
  // <prefix>/bin/kvlapse, and build/<preset>/kvlapse of a source tree.
  roots.push_back(folder.parent_path() / "share" / "kvlapse" / "models");
  roots.push_back(folder.parent_path().parent_path() / "models");
  return roots;
}

namespace {

// A folder of models/ holds config.json, or exactly one GGUF file.
fs::path model_in(const fs::path& folder) {
  if (fs::exists(folder / "config.json")) return folder;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".gguf") return entry.path();
  return {};
}

}  // namespace

fs::path find_model(const std::string& name) {
  const std::string wanted = name.empty() ? std::string(kBuiltinModel) : name;
  if (!name.empty() && fs::exists(wanted)) return wanted;
  std::string searched;
  for (const fs::path& root : model_roots()) {
    if (fs::is_directory(root / wanted))
      if (fs::path found = model_in(root / wanted); !found.empty()) return found;
    searched += (searched.empty() ? "" : ", ") + root.string();
  }
  fail("model '{}': no such file or folder, and no model of that name in {} (`make models` fetches smollm2)",
       wanted, searched);
}

}  // namespace kvlapse::cli
