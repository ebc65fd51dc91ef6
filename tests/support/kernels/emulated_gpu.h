// A DeviceApi without a GPU: device memory is host memory, a launch runs the kernels' own text in the
// emulator of emulated_device.h, block after block. One queue runs at once; several as late as they may, so
// that a missing wait between them shows.
#pragma once

#include <memory>

#include "kernels/gpu/device_api.h"

namespace kvlapse {

// Counts of what was asked for, by the last device made.
struct EmulatedGpuCounts {
  int graphs_captured = 0;  // keys seen
  int graphs_run = 0;
  int downloads = 0;
  int64_t repairs = 0;  // rows that a replay's outputs left to the next kernel
};

std::unique_ptr<DeviceApi> make_emulated_gpu(EmulatedGpuCounts* counts = nullptr,
                                             DeviceApi::Limits limits = {200000, true, 64});

}  // namespace kvlapse
