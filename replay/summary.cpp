#include "replay/summary.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <tuple>

namespace kvlapse {
namespace {

constexpr std::string_view kSeriesNames[kSeriesKinds] = {"recall", "output_error", "retained"};

double ratio(double a, double b) {
  return b > 0 ? a / b : 0.0;
}

// Quantile of recall from the sketch of what is missing: exactly 1 when nothing is.
double recall_quantile(const Sketch& missing, double q) {
  return 1.0 - missing.quantile(1.0 - q);
}

}  // namespace

std::vector<NamedValue> summarise(const CacheGeometry& g, const PolicyInfo& policy,
                                  const std::vector<const SequenceResult*>& sequences) {
  QHeadMetrics q;
  KvHeadMetrics kv;
  ProbeMetrics probe;
  int64_t slots_peak_sum = 0, slot_steps = 0, full_peak_sum = 0, full_steps = 0;
  double state_bytes = 0;
  int n_heads = 0;
  for (const SequenceResult* s : sequences) {
    std::vector<int64_t> held(s->n_tokens);
    int head_peak = 0;
    n_heads = 0;
    int step_begin = 0, step_end = s->n_tokens;
    for (const LayerMetrics& layer : s->layers) {
      for (const QHeadMetrics& head : layer.q_heads) q.merge(head);
      for (const KvHeadMetrics& head : layer.kv_heads) {
        kv.merge(head);
        head_peak = std::max(head_peak, head.held_peak);
      }
      n_heads += layer.scope.head_end - layer.scope.head_begin;
      step_begin = layer.scope.step_begin;
      step_end = layer.scope.step_end;
      probe.merge(layer.probe);
      for (size_t t = 0; t < held.size(); ++t) held[t] += layer.held_by_step[t];
    }
    slots_peak_sum += held.empty() ? 0 : *std::max_element(held.begin(), held.end());
    for (int64_t h : held) slot_steps += h;
    full_peak_sum += static_cast<int64_t>(step_end) * n_heads;
    for (int t = std::max(s->n_prompt, step_begin); t < step_end; ++t)
      full_steps += static_cast<int64_t>(t + 1) * n_heads;
    state_bytes += 4.0 * (policy.state_columns + policy.workspace_floats_per_slot) * head_peak * n_heads +
                   static_cast<double>(dtype_bytes(g.dtype)) * std::min(policy.query_window, s->n_tokens) *
                       g.group() * g.head_dim * n_heads;
  }
  const auto row_bytes = static_cast<int64_t>(g.head_token_bytes());
  const auto steps = static_cast<double>(q.steps), kv_steps = static_cast<double>(kv.steps);
  const auto evictions = static_cast<double>(kv.evictions);
  int64_t lifetime = 0;
  for (int64_t l : kv.lifetime_by_class) lifetime += l;

  std::vector<NamedValue> values = {
      {"retained_mean", ratio(kv.retained, kv_steps)},
      {"retained_peak", ratio(static_cast<double>(slots_peak_sum), static_cast<double>(full_peak_sum))},
      {"footprint_ratio", ratio(static_cast<double>(slot_steps), static_cast<double>(full_steps))},
      {"slots_mean", ratio(static_cast<double>(kv.held_sum), kv_steps)},
      {"slots_peak", static_cast<double>(kv.held_peak)},
      {"kv_bytes_peak", static_cast<double>(slots_peak_sum * row_bytes)},
      {"kv_byte_steps", static_cast<double>(slot_steps) * static_cast<double>(row_bytes)},
      {"state_bytes_peak", state_bytes},
      {"evictions", evictions},
      {"prompt_evictions", static_cast<double>(kv.prompt_evictions)},
      {"recall_mean", ratio(q.recall, steps)},
      {"recall_p10", recall_quantile(q.missing_sketch, 0.1)},
      {"recall_p50", recall_quantile(q.missing_sketch, 0.5)},
      {"recall_below_90", ratio(static_cast<double>(q.low_recall), steps)},
      {"recall_no_sinks_mean", ratio(q.recall_no_sinks, steps)},
      {"recall_no_sinks_p10", recall_quantile(q.missing_no_sinks_sketch, 0.1)},
      {"missing_mass", q.missing},
      {"output_error_mean", ratio(q.output_error, steps)},
      {"output_error_p50", q.error_sketch.quantile(0.5)},
      {"output_error_p90", q.error_sketch.quantile(0.9)},
      {"cosine_error_mean", ratio(q.cosine_error, steps)},
      {"cosine_error_p90", q.cosine_sketch.quantile(0.9)},
      {"topk_recall", ratio(q.topk_recall, steps)},
      {"future_missed_mass", ratio(kv.future_missed, kv.future_mass)},
      {"churn_mean", ratio(kv.churn, kv_steps)},
      {"revived_share", ratio(static_cast<double>(kv.revived), evictions)},
      {"lifetime_mean", ratio(static_cast<double>(lifetime), evictions)},
      {"lifetime_p50", kv.lifetime_sketch.quantile(0.5)},
      {"entropy_mean", ratio(q.entropy, steps)},
      {"query_cosine_mean", ratio(q.query_cosine, steps)},
      {"prompt_survival", ratio(static_cast<double>(kv.prompt_kept), static_cast<double>(kv.prompt_tokens))},
  };
  if (probe.correlations > 0)
    values.push_back({"score_rank_correlation", probe.correlation / static_cast<double>(probe.correlations)});
  if (probe.victims > 0) {
    const auto victims = static_cast<double>(probe.victims);
    values.push_back({"sampled_victims", victims});
    values.push_back({"fp16_flip_share", static_cast<double>(probe.fp16) / victims});
    values.push_back({"ulp_flip_share", static_cast<double>(probe.ulp) / victims});
    values.push_back({"tie_flip_share", static_cast<double>(probe.ties) / victims});
  }
  for (int c = 0; c < kTokenClasses; ++c) {
    const std::string name = token_class_name(static_cast<TokenClass>(c));
    values.push_back({"evicted_" + name, static_cast<double>(kv.evicted_by_class[c])});
    values.push_back({"lifetime_mean_" + name, ratio(static_cast<double>(kv.lifetime_by_class[c]),
                                                     static_cast<double>(kv.evicted_by_class[c]))});
  }
  return values;
}

double value_of(const std::vector<NamedValue>& values, std::string_view name) {
  for (const NamedValue& v : values)
    if (v.name == name) return v.value;
  return std::numeric_limits<double>::quiet_NaN();
}

bool is_integer_metric(std::string_view name) {
  for (std::string_view prefix :
       {"kv_bytes", "kv_byte_", "state_bytes", "slots_peak", "evictions", "prompt_evictions", "evicted_",
        "sampled_victims", "measured_on_gpu", "fitted_on_this_trace"})
    if (name.starts_with(prefix)) return true;
  return false;
}

bool higher_is_better(std::string_view name) {
  if (name == "recall_below_90") return false;
  for (std::string_view prefix : {"recall", "topk", "prompt_survival", "lifetime"})
    if (name.starts_with(prefix)) return true;
  return false;
}

std::vector<HeadSummary> summarise_heads(int layer_begin,
                                         const std::vector<const SequenceResult*>& sequences) {
  std::vector<HeadSummary> heads;
  const size_t n_layers = sequences.at(0)->layers.size();
  for (size_t layer = 0; layer < n_layers; ++layer) {
    const size_t n_q = sequences[0]->layers[layer].q_heads.size(),
                 n_kv = sequences[0]->layers[layer].kv_heads.size();
    const MetricScope& scope = sequences[0]->layers[layer].scope;
    for (size_t h = 0; h < n_q; ++h) {
      if (!scope.has_head(static_cast<int>(h * n_kv / n_q))) continue;
      QHeadMetrics q;
      KvHeadMetrics kv;
      for (const SequenceResult* s : sequences) {
        q.merge(s->layers[layer].q_heads[h]);
        kv.merge(s->layers[layer].kv_heads[h * n_kv / n_q]);
      }
      const auto steps = static_cast<double>(q.steps);
      auto add = [&](std::string metric, double mean, double p10, double p50, double p90) {
        heads.push_back({layer_begin + static_cast<int>(layer), static_cast<int>(h), std::move(metric), mean,
                         p10, p50, p90});
      };
      auto add_recall = [&](std::string metric, double sum, const Sketch& missing) {
        add(std::move(metric), ratio(sum, steps), recall_quantile(missing, 0.1),
            recall_quantile(missing, 0.5), recall_quantile(missing, 0.9));
      };
      auto add_error = [&](std::string metric, double sum, const Sketch& sketch) {
        add(std::move(metric), ratio(sum, steps), sketch.quantile(0.1), sketch.quantile(0.5),
            sketch.quantile(0.9));
      };
      add_recall("recall", q.recall, q.missing_sketch);
      add_recall("recall_no_sinks", q.recall_no_sinks, q.missing_no_sinks_sketch);
      add_error("output_error", q.output_error, q.error_sketch);
      add_error("cosine_error", q.cosine_error, q.cosine_sketch);
      int64_t lifetime = 0;
      for (int64_t l : kv.lifetime_by_class) lifetime += l;
      add("lifetime", ratio(static_cast<double>(lifetime), static_cast<double>(kv.evictions)),
          kv.lifetime_sketch.quantile(0.1), kv.lifetime_sketch.quantile(0.5),
          kv.lifetime_sketch.quantile(0.9));
    }
  }
  std::sort(heads.begin(), heads.end(), [](const HeadSummary& a, const HeadSummary& b) {
    return std::tie(a.layer, a.q_head, a.metric) < std::tie(b.layer, b.q_head, b.metric);
  });
  return heads;
}

std::vector<NamedSketch> merged_sketches(const std::vector<const SequenceResult*>& sequences) {
  Sketch missing, missing_no_sinks, error, cosine, lifetime;
  for (const SequenceResult* s : sequences)
    for (const LayerMetrics& layer : s->layers) {
      for (const QHeadMetrics& q : layer.q_heads) {
        missing.merge(q.missing_sketch);
        missing_no_sinks.merge(q.missing_no_sinks_sketch);
        error.merge(q.error_sketch);
        cosine.merge(q.cosine_sketch);
      }
      for (const KvHeadMetrics& kv : layer.kv_heads) lifetime.merge(kv.lifetime_sketch);
    }
  return {{"cosine_error", cosine},
          {"lifetime", lifetime},
          {"missing_mass", missing},
          {"missing_mass_no_sinks", missing_no_sinks},
          {"output_error", error}};
}

std::vector<LayerSeries> merged_series(int layer_begin, const std::vector<const SequenceResult*>& sequences) {
  std::vector<LayerSeries> merged;
  for (int kind = 0; kind < kSeriesKinds; ++kind)
    for (size_t layer = 0; layer < sequences.at(0)->layers.size(); ++layer) {
      const size_t n = sequences[0]->layers[layer].series.size() / kSeriesKinds;
      LayerSeries series{std::string(kSeriesNames[kind]), layer_begin + static_cast<int>(layer),
                         std::vector<float>(n)};
      for (size_t i = 0; i < n; ++i) {
        double sum = 0;
        int count = 0;
        for (const SequenceResult* s : sequences) {
          const float value = s->layers[layer].series[static_cast<size_t>(kind) * n + i];
          if (std::isnan(value)) continue;
          sum += value;
          ++count;
        }
        series.data[i] =
            count > 0 ? static_cast<float>(sum / count) : std::numeric_limits<float>::quiet_NaN();
      }
      merged.push_back(std::move(series));
    }
  return merged;
}

}  // namespace kvlapse
