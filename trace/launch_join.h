// Which launch of ours a recorded kernel answers to. Pure; the profiler gives kernels of a step, the backend
// its launches in order.
#pragma once

#include <span>
#include <vector>

#include "trace/gpu_records.h"

namespace kvlapse {

// `kernels` of one step by start time. A launch of ours is found by its name in the kernel's; a foreign one
// takes kernels that are not ours, and those that follow at once belong to it too, without bytes of their
// own. Kernels that nothing answers to keep an empty launch. Returns how many were joined.
int join_launches(std::span<GpuKernel*> kernels, std::span<const LaunchRecord> launches);

}  // namespace kvlapse
