// Tokens per second of a decode step from the bytes that it must move. Modelled, never measured: the
// parameters come from a GPU's profile, each with its provenance. A step costs
//   step_overhead + weights / weight_read + batch * (per_sequence + (kv + eviction bytes) / kv_read)
// averaged over the tokens of a generation, since the cache grows until its budget is reached.
#pragma once

#include <cstdint>
#include <string>

#include "core/cache/geometry.h"
#include "core/policy/policy.h"

namespace kvlapse {

// A number with its origin: measured, fitted, data sheet, published.
struct Sourced {
  double value = 0;
  double error = 0;  // one standard deviation, 0: unknown
  std::string provenance;
};

struct GpuProfile {
  std::string name;
  Sourced memory_gib;
  Sourced weight_read_gbps;    // 1e9 bytes a second
  Sourced kv_read_gbps;        // that attention reaches on K and V
  Sourced step_overhead_us;    // launches, host
  Sourced per_sequence_us;     // sampling and bookkeeping of one sequence
  double usable_share = 0.95;  // of the memory: the rest is the context's and the allocator's
};

struct DecoderShape {
  CacheGeometry geometry;      // n_slots unused
  int64_t weight_bytes = 0;    // read in every step
  int64_t resident_bytes = 0;  // weights in memory: an embedding table is read a row at a time
};

struct Prediction {
  int batch = 0;
  double slots_mean = 0;  // tokens that attention reads, mean over the generation
  int slots_peak = 0;
  int64_t weight_bytes = 0;    // of a step
  int64_t kv_bytes = 0;        // read in a step, whole batch, mean
  int64_t eviction_bytes = 0;  // scores, keys read again, rows moved; a step, whole batch, mean
  int64_t memory_bytes = 0;    // peak: weights, K/V, policy state and workspace
  double step_ms = 0;
  double tokens_per_s = 0;
  double tokens_per_s_error = 0;  // from the profile's errors, 0: unknown
};

// Tokens that attention reads at token `n_seen` (1-based, prompt included) of a sequence.
int slots_at(const Policy& policy, int budget, int n_prompt, int n_seen);
// Peak bytes of one sequence: K/V at peak slots, state; workspace is shared by the batch one layer at a time.
int64_t sequence_bytes(const DecoderShape& shape, const Policy& policy, int budget, int n_prompt,
                       int n_total);
// Largest batch that fits; 0 when not even one sequence does.
int largest_batch(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                  int n_prompt, int n_output);

Prediction predict(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                   int batch, int n_prompt, int n_output);

}  // namespace kvlapse
