#include "replay/throughput_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>
#include <optional>

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

constexpr int kMostUnknowns = 4;  // overhead, seconds a byte of weights and of K/V, seconds a launch

std::array<double, kMostUnknowns> features(const MeasuredStep& step) {
  return {1.0, static_cast<double>(step.weight_bytes), static_cast<double>(step.kv_bytes),
          static_cast<double>(step.launches)};
}

double launches_of(const GpuProfile& gpu, int n_layers, int batch) {
  if (gpu.launches.empty()) return 0;
  const auto at = std::find_if(gpu.launches.begin(), gpu.launches.end(),
                               [&](const GpuProfile::Launches& l) { return l.batch >= batch; });
  return n_layers * (at == gpu.launches.end() ? gpu.launches.back() : *at).per_layer;
}

// The profile by the first n unknowns; nothing when a launch would cost less than nothing.
std::optional<GpuProfile> fit_unknowns(GpuProfile profile, std::span<const MeasuredStep> steps, int n,
                                       const std::string& source) {
  if (static_cast<int>(steps.size()) <= n)
    fail("{}: expected at least {} measured steps, found {}", source, n + 1, steps.size());
  // Columns are scaled to their largest value, so that the normal equations stay well conditioned.
  std::array<double, kMostUnknowns> unit{};
  for (const MeasuredStep& step : steps)
    for (int i = 0; i < n; ++i) unit[i] = std::max(unit[i], features(step)[i]);
  std::array<std::array<double, kMostUnknowns>, kMostUnknowns> normal{}, inverse{};
  std::array<double, kMostUnknowns> right{};
  for (const MeasuredStep& step : steps) {
    if (!(step.step_ms > 0 && step.weight_bytes > 0 && step.kv_bytes > 0))
      fail("{}: expected time, weights and K/V above 0, found {} ms, {} and {} bytes", source, step.step_ms,
           step.weight_bytes, step.kv_bytes);
    const std::array<double, kMostUnknowns> x = features(step);
    for (int i = 0; i < n; ++i) {
      const double xi = x[i] / unit[i] / step.step_ms;
      right[i] += xi;
      for (int j = 0; j < n; ++j) normal[i][j] += xi * x[j] / unit[j] / step.step_ms;
    }
  }
  for (int i = 0; i < n; ++i) inverse[i][i] = 1;
  for (int i = 0; i < n; ++i) {
    const double pivot = normal[i][i];
    if (!(pivot > 1e-12)) fail("{}: expected steps of different weights and K/V, found alike ones", source);
    for (int j = 0; j < n; ++j) normal[i][j] /= pivot, inverse[i][j] /= pivot;
    for (int r = 0; r < n; ++r) {
      if (r == i) continue;
      const double factor = normal[r][i];
      for (int j = 0; j < n; ++j)
        normal[r][j] -= factor * normal[i][j], inverse[r][j] -= factor * inverse[i][j];
    }
  }
  std::array<double, kMostUnknowns> fit{};
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) fit[i] += inverse[i][j] * right[j];
  double residual = 0;
  for (const MeasuredStep& step : steps) {
    double relative = 1;
    for (int i = 0; i < n; ++i) relative -= fit[i] * features(step)[i] / unit[i] / step.step_ms;
    residual += relative * relative;
  }
  residual /= static_cast<double>(static_cast<int>(steps.size()) - n);
  auto value = [&](int i) { return fit[i] / unit[i]; };
  auto error = [&](int i) { return std::sqrt(inverse[i][i] * residual) / unit[i]; };
  for (int i = 1; i < kMostUnknowns - 1; ++i)
    if (!(value(i) > 0))
      fail("{}: expected steps whose time grows with their bytes, found a bandwidth below 0", source);
  const std::string provenance = fmt::format("fitted to {} steps of {}", steps.size(), source);
  auto bandwidth = [&](int i) {  // ms a byte -> 1e9 bytes a second
    return Sourced{1e-6 / value(i), error(i) / (value(i) * value(i)) * 1e-6, provenance};
  };
  profile.step_overhead_us = {value(0) * 1e3, error(0) * 1e3, provenance};
  if (n == kMostUnknowns) {
    if (!(value(3) > 0)) return std::nullopt;
    profile.launch_us = {value(3) * 1e3, error(3) * 1e3, provenance};
    std::map<int, std::pair<int, int>> by_batch;  // launches, layers
    for (const MeasuredStep& step : steps) {
      by_batch[step.batch].first += step.launches;
      by_batch[step.batch].second += step.n_layers;
    }
    for (const auto& [batch, sums] : by_batch)
      profile.launches.push_back({batch, static_cast<double>(sums.first) / sums.second});
  }
  profile.weight_read_gbps = bandwidth(1);
  profile.kv_read_gbps = bandwidth(2);
  profile.per_sequence_us = {0, 0, "none: within the noise of these steps"};
  return profile;
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

int largest_batch(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy,
                  std::span<const RequestLength> mix) {
  double bytes = 0;
  int peak = 0;
  for (const RequestLength& r : mix) {
    const int n_total = r.n_prompt + r.n_output;
    if (policy.info().evicts)
      peak = std::max(peak, std::min(n_total, policy.info().rule.peak_slots(r.budget)));
    bytes += static_cast<double>(sequence_bytes(shape, policy, r.budget, r.n_prompt, n_total));
  }
  const double workspace = static_cast<double>(policy_workspace_bytes(policy, shape.geometry, peak));
  const double room =
      gpu.memory_gib.value * kGiB * gpu.usable_share - static_cast<double>(shape.resident_bytes) - workspace;
  const double one = bytes / static_cast<double>(mix.size());
  return room < one ? 0 : static_cast<int>(room / one);
}

double predicted_step_ms(const GpuProfile& gpu, const MeasuredStep& step) {
  return gpu.step_overhead_us.value * 1e-3 + step.launches * gpu.launch_us.value * 1e-3 +
         step.batch * gpu.per_sequence_us.value * 1e-3 +
         static_cast<double>(step.weight_bytes) / (gpu.weight_read_gbps.value * 1e6) +
         static_cast<double>(step.kv_bytes) / (gpu.kv_read_gbps.value * 1e6);
}

GpuProfile fit_profile(GpuProfile profile, std::span<const MeasuredStep> steps, const std::string& source) {
  profile.launch_us = {0, 0, "not counted: part of the step's overhead"};
  profile.launches.clear();
  if (std::all_of(steps.begin(), steps.end(),
                  [](const MeasuredStep& s) { return s.launches > 0 && s.n_layers > 0; })) {
    if (std::optional<GpuProfile> fitted = fit_unknowns(profile, steps, kMostUnknowns, source))
      return *fitted;
    profile.launch_us.provenance = "within the noise of these steps: part of the step's overhead";
  }
  return *fit_unknowns(profile, steps, kMostUnknowns - 1, source);
}

std::vector<CheckedStep> leave_one_out(const GpuProfile& profile, std::span<const MeasuredStep> steps) {
  std::vector<CheckedStep> out;
  for (size_t left = 0; left < steps.size(); ++left) {
    std::vector<MeasuredStep> others(steps.begin(), steps.end());
    others.erase(others.begin() + static_cast<ptrdiff_t>(left));
    const double ms = predicted_step_ms(fit_profile(profile, others, "the other steps"), steps[left]);
    out.push_back({steps[left], ms, ms / steps[left].step_ms - 1});
  }
  return out;
}

Prediction predict(const GpuProfile& gpu, const DecoderShape& shape, const Policy& policy, int batch,
                   std::span<const RequestLength> mix) {
  const CacheGeometry& g = shape.geometry;
  Prediction p;
  p.batch = batch;
  double bytes = 0;
  int64_t tokens = 0;
  for (const RequestLength& r : mix) {
    if (batch < 1 || r.n_prompt < 1 || r.n_output < 1)
      fail_usage("predict: expected batch, input and output of at least 1, found {}, {}, {}", batch,
                 r.n_prompt, r.n_output);
    for (int n = r.n_prompt + 1; n <= r.n_prompt + r.n_output; ++n) {
      const int slots = slots_at(policy, r.budget, r.n_prompt, n);
      p.slots_mean += slots;
      p.slots_peak = std::max(p.slots_peak, slots);
    }
    tokens += r.n_output;
    bytes +=
        static_cast<double>(sequence_bytes(shape, policy, r.budget, r.n_prompt, r.n_prompt + r.n_output));
  }
  p.slots_mean /= static_cast<double>(tokens);
  const double kv = p.slots_mean * static_cast<double>(g.token_bytes());
  const double eviction = eviction_bytes_per_step(g, policy, p.slots_mean);
  p.weight_bytes = shape.weight_bytes;
  p.kv_bytes = std::llround(kv * batch);
  p.eviction_bytes = std::llround(eviction * batch);
  p.memory_bytes = shape.resident_bytes + std::llround(batch * (bytes / static_cast<double>(mix.size()))) +
                   policy_workspace_bytes(policy, g, p.slots_peak);

  const double weights_s = static_cast<double>(shape.weight_bytes) / (gpu.weight_read_gbps.value * 1e9);
  const double kv_s = batch * (kv + eviction) / (gpu.kv_read_gbps.value * 1e9);
  const double launches_s = launches_of(gpu, g.n_layers, batch) * gpu.launch_us.value * 1e-6;
  const double overhead_s = gpu.step_overhead_us.value * 1e-6,
               sequences_s = batch * gpu.per_sequence_us.value * 1e-6;
  const double step = weights_s + kv_s + overhead_s + launches_s + sequences_s;
  p.step_ms = step * 1e3;
  p.tokens_per_s = batch / step;
  // First order, parameters independent.
  auto relative = [](const Sourced& s) { return s.value > 0 ? s.error / s.value : 0; };
  double variance = std::pow(weights_s * relative(gpu.weight_read_gbps), 2) +
                    std::pow(kv_s * relative(gpu.kv_read_gbps), 2) +
                    std::pow(overhead_s * relative(gpu.step_overhead_us), 2) +
                    std::pow(launches_s * relative(gpu.launch_us), 2) +
                    std::pow(sequences_s * relative(gpu.per_sequence_us), 2);
  p.tokens_per_s_error = p.tokens_per_s * std::sqrt(variance) / step;
  return p;
}

}  // namespace kvlapse
