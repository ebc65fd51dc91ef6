// The product chain's entry: the copy engine, so sm_90 only.
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/fast_args.h"
// After the operations that it is written in.
#include "kernels/cuda/chain_kernel.cuh"

namespace kvlapse {
namespace {

// At most half of the registers, as it was measured.
__global__ void __launch_bounds__(kChainThreads, 2)
    product_chain_kernel(const __grid_constant__ ChainArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  device::ProductChain(args, shared).run();
}

}  // namespace

void launch_product_chain(cudaStream_t stream, const ChainArgs& args, int smem_bytes, int n_multiprocessors,
                          LaunchLog* log) {
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(product_chain_kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, smem_bytes));
  LaunchShape shape;
  shape.n_blocks = n_multiprocessors;
  shape.n_threads = kChainThreads;
  shape.smem_bytes = smem_bytes;
  shape.dependent = true;
  launch_kernel(stream, {"product_chain", chain_bytes(args), log}, shape, product_chain_kernel, args);
}

}  // namespace kvlapse
