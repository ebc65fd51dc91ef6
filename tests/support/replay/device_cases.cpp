#include "tests/support/replay/device_cases.h"

#include <fmt/format.h>

#include <cmath>
#include <mutex>

#include "replay/device_replay.h"
#include "replay/summary.h"
#include "replay/synthetic_rows.h"

namespace kvlapse {
namespace {

MemoryRows rows_of(const DeviceCase& at) {
  const CacheGeometry geometry{1, at.n_q_heads, at.n_kv_heads, at.head_dim, 0, DType::f32};
  MemoryRows rows = synthetic_rows(geometry, at.n_tokens, at.n_prompt, at.seed);
  if (at.sharpness != 1)
    for (int t = 0; t < at.n_tokens; ++t) {
      float* row = rows.row(0, 0, RowKind::q, t);
      for (int i = 0; i < at.n_q_heads * at.head_dim; ++i) row[i] *= at.sharpness;
    }
  if (at.quantum > 0)
    for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v})
      for (int t = 0; t < at.n_tokens; ++t) {
        const int n = (kind == RowKind::q ? at.n_q_heads : at.n_kv_heads) * at.head_dim;
        float* row = rows.row(0, 0, kind, t);
        for (int i = 0; i < n; ++i) row[i] = std::round(row[i] / at.quantum) * at.quantum;
      }
  return rows;
}

std::vector<ReplayConfig> configs_of(const DeviceCase& at, const std::vector<std::string>& specs,
                                     const std::vector<int>& budgets) {
  std::vector<ReplayConfig> configs;
  for (const std::string& spec : specs)
    for (int budget : budgets) {
      ReplayConfig config{make_policy(spec), budget};
      const bool holds_prompt = at.n_prompt < budget || !config.policy->info().rule.pin_prompt;
      if (holds_prompt) configs.push_back(std::move(config));
    }
  return configs;
}

}  // namespace

std::vector<std::string> device_policies() {
  return {"window",
          "streaming_llm:sinks=2",
          "window:pin_prompt=1",
          "random",
          "random:pin_prompt=1:seed=7",
          "random:granularity=layer",
          "h2o",
          "h2o:gqa=max",
          "h2o:gqa=sum:granularity=layer",
          "h2o:granularity=layer",
          "h2o:gqa=max:granularity=layer",
          "h2o@longflow",
          "tova",
          "tova:gqa=max",
          "tova:granularity=kv_head:ties=last",
          "vatp:sinks=2",
          "vatp:sinks=2:granularity=layer:gqa=sum",
          "vatp@longflow:gqa=max",
          "longflow",
          "longflow:granularity=kv_head:recent=3"};
}

std::string check_device_victims(ReplayDevice& device, const DeviceCase& at,
                                 const std::vector<std::string>& specs, const std::vector<int>& budgets) {
  const MemoryRows rows = rows_of(at);
  const std::vector<ReplayConfig> configs = configs_of(at, specs, budgets);
  std::vector<int32_t> expected(configs.size() * at.n_kv_heads * at.n_tokens, Retention::kHeld);
  std::mutex mutex;
  ReplayEngine(rows, {}).decide(0, configs, [&](size_t c, int, const EvictionPlan& plan) {
    const std::lock_guard lock(mutex);
    for (const Drop& drop : plan.drops)
      for (int h = 0; h < at.n_kv_heads; ++h)
        if (drop.kv_head == kWholeLayer || drop.kv_head == h)
          expected[(c * at.n_kv_heads + h) * at.n_tokens + raw(drop.pos)] = raw(plan.step);
  });
  const DeviceReplay found = DeviceReplayer(rows, {}, device).run_layer(0, 0, configs, false);
  for (size_t c = 0; c < configs.size(); ++c) {
    int first = at.n_tokens, at_head = 0, at_pos = 0, differences = 0;
    for (int h = 0; h < at.n_kv_heads; ++h)
      for (int pos = 0; pos < at.n_tokens; ++pos) {
        const size_t i = (c * at.n_kv_heads + h) * at.n_tokens + pos;
        if (std::min(found.last[i], at.n_tokens) == std::min(expected[i], at.n_tokens)) continue;
        ++differences;
        const int step = std::min(found.last[i], expected[i]);
        if (step < first) first = step, at_head = h, at_pos = pos;
      }
    if (differences > 0)
      return fmt::format(
          "{} at {}: {} positions differ; first at step {}: kv head {}, position {}: expected {}, found {}",
          canonical_spec(*configs[c].policy), configs[c].budget, differences, first, at_head, at_pos,
          expected[(c * at.n_kv_heads + at_head) * at.n_tokens + at_pos],
          found.last[(c * at.n_kv_heads + at_head) * at.n_tokens + at_pos]);
  }
  return "";
}

std::string check_device_metrics(ReplayDevice& device, const DeviceCase& at,
                                 const std::vector<std::string>& specs, const std::vector<int>& budgets,
                                 int step_begin, int step_end) {
  const MemoryRows rows = rows_of(at);
  const std::vector<ReplayConfig> configs = configs_of(at, specs, budgets);
  ReplayOptions options;
  options.step_begin = step_begin, options.step_end = step_end;
  const std::vector<SequenceMetrics> expected = ReplayEngine(rows, options).run(0, configs),
                                     found = DeviceReplayer(rows, options, device).run(0, configs);
  std::string failure;
  const auto close = [&](size_t c, const std::string& what, auto wanted, auto got, double tolerance) {
    const auto a = static_cast<double>(wanted), b = static_cast<double>(got);
    if (std::abs(a - b) <= tolerance * std::max(1.0, std::abs(a)) || !failure.empty()) return;
    failure = fmt::format("{} at {}: {}: expected {}, found {}", canonical_spec(*configs[c].policy),
                          configs[c].budget, what, a, b);
  };
  for (size_t c = 0; c < configs.size(); ++c) {
    const LayerMetrics &e = expected[c][0], &f = found[c][0];
    for (int q = 0; q < at.n_q_heads; ++q) {
      const QHeadMetrics &a = e.q_heads[q], &b = f.q_heads[q];
      const auto n = static_cast<double>(std::max<int64_t>(1, a.steps));
      const auto head = [&](const char* name) { return fmt::format("q head {}: {}", q, name); };
      close(c, head("steps"), a.steps, b.steps, 0);
      close(c, head("low recall"), a.low_recall, b.low_recall, 0);
      close(c, head("recall"), a.recall / n, b.recall / n, 1e-5);
      close(c, head("missing"), a.missing / n, b.missing / n, 1e-5);
      // Where sinks have nearly all weight the CPU takes the rest as a difference of two nearly equal sums.
      close(c, head("recall without sinks"), a.recall_no_sinks / n, b.recall_no_sinks / n, 1e-3);
      close(c, head("top-k recall"), a.topk_recall / n, b.topk_recall / n, 1e-6);
      close(c, head("output error"), a.output_error / n, b.output_error / n, 2e-3);
      close(c, head("cosine error"), a.cosine_error / n, b.cosine_error / n, 2e-3);
      close(c, head("entropy"), a.entropy / n, b.entropy / n, 1e-5);
      close(c, head("query cosine"), a.query_cosine / n, b.query_cosine / n, 1e-5);
      for (double share : {0.1, 0.5, 0.9}) {
        close(c, head("missing sketch"), a.missing_sketch.quantile(share), b.missing_sketch.quantile(share),
              0.03);
        close(c, head("error sketch"), a.error_sketch.quantile(share), b.error_sketch.quantile(share), 0.03);
      }
      close(c, head("missing sketch count"), a.missing_sketch.count(), b.missing_sketch.count(), 0);
    }
    for (int h = 0; h < at.n_kv_heads; ++h) {
      const KvHeadMetrics &a = e.kv_heads[h], &b = f.kv_heads[h];
      const auto head = [&](const char* name) { return fmt::format("kv head {}: {}", h, name); };
      close(c, head("steps"), a.steps, b.steps, 0);
      close(c, head("held"), a.held_sum, b.held_sum, 0);
      close(c, head("held peak"), a.held_peak, b.held_peak, 0);
      close(c, head("retained"), a.retained, b.retained, 1e-12);
      close(c, head("evictions"), a.evictions, b.evictions, 0);
      close(c, head("prompt evictions"), a.prompt_evictions, b.prompt_evictions, 0);
      for (int k = 0; k < kTokenClasses; ++k) {
        close(c, head("class"), a.evicted_by_class[k], b.evicted_by_class[k], 0);
        close(c, head("class lifetime"), a.lifetime_by_class[k], b.lifetime_by_class[k], 0);
      }
      if (a.lifetime_sketch.bytes() != b.lifetime_sketch.bytes()) close(c, head("lifetime sketch"), 0, 1, 0);
      close(c, head("revived"), a.revived, b.revived, 0);
      close(c, head("future missed"), a.future_missed, b.future_missed, 1e-5);
      close(c, head("future mass"), a.future_mass, b.future_mass, 1e-5);
      close(c, head("churn"), a.churn, b.churn, 1e-12);
      close(c, head("prompt kept"), a.prompt_kept, b.prompt_kept, 0);
    }
    if (e.held_by_step != f.held_by_step) close(c, "held by step", 0, 1, 0);
    for (size_t i = 0; i < e.series.size(); ++i) {
      if (std::isnan(e.series[i]) != std::isnan(f.series[i])) close(c, fmt::format("series {}", i), 0, 1, 0);
      if (!std::isnan(e.series[i])) close(c, fmt::format("series {}", i), e.series[i], f.series[i], 4e-3);
    }
  }
  return failure;
}

}  // namespace kvlapse
