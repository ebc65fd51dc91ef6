#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/rkv.h"
// After the operations that it is written in.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

// 16-bit rows: 512 threads a multiprocessor in blocks of any size, 128 registers each.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(device::RkvElement<Element>::kBytes == 4 ? kRkvThreads / 2 : kRkvThreads, 1)
    rkv_device_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  device::RkvRows<kHeadDim, Element>(args, shared).run();
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
