// Files that come with the program: <prefix>/share/kvlapse/<installed> of an installed tree,
// <source>/<in_source> of a source tree whose program lies in build/<preset>/.
#pragma once

#include <filesystem>
#include <string_view>
#include <vector>

namespace kvlapse::cli {

std::vector<std::filesystem::path> data_paths(std::string_view installed, std::string_view in_source);
// The profile of that name (h200) among replay/gpus/, or the file itself. Throws Error that names what there
// is.
std::filesystem::path find_gpu_profile(const std::string& name);

}  // namespace kvlapse::cli
