// The fused decode step on a CUDA device: plan once, launch every step. Contract of a step:
// kernels/decode/decode_args.h. Owner of nothing: buffers are the caller's. A DecodeKernel may be used from
// one thread per stream.
#pragma once

#include <cuda.h>

#include "kernels/cuda/launch.h"
#include "kernels/decode/decode_args.h"
#include "kernels/decode/decode_plan.h"

namespace kvlapse {

using CudaDecodeArgs = DecodeArgs<CUtensorMap>;

enum class DecodePath : uint8_t { best, bulk, cp_async };  // best: bulk from sm_90 on

class DecodeKernel {
 public:
  // Of the current device. Throws Error when the shape is not supported or no kernel for the device is built
  // in.
  explicit DecodeKernel(const DecodeShape& shape, DecodePath path = DecodePath::best,
                        const DecodeTuning& tuning = {});

  const DecodeShape& shape() const { return shape_; }
  const DecodePlan& plan() const { return plan_; }
  // Scratch that DecodeArgs::split_* need; zero floats when n_splits is 1 or the path has clusters.
  size_t split_softmax_floats() const;
  size_t split_output_floats() const;

  // Arguments for planes of K and V, with everything that follows from shape and plan set: sizes, maps,
  // scales. The score leave_one_out and DecodeShape::leave_one_out go together.
  CudaDecodeArgs arguments(void* k, void* v, FusedScore score, bool shared) const;
  // Checks that the pointers which the score needs are there.
  void launch(cudaStream_t stream, const CudaDecodeArgs& args, LaunchLog* log = nullptr) const;

 private:
  DecodeShape shape_;
  DecodePlan plan_;
  void (*kernels_[2])(CudaDecodeArgs) = {};  // the second where a layer's heads share their victim
};

// Kernels by head_dim, element type and whether a layer's heads share a victim; null when not built. Every
// translation unit has the targets that it is for.
using DecodeKernelFunction = void (*)(CudaDecodeArgs);
DecodeKernelFunction decode_kernel_bulk(int head_dim, DType dtype, bool shares);
DecodeKernelFunction decode_kernel_cp_async(int head_dim, DType dtype, bool shares);
DecodeKernelFunction decode_kernel_fp8_bulk(int head_dim, bool shares);
DecodeKernelFunction decode_kernel_fp8_cp_async(int head_dim, bool shares);
DecodeKernelFunction leave_one_out_kernel_bulk(int head_dim, DType dtype);  // fp8 as well
DecodeKernelFunction leave_one_out_kernel_cp_async(int head_dim, DType dtype);

}  // namespace kvlapse
