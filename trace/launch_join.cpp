#include "trace/launch_join.h"

#include <algorithm>
#include <string_view>
#include <vector>

namespace kvlapse {
namespace {

// Whether launches of this name answer to kernels of that one; asked over and over with few different pairs.
class Matches {
 public:
  explicit Matches(std::span<const LaunchRecord> launches) {
    for (const LaunchRecord& launch : launches)
      if (!launch.foreign && std::find(ours_.begin(), ours_.end(), launch.name) == ours_.end())
        ours_.push_back(launch.name);
  }
  bool is_ours(const GpuKernel& kernel) { return kind_of(kernel) >= 0; }
  bool answers(const GpuKernel& kernel, const LaunchRecord& launch) {
    const int kind = kind_of(kernel);
    return launch.foreign ? kind < 0
                          : kind >= 0 && (ours_[static_cast<size_t>(kind)] == launch.name ||
                                          kernel.mangled_name.find(launch.name) != std::string_view::npos);
  }

 private:
  struct Known {
    const char* name;
    int kind;
  };
  // The first of our names that the kernel's holds, -1: none. Names are interned, so that an address tells
  // them apart.
  int kind_of(const GpuKernel& kernel) {
    for (const Known& known : known_)
      if (known.name == kernel.mangled_name.data()) return known.kind;
    int kind = -1;
    for (size_t i = 0; i < ours_.size() && kind < 0; ++i)
      if (kernel.mangled_name.find(ours_[i]) != std::string_view::npos) kind = static_cast<int>(i);
    known_.push_back({kernel.mangled_name.data(), kind});
    return kind;
  }
  std::vector<std::string_view> ours_;
  std::vector<Known> known_;
};

}  // namespace

int join_launches(std::span<GpuKernel*> kernels, std::span<const LaunchRecord> launches) {
  Matches matches(launches);
  int joined = 0;
  size_t next = 0;
  for (GpuKernel* kernel : kernels) {
    // A launch that left no record (dropped) must not shift those behind it.
    size_t at = next;
    while (at < launches.size() && !matches.answers(*kernel, launches[at])) ++at;
    const bool follows = next > 0 && launches[next - 1].foreign && !matches.is_ours(*kernel);
    if (at < launches.size() && !(follows && at > next)) {
      kernel->launch = launches[at];
      next = at + 1;
    } else if (follows) {
      kernel->launch = launches[next - 1];
      kernel->launch->expected_bytes = 0;
    } else {
      continue;
    }
    ++joined;
  }
  return joined;
}

}  // namespace kvlapse
