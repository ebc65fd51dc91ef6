// Decode kernel with cp.async and exchange through memory: built for sm_80 and, to be tested there, for
// sm_90.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction decode_kernel_cp_async(int head_dim, DType dtype, bool shares) {
  return decode_kernel_of<false>(head_dim, dtype, shares);
}

}  // namespace kvlapse
