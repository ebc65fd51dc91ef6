// Tokens per second of a decode step from the bytes that it must move. Modelled, never measured: the
// parameters come from a GPU's profile, each with its provenance. A step costs
//   step_overhead + launches * launch + weights / weight_read
//     + batch * (per_sequence + (kv + eviction bytes) / kv_read)
// averaged over the tokens of a generation, since the cache grows until its budget is reached.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

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
  Sourced weight_read_gbps;  // 1e9 bytes a second
  Sourced kv_read_gbps;      // that attention reaches on K and V
  Sourced step_overhead_us;  // of what is once a step: host, graph, sampling
  Sourced launch_us;         // what a kernel loses at its begin and end; 0: part of the step's overhead
  Sourced per_sequence_us;   // sampling and bookkeeping of one sequence
  // Kernels a layer by batch, ascending: a batch has those of the next larger one, the last above all.
  struct Launches {
    int batch = 0;
    double per_layer = 0;
  };
  std::vector<Launches> launches;
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
// A request of a mix: what a batch is drawn from, each kind as often as it stands there.
struct RequestLength {
  int n_prompt = 0, n_output = 0;
  int budget = 0;  // slots per kv head
};
// Largest batch of that mix whose sequences fit when all are at their peak; 0 when not even one does.
int largest_batch(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy,
                  std::span<const RequestLength> mix);
inline int largest_batch(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                         int n_prompt, int n_output) {
  const RequestLength one{n_prompt, n_output, budget};
  return largest_batch(gpu, shape, policy, {&one, 1});
}

// A decode step that a bench measured: what a profile is fitted to and held against.
struct MeasuredStep {
  std::string name;  // of the model
  int batch = 0, context = 0;
  double step_ms = 0;
  int64_t weight_bytes = 0, kv_bytes = 0;  // read in the step
  int launches = 0, n_layers = 0;          // 0: not counted
};

// Step overhead and the bandwidths of weights and K/V by least squares of relative step time: three unknowns;
// four with the cost of a launch, where every step says how many it has and more of them cost more.
// The cost of one sequence stays 0: what steps of a few batches tell of it is within their noise. Each error
// is the standard error from the residuals. `profile` gives name, memory and what its provenance begins with.
// Throws Error when the steps do not determine the unknowns: not more steps than these, or all alike.
GpuProfile fit_profile(GpuProfile profile, std::span<const MeasuredStep> steps, const std::string& source);

// Time of that step under a profile.
double predicted_step_ms(const GpuProfile& gpu, const MeasuredStep& step);

// Each step under a profile fitted to all the others.
struct CheckedStep {
  MeasuredStep measured;
  double predicted_ms = 0;
  double difference_ratio = 0;  // predicted / measured - 1
};
std::vector<CheckedStep> leave_one_out(const GpuProfile& profile, std::span<const MeasuredStep> steps);

// Means are over the tokens of the mix: a long request counts as often as it decodes.
Prediction predict(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int batch,
                   std::span<const RequestLength> mix);
inline Prediction predict(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                          int batch, int n_prompt, int n_output) {
  const RequestLength one{n_prompt, n_output, budget};
  return predict(gpu, shape, policy, batch, {&one, 1});
}

}  // namespace kvlapse
