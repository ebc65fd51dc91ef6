#include "cli/model_path.h"

#include <xxhash.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <memory>

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

std::string model_content_hash(const fs::path& model) {
  std::vector<fs::path> files;
  if (fs::is_regular_file(model)) {
    files.push_back(model);
  } else {
    for (const auto& entry : fs::directory_iterator(model))
      if (entry.path().extension() == ".safetensors") files.push_back(entry.path());
    std::sort(files.begin(), files.end());
  }
  std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(XXH3_createState(), XXH3_freeState);
  XXH3_128bits_reset(state.get());
  std::vector<char> block(1 << 20);
  for (const fs::path& file : files) {
    std::ifstream in(file, std::ios::binary);
    while (in.read(block.data(), static_cast<std::streamsize>(block.size())), in.gcount() > 0)
      XXH3_128bits_update(state.get(), block.data(), static_cast<size_t>(in.gcount()));
  }
  XXH128_hash_t hash = XXH3_128bits_digest(state.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace kvlapse::cli
