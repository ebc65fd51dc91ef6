#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/rkv.h"
// After the operations that it is written in.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

// Three blocks a multiprocessor, which is what shared memory holds of 16-bit keys of 128.
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvThreads, device::RkvElement<Element>::kBytes == 4 ? 1 : 3)
    rkv_rows_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  device::RkvRows<kHeadDim, Element>(args, shared).run();
}
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvSelectThreads) rkv_select_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  device::RkvSelect<kHeadDim, Element>(args, shared).run();
}

template <class Element>
RkvKernels kernels_of(int head_dim) {
  switch (head_dim) {
    case 32: return {rkv_rows_kernel<32, Element>, rkv_select_kernel<32, Element>};
    case 64: return {rkv_rows_kernel<64, Element>, rkv_select_kernel<64, Element>};
    default: return {rkv_rows_kernel<128, Element>, rkv_select_kernel<128, Element>};
  }
}

}  // namespace

RkvKernels rkv_kernels(int head_dim, DType dtype) {
  if (dtype == DType::f32) return kernels_of<device::F32>(head_dim);
  if (dtype == DType::f16) return kernels_of<device::F16>(head_dim);
  return kernels_of<device::Bf16>(head_dim);
}

}  // namespace kvlapse
