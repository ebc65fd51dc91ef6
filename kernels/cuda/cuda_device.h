// DeviceApi over CUDA: one device, one stream, the exact kernels, steps kept as CUDA graphs. One thread.
#pragma once

#include <memory>
#include <string>

#include "kernels/gpu/device_api.h"

namespace kvlapse {

// Makes GPU `index` current. Throws Error in one line: no driver, no such GPU, no kernels for it in this
// build.
void use_gpu(int index);
std::string current_gpu_name();  // as the driver calls it
std::unique_ptr<DeviceApi> make_cuda_device(int index);

}  // namespace kvlapse
