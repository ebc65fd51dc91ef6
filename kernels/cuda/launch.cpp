#include "kernels/cuda/launch.h"

#include <cstdio>

#include "core/base/error.h"

namespace kvlapse {

void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line) {
  cudaGetLastError();  // a sticky error is reported once
  fail("CUDA: {} at {}:{}: {} ({})", call, file, line, cudaGetErrorString(error), cudaGetErrorName(error));
}
void log_cuda_error(cudaError_t error, const char* call, const char* file, int line) noexcept {
  std::fprintf(stderr, "CUDA: %s at %s:%d: %s\n", call, file, line, cudaGetErrorString(error));
}

int device_attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  KVLAPSE_CUDA_CHECK(cudaGetDevice(&device));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

int resident_clusters(const void* kernel, int n, int n_threads, int smem_bytes) {
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(n);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(n));
  config.blockDim = dim3(static_cast<unsigned>(n_threads));
  config.dynamicSmemBytes = static_cast<size_t>(smem_bytes);
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  const cudaError_t asked = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (asked != cudaSuccess && n > kPortableCluster) {
    cudaGetLastError();  // this device has no clusters of that size
    return 0;
  }
  KVLAPSE_CUDA_CHECK(asked);
  return clusters;
}

void launch_kernel(cudaStream_t stream, const LaunchInfo& info, const LaunchShape& shape, const void* kernel,
                   void** args) {
  cudaLaunchAttribute attributes[3] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(shape.n_blocks), static_cast<unsigned>(shape.n_rows));
  config.blockDim = dim3(static_cast<unsigned>(shape.n_threads));
  config.dynamicSmemBytes = static_cast<size_t>(shape.smem_bytes);
  config.stream = stream;
  config.attrs = attributes;
  if (shape.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = static_cast<unsigned>(shape.cluster);
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (shape.cooperative) {
    attributes[config.numAttrs].id = cudaLaunchAttributeCooperative;
    attributes[config.numAttrs++].val.cooperative = 1;
  }
  if (shape.dependent) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  const cudaError_t error = cudaLaunchKernelExC(&config, kernel, args);
  if (error != cudaSuccess)
    fail("CUDA: launch of {} ({} x {} blocks of {} threads, cluster {}, {} bytes of shared memory): {}", info.name,
         shape.n_blocks, shape.n_rows, shape.n_threads, shape.cluster, shape.smem_bytes, cudaGetErrorString(error));
  if (info.log != nullptr) info.log->add(info.name, info.expected_bytes);
}

}  // namespace kvlapse
