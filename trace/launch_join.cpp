#include "trace/launch_join.h"

#include <algorithm>

namespace kvlapse {

int join_launches(std::span<GpuKernel*> kernels, std::span<const LaunchRecord> launches) {
  const auto is_ours = [&](const GpuKernel& kernel) {
    return std::any_of(launches.begin(), launches.end(), [&](const LaunchRecord& l) {
      return !l.foreign && kernel.mangled_name.find(l.name) != std::string::npos;
    });
  };
  const auto answers = [&](const GpuKernel& kernel, const LaunchRecord& launch) {
    return launch.foreign ? !is_ours(kernel) : kernel.mangled_name.find(launch.name) != std::string::npos;
  };
  int joined = 0;
  size_t next = 0;
  for (GpuKernel* kernel : kernels) {
    // A launch that left no record (dropped) must not shift those behind it.
    size_t at = next;
    while (at < launches.size() && !answers(*kernel, launches[at])) ++at;
    const bool follows = next > 0 && launches[next - 1].foreign && !is_ours(*kernel);
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
