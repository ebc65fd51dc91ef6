// Bulk loads into shared memory and nothing else: how fast a memory-bound kernel of this chip can read. sm_90
// only.
#include <algorithm>

#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/device_ops.cuh"

namespace kvlapse {
namespace {

constexpr int kChunkBytes = 16384;
constexpr int kMaxStages = 14;

struct ReadArgs {
  const unsigned char* data;
  uint64_t n_chunks;
  int32_t stages;
};

__device__ void load_chunk(const ReadArgs& args, uint64_t chunk, uint32_t to, uint32_t bar, uint64_t policy) {
  device::mbarrier_arrive_expect(bar, kChunkBytes);
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
      "[%3], %4;" ::"r"(to),
      "l"(args.data + chunk * kChunkBytes), "r"(kChunkBytes), "r"(bar), "l"(policy)
      : "memory");
#endif
}

__global__ void read_bulk_kernel(const __grid_constant__ ReadArgs args) {
  extern __shared__ __align__(1024) unsigned char shared[];
  __shared__ uint64_t full[kMaxStages];
  if (threadIdx.x != 0) return;
  for (int i = 0; i < args.stages; ++i) device::mbarrier_init(device::smem_address(&full[i]), 1);
  device::fence_barrier_init();
  const uint64_t policy = device::evict_first_policy();
  const uint32_t ring = device::smem_address(shared);
  uint64_t ahead = blockIdx.x;
  for (int i = 0; i < args.stages && ahead < args.n_chunks; ++i, ahead += gridDim.x)
    load_chunk(args, ahead, ring + static_cast<uint32_t>(i * kChunkBytes), device::smem_address(&full[i]),
               policy);
  int stage = 0;
  uint32_t phase = 0;
  for (uint64_t chunk = blockIdx.x; chunk < args.n_chunks; chunk += gridDim.x) {
    device::mbarrier_wait(device::smem_address(&full[stage]), phase);
    if (ahead < args.n_chunks) {
      load_chunk(args, ahead, ring + static_cast<uint32_t>(stage * kChunkBytes),
                 device::smem_address(&full[stage]), policy);
      ahead += gridDim.x;
    }
    if (++stage == args.stages) stage = 0, phase ^= 1;
  }
}

}  // namespace

bool launch_read_bulk(cudaStream_t stream, const void* data, uint64_t bytes, int n_blocks, int stages) {
  cudaFuncAttributes found{};
  const void* function = reinterpret_cast<const void*>(read_bulk_kernel);
  if (cudaFuncGetAttributes(&found, function) != cudaSuccess) {
    cudaGetLastError();  // not built for this device
    return false;
  }
  LaunchShape shape;
  shape.n_blocks = n_blocks;
  shape.n_threads = 32;
  stages = std::min(stages, kMaxStages - 1);
  shape.smem_bytes = stages * kChunkBytes;
  KVLAPSE_CUDA_CHECK(
      cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shape.smem_bytes));
  launch_kernel(stream, {"read_bulk", bytes, nullptr}, shape, read_bulk_kernel,
                ReadArgs{static_cast<const unsigned char*>(data), bytes / kChunkBytes, stages});
  return true;
}

}  // namespace kvlapse
