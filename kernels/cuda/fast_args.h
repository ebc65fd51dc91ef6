// Kernels of the fast decode step beside attention, bf16 weights, fp32 sums: arguments by value, launchers.
// Activations: x [B, width] fp32 is the residual stream; what is multiplied is bf16 or fp32 as each says.
// All of them may start before the kernel in front has ended (programmatic dependent launch).
#pragma once

#include <cuda_bf16.h>

#include "kernels/cuda/launch.h"
#include "kernels/decode/chain_args.h"
#include "kernels/decode/decode_args.h"
#include "kernels/decode/product_args.h"
#include "kernels/gpu/ahead_device.h"

namespace kvlapse {

inline constexpr int kGemvMostRows = 4;  // sequences that one matrix-vector launch serves

// y[b, r] = W[r] . in[b] for b < n_rows <= kGemvMostRows, the matrix read once.
//   norm_weight given: in = RMSNorm(x[b]); otherwise in = the bf16 rows `input`.
//   paired: rows r and r + n_outputs are gate and up; out_bf16[b, r] = silu(gate) * up.
//   add: out[b, r] += y.
struct GemvArgs {
  const __nv_bfloat16* weights;  // [n_outputs (or twice), columns]
  const float* x;                // [n_rows, columns] with a norm
  const float* norm_weight;      // [columns] or null
  const __nv_bfloat16* input;    // [n_rows, columns] without
  float* out;                    // [n_rows, out_stride]
  __nv_bfloat16* out_bf16;       // when paired
  int32_t n_rows, n_outputs, columns, out_stride;
  float eps;
  bool paired, add;
};
void launch_gemv(cudaStream_t stream, const GemvArgs& args, int n_multiprocessors, LaunchLog* log = nullptr);
// Shared memory that a launch needs must not exceed the device's: columns * n_rows * 4 bytes.
bool gemv_fits(int n_rows, int columns, int smem_bytes);

// out[b] = bf16(RMSNorm(x[b]) * weight).
struct FastNormArgs {
  const float* x;
  const float* weight;
  __nv_bfloat16* out;
  int32_t n_rows, width;
  float eps;
};
void launch_fast_norm(cudaStream_t stream, const FastNormArgs& args, LaunchLog* log = nullptr);

// Biases, QK-norm and rotation of qkv [B, (Hq + 2H) D] fp32; q, k, v leave as bf16 rows.
struct FastQkvArgs {
  const float* qkv;
  const float *bias, *q_norm, *k_norm;  // [(Hq + 2H) D], [D], [D]; null without
  const float* rope;                    // [context, D] cos then sin of each position, D/2 each
  const int32_t* pos;                   // [B]
  __nv_bfloat16 *q, *k, *v;
  int32_t n_rows, n_q_heads, n_kv_heads, head_dim;
  float eps;
};
void launch_fast_qkv(cudaStream_t stream, const FastQkvArgs& args, LaunchLog* log = nullptr);

// act[b, i] = silu(both[b, i]) * both[b, n + i].
struct FastSiluArgs {
  const __nv_bfloat16* both;  // [B, 2n]
  __nv_bfloat16* act;         // [B, n]
  int32_t n_rows, n;
};
void launch_fast_silu(cudaStream_t stream, const FastSiluArgs& args, LaunchLog* log = nullptr);

// x[b] = embedding[tokens[b]].
struct FastEmbedArgs {
  const __nv_bfloat16* embedding;
  const int32_t* tokens;
  float* x;
  int32_t n_rows, width;
  MatrixOrder order;  // of the embedding
};
void launch_fast_embed(cudaStream_t stream, const FastEmbedArgs& args, LaunchLog* log = nullptr);

// best[b] = max over the vocabulary of logit_key(logit, token): the first maximum. best starts at zero.
struct FastArgmaxArgs {
  const float* logits;
  unsigned long long* best;
  int32_t n_rows, n_vocab;
};
void launch_fast_argmax(cudaStream_t stream, const FastArgmaxArgs& args, LaunchLog* log = nullptr);

// What a step chose, into memory of the host at step % n_reports: tokens, and each victim's key, the least of
// all splits'.
struct FastReportArgs {
  const float* logits;             // [B, n_vocab]
  const unsigned long long* best;  // [B] of this step
  const uint64_t* keys;            // [n_layers, B, n_kv_heads, kMaxDecodeSplits]
  const uint32_t* flags;           // [1]
  const int32_t* step;             // [1]
  AheadChoice* choices;            // [n_reports, B]
  uint64_t* victims;               // [n_reports, B, n_layers, n_victims]
  int32_t n_rows, n_vocab, n_layers, n_kv_heads, n_victims, n_splits, n_reports;
};
void launch_fast_report(cudaStream_t stream, const FastReportArgs& args, LaunchLog* log = nullptr);

// The end of a step: tokens[b] = of best[b]; best = 0; ++pos; ++step.
struct FastAdvanceArgs {
  unsigned long long* best;
  int32_t* tokens;
  int32_t* pos;
  int32_t* step;  // [1]
  int32_t n_rows;
};
void launch_fast_advance(cudaStream_t stream, const FastAdvanceArgs& args, LaunchLog* log = nullptr);

// The products between two attentions, on a device of compute capability 9.0: one block a multiprocessor, all
// of them resident.
void launch_product_chain(cudaStream_t stream, const ChainArgs& args, int smem_bytes, int n_multiprocessors,
                          LaunchLog* log = nullptr);

// A product of up to kProductMostRows sequences, on a device of compute capability 9.0, and the clusters of
// blocks with as much shared memory that it holds.
ProductClusters product_clusters(int smem_bytes);
void launch_product(cudaStream_t stream, const ProductArgs& args, int smem_bytes,
                    const ProductClusters& clusters, LaunchLog* log = nullptr);

// n values, roughly normal with that deviation.
void launch_fill_normal(cudaStream_t stream, __nv_bfloat16* data, uint64_t n, uint64_t seed, float deviation);
void launch_fill_value(cudaStream_t stream, float* data, uint64_t n, float value);

}  // namespace kvlapse
