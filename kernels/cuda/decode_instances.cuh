// The __global__ entry of the decode kernel and its table of instances. Everything but head_dim, element
// type, the copy path, whether slots are left out (a pass more, so other registers) and whether a layer's
// heads may share a victim (a quarter of the code, and short steps wait for code) is a run-time value.
#pragma once

#include "core/base/dtype.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/device_ops.cuh"
// After the operations that it is written in.
#include "kernels/cuda/decode_kernel.cuh"

namespace kvlapse {

template <int kHeadDim, class Element, bool kBulk, bool kLeaveOneOut, bool kShares>
using DecodeInstance = device::DecodeTraits<kHeadDim, Element, kBulk, kLeaveOneOut, kShares>;

template <class Traits>
__global__ void __launch_bounds__(Traits::kThreads, 1)
    decode_step_kernel(const __grid_constant__ CudaDecodeArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  device::DecodeCta<Traits, CudaDecodeArgs>(args, shared).run();
}

template <class Element, bool kBulk, bool kLeaveOneOut, bool kShares>
DecodeKernelFunction decode_kernel_of(int head_dim) {
  switch (head_dim) {
    case 32: return decode_step_kernel<DecodeInstance<32, Element, kBulk, kLeaveOneOut, kShares>>;
    case 64: return decode_step_kernel<DecodeInstance<64, Element, kBulk, kLeaveOneOut, kShares>>;
    case 128: return decode_step_kernel<DecodeInstance<128, Element, kBulk, kLeaveOneOut, kShares>>;
    case 256: return decode_step_kernel<DecodeInstance<256, Element, kBulk, kLeaveOneOut, kShares>>;
    default: return nullptr;
  }
}
template <class Element, bool kBulk>
DecodeKernelFunction decode_kernel_of(int head_dim, bool shares) {
  return shares ? decode_kernel_of<Element, kBulk, false, true>(head_dim)
                : decode_kernel_of<Element, kBulk, false, false>(head_dim);
}

template <bool kBulk>
DecodeKernelFunction decode_kernel_of(int head_dim, DType dtype, bool shares) {
  if (dtype == DType::f16) return decode_kernel_of<device::F16, kBulk>(head_dim, shares);
  if (dtype == DType::bf16) return decode_kernel_of<device::Bf16, kBulk>(head_dim, shares);
  return nullptr;
}

// One instance serves both: the third pass takes longer than what sharing adds.
template <bool kBulk>
DecodeKernelFunction leave_one_out_kernel_of(int head_dim, DType dtype) {
  if (dtype == DType::f16) return decode_kernel_of<device::F16, kBulk, true, true>(head_dim);
  if (dtype == DType::bf16) return decode_kernel_of<device::Bf16, kBulk, true, true>(head_dim);
  if (dtype == DType::f8e4m3) return decode_kernel_of<device::E4m3, kBulk, true, true>(head_dim);
  return nullptr;
}

}  // namespace kvlapse
