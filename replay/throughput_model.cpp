#include "replay/throughput_model.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "replay/memory_simulator.h"

namespace kvlapse {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;

// Tokens held after the eviction that follows token n_seen.
int held_after(const EvictionRule& rule, int budget, int n_prompt, int n_seen) {
  const int target = budget - rule.headroom;
  if (n_seen <= target) return n_seen;
  if (n_seen < n_prompt) return n_seen;  // the prompt is cut as a whole, at its end
  // Last position at which the rule acted: the prompt's end, or a multiple of the cadence.
  int last = n_seen / rule.cadence * rule.cadence;
  if (last < std::max(n_prompt, target)) last = n_prompt > target ? n_prompt : 0;
  return last == 0 ? n_seen : target + n_seen - last;
}

// Bytes of one sequence's evictions in a step, mean: what decisions read again and move, over the cadence.
double eviction_bytes_per_step(const CacheGeometry& g, const Policy& policy, double slots) {
  const PolicyInfo& info = policy.info();
  if (!info.evicts) return 0;
  const double rows = static_cast<double>(g.n_layers) * g.n_kv_heads * slots;
  double per_decision = rows * 4 * 2;  // scores, written and read
  if (contains(info.signals, Signal::keys)) per_decision += rows * static_cast<double>(g.row_bytes());
  if (contains(info.signals, Signal::values)) per_decision += rows * static_cast<double>(g.row_bytes());
  if (contains(info.signals, Signal::query_window) && info.rule.cadence > 1)
    per_decision += rows * static_cast<double>(g.row_bytes());
  if (info.rule.reclaim != Reclaim::fill)
    per_decision += rows * static_cast<double>(g.head_token_bytes()) * 2;
  double per_step = rows * 4 * (contains(info.signals, Signal::value_l1) + info.state_columns * 2);
  return per_step + per_decision / info.rule.cadence;
}

}  // namespace

int slots_at(const Policy& policy, int budget, int n_prompt, int n_seen) {
  if (!policy.info().evicts) return n_seen;
  return n_seen <= n_prompt ? n_seen : held_after(policy.info().rule, budget, n_prompt, n_seen - 1) + 1;
}

int64_t sequence_bytes(const DecoderShape& shape, const Policy& policy, int budget, int n_prompt,
                       int n_total) {
  int peak = n_total;
  if (policy.info().evicts)
    peak = std::min(n_total, std::max(n_prompt, policy.info().rule.peak_slots(budget)));
  return static_cast<int64_t>(shape.geometry.cache_bytes(peak)) +
         policy_state_bytes(policy, shape.geometry, peak);
}

int largest_batch(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                  int n_prompt, int n_output) {
  const int n_total = n_prompt + n_output;
  int peak = policy.info().evicts ? std::min(n_total, policy.info().rule.peak_slots(budget)) : 0;
  double workspace = static_cast<double>(policy_workspace_bytes(policy, shape.geometry, peak));
  double room =
      gpu.memory_gib.value * kGiB * gpu.usable_share - static_cast<double>(shape.resident_bytes) - workspace;
  double one = static_cast<double>(sequence_bytes(shape, policy, budget, n_prompt, n_total));
  return room < one ? 0 : static_cast<int>(room / one);
}

Prediction predict(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int budget,
                   int batch, int n_prompt, int n_output) {
  if (batch < 1 || n_prompt < 1 || n_output < 1)
    fail_usage("predict: expected batch, input and output of at least 1, found {}, {}, {}", batch, n_prompt,
               n_output);
  const CacheGeometry& g = shape.geometry;
  Prediction p;
  p.batch = batch;
  for (int n = n_prompt + 1; n <= n_prompt + n_output; ++n) {
    int slots = slots_at(policy, budget, n_prompt, n);
    p.slots_mean += slots;
    p.slots_peak = std::max(p.slots_peak, slots);
  }
  p.slots_mean /= n_output;
  const double kv = p.slots_mean * static_cast<double>(g.token_bytes());
  const double eviction = eviction_bytes_per_step(g, policy, p.slots_mean);
  p.weight_bytes = shape.weight_bytes;
  p.kv_bytes = std::llround(kv * batch);
  p.eviction_bytes = std::llround(eviction * batch);
  p.memory_bytes = shape.resident_bytes +
                   batch * sequence_bytes(shape, policy, budget, n_prompt, n_prompt + n_output) +
                   policy_workspace_bytes(policy, g, p.slots_peak);

  const double weights_s = static_cast<double>(shape.weight_bytes) / (gpu.weight_read_gbps.value * 1e9);
  const double kv_s = batch * (kv + eviction) / (gpu.kv_read_gbps.value * 1e9);
  const double overhead_s = gpu.step_overhead_us.value * 1e-6,
               sequences_s = batch * gpu.per_sequence_us.value * 1e-6;
  const double step = weights_s + kv_s + overhead_s + sequences_s;
  p.step_ms = step * 1e3;
  p.tokens_per_s = batch / step;
  // First order, parameters independent.
  auto relative = [](const Sourced& s) { return s.value > 0 ? s.error / s.value : 0; };
  double variance = std::pow(weights_s * relative(gpu.weight_read_gbps), 2) +
                    std::pow(kv_s * relative(gpu.kv_read_gbps), 2) +
                    std::pow(overhead_s * relative(gpu.step_overhead_us), 2) +
                    std::pow(sequences_s * relative(gpu.per_sequence_us), 2);
  p.tokens_per_s_error = p.tokens_per_s * std::sqrt(variance) / step;
  return p;
}

}  // namespace kvlapse
