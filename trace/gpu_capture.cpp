#include "trace/gpu_capture.h"

#include "core/base/error.h"

namespace kvlapse {
namespace {
constexpr std::string_view kNames[] = {"none", "activity", "dram", "kernels"};
}

std::string_view counters_name(GpuCounters counters) {
  return kNames[static_cast<int>(counters)];
}

GpuCounters parse_counters(std::string_view name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i)
    if (kNames[i] == name) return static_cast<GpuCounters>(i);
  fail_usage("counters: expected none, activity, dram or kernels, found '{}'", name);
}

}  // namespace kvlapse
