#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/rkv.h"
// After the operations that it is written in.
#include "kernels/cuda/rkv_kernels.cuh"

namespace kvlapse {
namespace {

template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvThreads) rkv_measure_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  device::RkvRows<kHeadDim, Element>(args, shared).measure();
}
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvThreads) rkv_similar_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  device::RkvRows<kHeadDim, Element>(args, shared).similar();
}
template <int kHeadDim, class Element>
__global__ void __launch_bounds__(kRkvSelectThreads) rkv_select_kernel(const __grid_constant__ RkvArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  device::RkvSelect<kHeadDim, Element>(args, shared).run();
}

template <class Element>
RkvKernels kernels_of(int head_dim) {
  switch (head_dim) {
    case 32:
      return {rkv_measure_kernel<32, Element>, rkv_similar_kernel<32, Element>,
              rkv_select_kernel<32, Element>};
    case 64:
      return {rkv_measure_kernel<64, Element>, rkv_similar_kernel<64, Element>,
              rkv_select_kernel<64, Element>};
    default:
      return {rkv_measure_kernel<128, Element>, rkv_similar_kernel<128, Element>,
              rkv_select_kernel<128, Element>};
  }
}

}  // namespace

RkvKernels rkv_kernels(int head_dim, DType dtype) {
  if (dtype == DType::f32) return kernels_of<device::F32>(head_dim);
  if (dtype == DType::f16) return kernels_of<device::F16>(head_dim);
  return kernels_of<device::Bf16>(head_dim);
}

}  // namespace kvlapse
