#include "kernels/cuda/rkv.h"
#include "kernels/cuda/rkv_ops.cuh"
// After the operations that it is written in.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

// Two blocks a multiprocessor; rows of fp32 take the registers of both.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvThreads, device::RkvElement<Element>::kBytes == 4 ? 1 : 2)
    rkv_device_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  device::RkvHead<kHeadDim, Element>(args, shared).run();
}

template <class Element>
RkvKernel kernel_of(int head_dim) {
  switch (head_dim) {
    case 32: return rkv_device_kernel<32, Element>;
    case 64: return rkv_device_kernel<64, Element>;
    default: return rkv_device_kernel<128, Element>;
  }
}

}  // namespace

RkvKernel rkv_kernel(int head_dim, DType dtype) {
  if (dtype == DType::f32) return kernel_of<device::F32>(head_dim);
  if (dtype == DType::f16) return kernel_of<device::F16>(head_dim);
  return kernel_of<device::Bf16>(head_dim);
}

}  // namespace kvlapse
