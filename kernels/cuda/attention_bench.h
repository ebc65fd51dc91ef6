// Times the fused decode step: CUDA-graph replays over as many K/V slabs as L2 cannot hold, medians, beside
// the read ceiling that the same run measures first. One thread; uses the current device alone.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "core/base/dtype.h"
#include "kernels/cuda/decode_attention.h"

namespace kvlapse {

struct AttentionBenchCase {
  int batch = 0, slots = 0;
  DType dtype = DType::bf16;
};

struct AttentionBenchOptions {
  std::vector<AttentionBenchCase> cases;  // empty: the standard table
  int n_q_heads = 32, n_kv_heads = 8, head_dim = 128;
  int min_batch = 1, max_batch = 1 << 20;  // of the standard table
  bool fp8 = false;                        // the standard table over fp8 K and V, bf16 beside it
  // Instead: the error of leaving a slot out, per head and shared, beside the contribution per head.
  bool leave_one_out = false;
  bool overlapped_only = false;    // not the variants without overlap and by cp.async
  bool sweep = false;              // instead: splits, ring depths and block counts of one variant, bf16
  double seconds_per_case = 0.02;  // of measured replays
};

struct AttentionBenchRow {
  std::string device, variant;  // variant: victim_per_head, victim_shared, attention_only, ...
  AttentionBenchCase at;
  int n_q_heads = 0, n_kv_heads = 0, head_dim = 0;
  int n_splits = 0, n_stages = 0, n_ctas = 0, n_groups = 0;
  uint64_t kv_bytes = 0, counted_bytes = 0;
  double median_us = 0, min_us = 0, max_us = 0, read_ceiling_gbps = 0;
  int runs = 0;
  bool state_ahead = false;
  bool with_importance = false, with_eviction = false;
  // K and V once, also where a step reads V twice (counted_bytes says so).
  double floor_us() const { return static_cast<double>(kv_bytes) / read_ceiling_gbps * 1e-3; }
};

// Best of a few shapes of bulk and plain reads over 4 GiB.
double measure_read_ceiling_gbps();

// Calls `done` after each row. A variant that fails is reported on stderr and left out.
void bench_attention(const AttentionBenchOptions& options,
                     const std::function<void(const AttentionBenchRow&)>& done);

// One line of JSON with the keys that scripts rely on.
std::string attention_bench_json(const AttentionBenchRow& row);

}  // namespace kvlapse
