// Decode kernel with the copy engine and clusters: built for sm_90 only.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction decode_kernel_bulk(int head_dim, DType dtype, bool shares) {
  return decode_kernel_of<true>(head_dim, dtype, shares);
}

}  // namespace kvlapse
