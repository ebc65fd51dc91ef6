#include "cli/data_path.h"

#include <algorithm>

#include "core/base/error.h"

namespace kvlapse::cli {

namespace fs = std::filesystem;

std::vector<fs::path> data_paths(std::string_view installed, std::string_view in_source) {
  std::error_code error;
  const fs::path program = fs::canonical("/proc/self/exe", error);
  if (error) return {};
  const fs::path folder = program.parent_path();
  return {folder.parent_path() / "share" / "kvlapse" / installed,
          folder.parent_path().parent_path() / in_source};
}

fs::path find_gpu_profile(const std::string& name) {
  if (fs::is_regular_file(name)) return name;
  std::vector<std::string> known;
  for (const fs::path& root : data_paths("gpus", "replay/gpus")) {
    if (!fs::is_directory(root)) continue;
    if (fs::is_regular_file(root / (name + ".json"))) return root / (name + ".json");
    for (const auto& entry : fs::directory_iterator(root)) known.push_back(entry.path().stem().string());
  }
  std::sort(known.begin(), known.end());
  known.erase(std::unique(known.begin(), known.end()), known.end());
  std::string text;
  for (const std::string& k : known) text += (text.empty() ? "" : ", ") + k;
  fail("GPU profile '{}': expected a file or one of {}, found neither", name, text.empty() ? "(none)" : text);
}

}  // namespace kvlapse::cli
