// An R-KV compaction on a CUDA device, any batch, no host involvement, capturable in a graph. Contract:
// kernels/decode/rkv_args.h. Owner of its scratch; one user at a time.
#pragma once

#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/launch.h"
#include "kernels/decode/rkv_args.h"

namespace kvlapse {

using RkvKernel = void (*)(RkvArgs);
RkvKernel rkv_kernel(int head_dim, DType dtype);  // of a supported shape

class RkvCompaction {
 public:
  // Of the current device. Throws Error when the shape is not supported or no kernel for it is built in.
  explicit RkvCompaction(const RkvShape& shape);

  const RkvShape& shape() const { return shape_; }
  // Scalars and scratch are set; the caller sets q, k, v, order, count and what it wants of the optional
  // ones.
  RkvArgs arguments() const;
  // One kernel; heads below the budget cost a look at their count.
  void launch(cudaStream_t stream, const RkvArgs& args, LaunchLog* log = nullptr) const;

 private:
  RkvShape shape_;
  RkvArgs scalars_{};
  DeviceBuffer<float> softmax_;
  RkvKernel kernel_ = nullptr;
  bool overlaps_ = false;  // it may be launched before the kernel in front of it ends
};

}  // namespace kvlapse
