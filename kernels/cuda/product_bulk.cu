// The product's entries: the copy engine and clusters, so sm_90 only.
#include "kernels/cuda/device_ops.cuh"
#include "kernels/cuda/fast_args.h"
// After the operations that it is written in.
#include "kernels/cuda/product_kernel.cuh"

namespace kvlapse {
namespace {

template <int kGroups, int kSets, int kBlocks>
__global__ void __launch_bounds__(kProductThreads, 1)
    product_kernel(const __grid_constant__ ProductArgs args) {
  extern __shared__ __align__(128) unsigned char shared[];
  device::Product<kGroups, kSets, kBlocks>(args, shared).run();
}

void allow_smem(const void* kernel, int bytes) {
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

}  // namespace

ProductClusters product_clusters(int smem_bytes) {
  ProductClusters clusters;
  const auto kernel = reinterpret_cast<const void*>(product_kernel<3, 4, 4>);
  allow_smem(kernel, smem_bytes);
  for (int n : {1, 2}) clusters.of[n] = resident_clusters(kernel, n, kProductThreads, smem_bytes);
  return clusters;
}

void launch_product(cudaStream_t stream, const ProductArgs& args, int smem_bytes,
                    const ProductClusters& clusters, LaunchLog* log) {
  LaunchShape shape;
  shape.n_blocks = product_launch_blocks(args, clusters);
  shape.n_threads = kProductThreads;
  shape.smem_bytes = smem_bytes;
  shape.cluster = args.cluster;
  shape.dependent = true;
  device::with_product(args, [&]<int kGroups, int kSets, int kBlocks>() {
    const auto kernel = product_kernel<kGroups, kSets, kBlocks>;
    allow_smem(reinterpret_cast<const void*>(kernel), smem_bytes);
    launch_kernel(stream, {"product", product_bytes(args), log}, shape, kernel, args);
  });
}

}  // namespace kvlapse
