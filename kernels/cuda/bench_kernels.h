// Device code that benchmarks need: random data, and the read ceiling that every figure is set beside.
#pragma once

#include <cstdint>

#include "core/base/dtype.h"
#include "kernels/cuda/launch.h"

namespace kvlapse {

// n 16-bit elements, roughly normal, of this mean and variance 1. Never time on zeros.
void launch_fill_random(cudaStream_t stream, void* data, uint64_t n, DType dtype, uint64_t seed,
                        float mean = 0);
// n e4m3 bytes, roughly normal, of variance 100 squared.
void launch_fill_fp8(cudaStream_t stream, void* data, uint64_t n, uint64_t seed);
// n floats, uniform in [low, high).
void launch_fill_uniform(cudaStream_t stream, float* data, uint64_t n, float low, float high, uint64_t seed);

// Reads `bytes` (a multiple of 16384) once and writes nothing but a word that never is. `n_blocks` blocks
// with a ring of `stages` 16 KB bulk loads each (sm_90; false elsewhere), or plain 16-byte loads.
bool launch_read_bulk(cudaStream_t stream, const void* data, uint64_t bytes, int n_blocks, int stages);
void launch_read_plain(cudaStream_t stream, const void* data, uint64_t bytes, int n_blocks, uint32_t* sink);

}  // namespace kvlapse
