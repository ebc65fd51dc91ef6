// A decode problem in device memory.
#pragma once

#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/device_memory.h"
#include "tests/support/kernels/decode_problem.h"

namespace kvlapse {

bool gpu_present();
// A test that needs a GPU calls this first.
#define KVLAPSE_NEEDS_GPU() \
  if (!::kvlapse::gpu_present()) GTEST_SKIP() << "no GPU"

class GpuDecode {
 public:
  GpuDecode(const DecodeKernel& kernel, const DecodeProblem& problem);
  void launch(cudaStream_t stream, bool early_state = false, LaunchLog* log = nullptr) const;
  void upload_token(const DecodeProblem& problem);  // q, k_new, v_new
  void download(DecodeProblem& problem) const;      // all that a step changes
  int32_t* step_pos() const { return step_pos_.data(); }

 private:
  const DecodeKernel& kernel_;
  DeviceBuffer<uint16_t> q_, k_new_, v_new_, k_, v_, out_;
  DeviceBuffer<float> k_scale_, v_scale_, value_l1_, accumulated_, importance_, split_softmax_, split_output_;
  DeviceBuffer<uint16_t> protect_;
  DeviceBuffer<int32_t> recent_slots_, positions_, count_, step_pos_;
  DeviceBuffer<uint64_t> victim_keys_;
  DeviceBuffer<uint32_t> arrivals_, flags_, split_barrier_;
  CudaDecodeArgs args_;
};

}  // namespace kvlapse
