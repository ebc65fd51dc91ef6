// The only place that launches kernels. A launch names itself and the bytes that it should move through
// device memory (modelled); the log of them is what a recording sets beside measured bytes.
#pragma once

#include <cstdint>

#include "core/ops/launch_log.h"
#include "kernels/cuda/cuda_check.h"

namespace kvlapse {

struct LaunchShape {
  int n_blocks = 1;  // of a row of the grid
  int n_threads = 32;
  int smem_bytes = 0;
  int cluster = 1;
  bool cooperative = false;  // all blocks resident at once
  bool dependent = false;    // may start before the kernel in front of it ends (griddepcontrol)
  int n_rows = 1;
};

struct LaunchInfo {
  const char* name = "";
  uint64_t expected_bytes = 0;
  LaunchLog* log = nullptr;
};

inline constexpr int kPortableCluster = 8;  // blocks: more must be allowed, and not every device has them
// Clusters of n blocks that the device holds at once; 0 where it has none of that size.
int resident_clusters(const void* kernel, int n, int n_threads, int smem_bytes);

void launch_kernel(cudaStream_t stream, const LaunchInfo& info, const LaunchShape& shape, const void* kernel,
                   void** args);

// `kernel` takes one argument struct by value.
template <class Args>
void launch_kernel(cudaStream_t stream, const LaunchInfo& info, const LaunchShape& shape,
                   void (*kernel)(Args), const Args& args) {
  void* pointers[] = {const_cast<Args*>(&args)};
  launch_kernel(stream, info, shape, reinterpret_cast<const void*>(kernel), pointers);
}

}  // namespace kvlapse
