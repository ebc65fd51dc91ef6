#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/base/fp8.h"
#include "core/base/rng.h"
#include "kernels/cuda/bench_kernels.h"

namespace kvlapse {
namespace {

struct FillArgs {
  void* data;
  uint64_t n, seed;
  float low, high;
  bool bf16;
};

__device__ float normal(uint64_t seed, uint64_t i) {
  const uint64_t bits = mix64(seed ^ mix64(i));
  const float sum =
      static_cast<float>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return (sum / 65536.0f - 2.0f) * 1.7320508f;
}

__global__ void fill_random_kernel(FillArgs args) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < args.n; i += stride) {
    const float value = normal(args.seed, i) + args.low;
    if (args.bf16)
      static_cast<__nv_bfloat16*>(args.data)[i] = __float2bfloat16(value);
    else
      static_cast<__half*>(args.data)[i] = __float2half(value);
  }
}

__global__ void fill_fp8_kernel(FillArgs args) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < args.n; i += stride)
    static_cast<uint8_t*>(args.data)[i] = f32_to_e4m3(100.0f * normal(args.seed, i));
}

__global__ void fill_uniform_kernel(FillArgs args) {
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  for (uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x; i < args.n; i += stride)
    static_cast<float*>(args.data)[i] =
        args.low + (args.high - args.low) * unit_float(mix64(args.seed ^ mix64(i)));
}

struct ReadArgs {
  const void* data;
  uint64_t n_vectors;
  uint32_t* sink;
};

__global__ void __launch_bounds__(512) read_plain_kernel(ReadArgs args) {
  const uint4* data = static_cast<const uint4*>(args.data);
  const uint64_t stride = static_cast<uint64_t>(gridDim.x) * blockDim.x;
  uint32_t mixed = 0;
  uint64_t i = blockIdx.x * static_cast<uint64_t>(blockDim.x) + threadIdx.x;
  for (; i + 7 * stride < args.n_vectors; i += 8 * stride) {
    uint4 v[8];
#pragma unroll
    for (int u = 0; u < 8; ++u) v[u] = __ldcs(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < 8; ++u) mixed ^= v[u].x ^ v[u].y ^ v[u].z ^ v[u].w;
  }
  for (; i < args.n_vectors; i += stride) {
    const uint4 v = __ldcs(data + i);
    mixed ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (mixed == 0x12345678u && args.sink != nullptr && args.n_vectors == 1) *args.sink = mixed;
}

LaunchShape blocks_of(int n_blocks, int n_threads) {
  LaunchShape shape;
  shape.n_blocks = n_blocks;
  shape.n_threads = n_threads;
  return shape;
}

}  // namespace

void launch_fill_random(cudaStream_t stream, void* data, uint64_t n, DType dtype, uint64_t seed, float mean) {
  launch_kernel(stream, {"fill_random", n * 2, nullptr}, blocks_of(2048, 256), fill_random_kernel,
                FillArgs{data, n, seed, mean, 0, dtype == DType::bf16});
}
void launch_fill_fp8(cudaStream_t stream, void* data, uint64_t n, uint64_t seed) {
  launch_kernel(stream, {"fill_fp8", n, nullptr}, blocks_of(2048, 256), fill_fp8_kernel,
                FillArgs{data, n, seed, 0, 0, false});
}
void launch_fill_uniform(cudaStream_t stream, float* data, uint64_t n, float low, float high, uint64_t seed) {
  launch_kernel(stream, {"fill_uniform", n * 4, nullptr}, blocks_of(2048, 256), fill_uniform_kernel,
                FillArgs{data, n, seed, low, high, false});
}
void launch_read_plain(cudaStream_t stream, const void* data, uint64_t bytes, int n_blocks, uint32_t* sink) {
  launch_kernel(stream, {"read_plain", bytes, nullptr}, blocks_of(n_blocks, 512), read_plain_kernel,
                ReadArgs{data, bytes / 16, sink});
}

}  // namespace kvlapse
