// How a fused decode step is cut over a device: splits of a (b, kv head), persistent CTAs, ring depth, shared
// memory. Pure host arithmetic. The plan decides the order of sums: the same plan, the same bits.
#pragma once

#include <cstdint>
#include <functional>

#include "core/base/dtype.h"
#include "kernels/decode/decode_args.h"

namespace kvlapse {

struct DecodeShape {
  int batch = 0;                   // B
  int n_q_heads = 0;               // Hq
  int n_kv_heads = 0;              // H
  int head_dim = 0;                // D: 32, 64, 128 or 256
  int n_slots = 0;                 // S, capacity
  DType dtype = DType::f16;        // of K and V: f16, bf16 or f8e4m3
  DType activation = DType::bf16;  // of q, new rows and output of an fp8 cache: f16 or bf16
  bool leave_one_out = false;      // the score is FusedScore::leave_one_out

  int group() const { return n_q_heads / n_kv_heads; }
  bool fp8() const { return dtype == DType::f8e4m3; }
  DType io() const { return fp8() ? activation : dtype; }
  // Floats of a (sequence, kv head) in DecodeArgs::k_scale and v_scale.
  int scale_stride() const { return (n_slots + kDecodeTileSlots - 1) / kDecodeTileSlots * kDecodeTileSlots; }
  int n_items() const { return batch * n_kv_heads; }
  uint64_t row_bytes() const { return static_cast<uint64_t>(head_dim) * dtype_bytes(dtype); }
  // K and V of `slots` tokens of every head and sequence.
  uint64_t kv_bytes(int slots) const { return 2 * static_cast<uint64_t>(n_items()) * slots * row_bytes(); }
};

struct DecodeLimits {
  int n_multiprocessors = 132;
  int smem_bytes = 232448;  // of one block
  bool clusters = true;     // copy engine and clusters: sm_90; otherwise cp.async and exchange through memory
  int max_splits = 8;       // largest cluster
  // Clusters of n blocks with so many threads and so much shared memory that can run at once; when empty, as
  // many as the multiprocessors hold.
  std::function<int(int n, int n_threads, int smem_bytes)> resident_clusters;
};

struct DecodePlan {
  bool bulk = true;
  int n_groups = 0;
  int n_threads = 0;
  int n_splits = 1;
  int n_ctas = 0;  // a multiple of n_splits
  int n_stages = 0;
  int warp_bytes = 0;
  int logits_bytes = 0;  // with the output reduction
  int softmax_rows = 0;
  int partial_offset = 0;
  OutputOwners owners;
  int small_offset = 0;
  int smem_bytes = 0;
  bool next_early = false;
  bool state_ahead = false;
};

// Whether a block reads the state of its next item while this one streams.
enum class ReadAhead : uint8_t { chosen, no, yes };

// What a caller fixes; 0 leaves the choice to the plan.
struct DecodeTuning {
  int splits = 0;
  int stages = 0;
  int ctas = 0;
  int blocks_per_multiprocessor = 0;  // 1, or 2: half the shared memory and half the consumers each
  int groups = 0;                     // of consumers, at most
  ReadAhead ahead = ReadAhead::chosen;
};

// Throws Error when the shape is not supported or does not fit.
DecodePlan plan_decode(const DecodeShape& shape, const DecodeLimits& limits, const DecodeTuning& tuning = {});

// Bytes that a launch should move through device memory when every sequence holds `slots` tokens. Leave one
// out: V counts twice; what L2 still holds of it the second time is not read again (not modelled).
uint64_t decode_bytes(const DecodeShape& shape, int slots, FusedScore score, bool shared);

}  // namespace kvlapse
