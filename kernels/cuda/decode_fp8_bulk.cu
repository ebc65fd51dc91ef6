// Decode kernel over fp8 K and V with the copy engine and clusters: built for sm_90 only.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction decode_kernel_fp8_bulk(int head_dim, bool shares) {
  return decode_kernel_of<device::E4m3, true>(head_dim, shares);
}

}  // namespace kvlapse
