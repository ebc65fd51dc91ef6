// The GPU as the command line sees it. A build without CUDA has the same functions: they say so in one line.
#pragma once

#include <memory>
#include <string>

#include "core/engine/replay_device.h"
#include "core/model/model_spec.h"
#include "core/ops/backend.h"
#include "core/policy/policy.h"
#include "kernels/cpu/bench/bench.h"

namespace kvlapse {

// "cpu", or "cuda[:i]": the index of the GPU, -1 for the CPU. Throws UsageError otherwise.
int parse_device(const std::string& text);

// Backend on GPU `index`, with the CPU's results bit for bit. Throws Error: built without CUDA, no driver, no
// such GPU.
std::unique_ptr<Backend> make_cuda_backend(int index);
// On `device` as parse_device reads it; n_threads and mode are the CPU's, a GPU is always exact.
std::unique_ptr<Backend> make_backend(const std::string& device, int n_threads,
                                      MatmulMode mode = MatmulMode::exact);

// Backend whose decode steps are those of the fast decoder, which runs ahead and chooses the victims of
// `full` and of policies with a fused_score (kernels/gpu/ahead_backend.h); the prompts' are
// make_cuda_backend's. K/V are bf16. Throws as make_cuda_backend, and for a shape without a kernel.
struct CudaFusedDecode {
  int device = 0;
  int batch = 1;     // sequences of the session
  int n_tokens = 0;  // longest prompt and longest generation together
  int budget = 0;    // slots per kv head of every sequence; of no account when the policy never evicts
};
std::unique_ptr<Backend> make_fused_backend(const CudaFusedDecode& decode, const TransformerWeights& weights,
                                            const Policy& policy);

// Replays of many configurations at once on GPU `index`. Throws as make_cuda_backend.
std::unique_ptr<ReplayDevice> make_cuda_replay(int index);
// What GPU `index` reads from its memory, measured, and its fp32 multiply-adds, two operations each, at its
// highest clock.
struct GpuRates {
  double read_gbps = 0, fp32_gflops = 0;
};
GpuRates gpu_rates(int index);

// One row: a step of the fast decoder (bf16 weights and K/V, one CUDA graph) against the time in which its
// weights and K/V can be read, at the read ceiling that the same run measures first. The policy is `full`, or
// one that the fused step serves, at a budget of `context` slots.
struct CudaDecodeBench {
  int device = 0;
  int context = 4096;  // tokens held when the first measured step begins
  int batch = 1;
  int steps = 32;
  uint64_t seed = 0;  // of random weights and cache
};
std::vector<BenchRow> bench_cuda_decode(const CudaDecodeBench& bench, const ModelSpec& spec,
                                        const TransformerWeights* weights, const Policy& policy);

// The fused decode step (append, attention, LongFlow's score, next victim), per kv head and shared, and
// attention alone, against the time in which its K/V can be read (once) at the ceiling that the same run
// measures first.
struct CudaAttentionBench {
  int device = 0;
  int batch = 0, n_slots = 0;  // 0: the standard table
  int n_q_heads = 32, n_kv_heads = 8, head_dim = 128;
  DType dtype = DType::bf16;   // or f16; or f8e4m3, with bf16's step beside it
  bool leave_one_out = false;  // CAOTE's score, with LongFlow's per kv head beside it
};
std::vector<BenchRow> bench_cuda_attention(const CudaAttentionBench& bench);

// An R-KV compaction of one layer (32 query heads, 8 kv heads of 128), with keys of which none are alike and
// with keys that are all alike, against the time of reading all keys once.
struct CudaRkvBench {
  int device = 0;
  int batch = 1, budget = 1024, buffer = 128;
  DType dtype = DType::bf16;  // or f16
};
std::vector<BenchRow> bench_cuda_rkv(const CudaRkvBench& bench);

struct GpuReport {
  bool built_in = false;  // this program has CUDA
  std::string
      found;        // "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.1 GiB, CUDA 13.0"; "" when unusable
  std::string why;  // not usable
};
GpuReport report_gpu();

}  // namespace kvlapse
