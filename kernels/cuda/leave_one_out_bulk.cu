// Decode kernel that scores the error of leaving a slot out, with the copy engine and clusters: built for
// sm_90 only.
#include "kernels/cuda/decode_instances.cuh"

namespace kvlapse {

DecodeKernelFunction leave_one_out_kernel_bulk(int head_dim, DType dtype) {
  return leave_one_out_kernel_of<true>(head_dim, dtype);
}

}  // namespace kvlapse
