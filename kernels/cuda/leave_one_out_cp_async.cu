// Decode kernel that scores the error of leaving a slot out, by cp.async and exchange through memory: built
// for sm_80 and sm_90.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction leave_one_out_kernel_cp_async(int head_dim, DType dtype) {
  return leave_one_out_kernel_of<false>(head_dim, dtype);
}

}  // namespace kvlapse
