// GpuReplay: ReplayDevice over a DeviceApi. Rows go to the device in blocks of steps while it works on the
// blocks before; weights of two blocks, H x T x lanes for each step, in fp32 and in half precision, are the
// only large thing it keeps beside K, V and the answers. Victims have the bits of the CPU's replay
// (kernels/gpu/replay_kernels.cuh); masses are sums in another order (1e-6), outputs are products of half
// precision summed in fp32: errors are within 1e-3 of the CPU's, relatively. Buffers stay for the next run.
#pragma once

#include <map>

#include "core/engine/replay_device.h"
#include "kernels/gpu/device_api.h"

namespace kvlapse {

class GpuReplay final : public ReplayDevice {
 public:
  // `block_bytes` of fp32 weights of a block of steps; three times that is allocated.
  explicit GpuReplay(std::unique_ptr<DeviceApi> api, size_t block_bytes = size_t{1} << 30);
  ~GpuReplay() override;
  std::string describe() const override { return api_->describe(); }
  void run(DeviceReplay& replay) override;

 private:
  struct Run;
  // Device (or pinned host) memory of at least that size under this name; what is in it is kept while it
  // suffices.
  void* device(const std::string& name, size_t bytes);
  void* host(const std::string& name, size_t bytes);

  std::unique_ptr<DeviceApi> api_;
  size_t block_bytes_;
  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;
  };
  std::map<std::string, Buffer> device_, host_;
};

}  // namespace kvlapse
