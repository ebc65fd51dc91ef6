// y = W x for bf16 matrices through cuBLASLt, which is found at run time (libcublasLt.so.13, 500 MB: too
// large to be part of the program): plain loader paths, then the CUDA toolkit's folder. One thread.
#pragma once

#include <cuda_runtime.h>

#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/device_memory.h"

namespace kvlapse {

// out[j, r] = sum_c W[r, c] x[j, c] (+ out[j, r]), W [rows, columns] and x [n, columns] bf16; out fp32 or
// bf16.
struct LtShape {
  int rows = 0, columns = 0, n = 0;
  bool bf16_out = false;
  bool add = false;  // fp32 only
};

class CublasLt {
 public:
  // Null when the library is not found; `why` then says where it was looked for.
  static std::unique_ptr<CublasLt> load(std::string& why);
  virtual ~CublasLt() = default;
  // A product of that shape; the best of the library's proposals by measurement with these operands. Weights:
  // matrices of the shape that will be multiplied in turn, so that trials find none of them in L2 either.
  virtual int plan(const LtShape& shape, std::span<const void* const> weights, const void* x, void* out,
                   const Stream& stream) = 0;
  virtual void run(int plan, const void* w, const void* x, void* out, cudaStream_t stream) = 0;
};

}  // namespace kvlapse
