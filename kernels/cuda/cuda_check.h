// Every CUDA call is checked: KVLAPSE_CUDA_CHECK throws Error with the call, its place and CUDA's words;
// KVLAPSE_CUDA_LOG, for destructors, prints the same and goes on.
#pragma once

#include <cuda_runtime.h>

namespace kvlapse {

[[noreturn]] void throw_cuda_error(cudaError_t error, const char* call, const char* file, int line);
void log_cuda_error(cudaError_t error, const char* call, const char* file, int line) noexcept;

int device_attribute(cudaDeviceAttr which);  // of the current device

}  // namespace kvlapse

#define KVLAPSE_CUDA_CHECK(call)                                                \
  do {                                                                          \
    if (const cudaError_t kvlapse_error = (call); kvlapse_error != cudaSuccess) \
      ::kvlapse::throw_cuda_error(kvlapse_error, #call, __FILE__, __LINE__);    \
  } while (false)

#define KVLAPSE_CUDA_LOG(call)                                                  \
  do {                                                                          \
    if (const cudaError_t kvlapse_error = (call); kvlapse_error != cudaSuccess) \
      ::kvlapse::log_cuda_error(kvlapse_error, #call, __FILE__, __LINE__);      \
  } while (false)
