// The __global__ entry of the decode kernel and its table of instances. Everything but head_dim, element
// type, the copy path and whether slots are left out (a pass more, so other registers) is a run-time value.
#pragma once

#include "core/base/dtype.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/device_ops.cuh"
// After the operations that it is written in.
#include "kernels/cuda/decode_kernel.cuh"

namespace kvlapse {

template <int kHeadDim, class Element, bool kBulk, bool kLeaveOneOut>
__global__ void __launch_bounds__(device::DecodeTraits<kHeadDim, Element, kBulk, kLeaveOneOut>::kThreads, 1)
    decode_step_kernel(const __grid_constant__ CudaDecodeArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  using Traits = device::DecodeTraits<kHeadDim, Element, kBulk, kLeaveOneOut>;
  device::DecodeCta<Traits, CudaDecodeArgs>(args, shared).run();
}

template <class Element, bool kBulk, bool kLeaveOneOut = false>
DecodeKernelFunction decode_kernel_of(int head_dim) {
  switch (head_dim) {
    case 32: return decode_step_kernel<32, Element, kBulk, kLeaveOneOut>;
    case 64: return decode_step_kernel<64, Element, kBulk, kLeaveOneOut>;
    case 128: return decode_step_kernel<128, Element, kBulk, kLeaveOneOut>;
    case 256: return decode_step_kernel<256, Element, kBulk, kLeaveOneOut>;
    default: return nullptr;
  }
}

template <bool kBulk>
DecodeKernelFunction decode_kernel_of(int head_dim, DType dtype) {
  if (dtype == DType::f16) return decode_kernel_of<device::F16, kBulk>(head_dim);
  if (dtype == DType::bf16) return decode_kernel_of<device::Bf16, kBulk>(head_dim);
  return nullptr;
}

template <bool kBulk>
DecodeKernelFunction leave_one_out_kernel_of(int head_dim, DType dtype) {
  if (dtype == DType::f16) return decode_kernel_of<device::F16, kBulk, true>(head_dim);
  if (dtype == DType::bf16) return decode_kernel_of<device::Bf16, kBulk, true>(head_dim);
  if (dtype == DType::f8e4m3) return decode_kernel_of<device::E4m3, kBulk, true>(head_dim);
  return nullptr;
}

}  // namespace kvlapse
