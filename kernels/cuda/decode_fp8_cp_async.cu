// Decode kernel over fp8 K and V by cp.async: built for sm_80 and sm_90.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction decode_kernel_fp8_cp_async(int head_dim, bool shares) {
  return decode_kernel_of<device::E4m3, false>(head_dim, shares);
}

}  // namespace kvlapse
