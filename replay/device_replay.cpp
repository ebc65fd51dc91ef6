#include "replay/device_replay.h"

#include <tbb/task_arena.h>

#include <algorithm>
#include <limits>
#include <mutex>

#include "replay/parallel_for.h"

namespace kvlapse {
namespace {

constexpr int kRowsAtOnce = 64;  // read by one thread

// A recording that ends with its prompt.
class PromptRows final : public RowSource {
 public:
  explicit PromptRows(const RowSource& all) : all_(all) {}
  const CacheGeometry& geometry() const override { return all_.geometry(); }
  int layer_begin() const override { return all_.layer_begin(); }
  int layer_end() const override { return all_.layer_end(); }
  int n_sequences() const override { return all_.n_sequences(); }
  RowSequence sequence(int s) const override {
    RowSequence sequence = all_.sequence(s);
    sequence.n_tokens = sequence.n_prompt;
    return sequence;
  }
  double rope_theta() const override { return all_.rope_theta(); }
  void rows(int s, int layer, RowKind kind, int first, int n, float* out) const override {
    all_.rows(s, layer, kind, first, n, out);
  }

 private:
  const RowSource& all_;
};

int layer_budget(const RowSource& source, int layer, const ReplayConfig& config) {
  return config.policy->layer_budget(layer, source.geometry().n_layers, config.budget);
}

}  // namespace

DeviceReplayer::DeviceReplayer(const RowSource& source, ReplayOptions options, ReplayDevice& device)
    : source_(source), options_(std::move(options)), engine_(source, options_), device_(device) {}

DeviceReplay DeviceReplayer::run_layer(int sequence, int layer, const std::vector<ReplayConfig>& configs,
                                       bool metrics, bool time_stages) const {
  static_assert(DeviceReplay::kTop == kTopK && DeviceReplay::kHorizon == kFutureHorizon &&
                DeviceReplay::kSinks == kSinkTokens && DeviceReplay::kHot == kHotAttention);
  const RowSequence rows = source_.sequence(sequence);
  const CacheGeometry& g = source_.geometry();
  DeviceReplay replay;
  replay.geometry = g;
  replay.layer = layer;
  replay.n_tokens = rows.n_tokens;
  replay.n_prompt = rows.n_prompt;
  replay.step_begin = engine_.scope().step_begin;
  replay.step_end = std::min(rows.n_tokens, engine_.scope().step_end);
  replay.metrics = metrics;
  replay.time_stages = time_stages;
  replay.n_series = kSeriesBins;
  replay.rows = [&](char what, int first, int n, float* out) {
    const RowKind kind = what == 'q' ? RowKind::q : what == 'k' ? RowKind::k : RowKind::v;
    const auto width = static_cast<size_t>((what == 'q' ? g.n_q_heads : g.n_kv_heads) * g.head_dim);
    parallel_for(0, (n + kRowsAtOnce - 1) / kRowsAtOnce, [&](int i) {
      const int from = i * kRowsAtOnce;
      source_.rows(sequence, layer, kind, first + from, std::min(kRowsAtOnce, n - from),
                   out + static_cast<size_t>(from) * width);
    });
  };
  std::vector<ReplayConfig> cut;
  std::vector<size_t> cut_index;
  for (size_t c = 0; c < configs.size(); ++c) {
    const PolicyInfo& info = configs[c].policy->info();
    if (!supports(*configs[c].policy))
      fail("replay: policy {}: not served by {}", info.name, device_.describe());
    DeviceReplayConfig config;
    config.score = info.device;
    config.rule = info.rule;
    config.budget = layer_budget(source_, layer, configs[c]);
    check_budget(*configs[c].policy, config.budget, rows.n_prompt);
    if (info.device == DeviceScore::random)
      config.seed = static_cast<uint64_t>(configs[c].policy->parameter("seed"));
    if (rows.n_prompt > config.budget - configs[c].policy->prompt_rule(config.budget).headroom) {
      cut.push_back(configs[c]);
      cut_index.push_back(c);
    }
    replay.configs.push_back(std::move(config));
  }
  if (!cut.empty()) {  // by the policies themselves
    const PromptRows prompt(source_);
    ReplayOptions options;
    options.threads = options_.threads;
    options.memory_bytes = options_.memory_bytes;
    options.layer_begin = layer, options.layer_end = layer + 1;
    ReplayEngine(prompt, options).decide(sequence, cut, [&](size_t c, int, const EvictionPlan& plan) {
      std::vector<std::vector<int32_t>>& kept = replay.configs[cut_index[c]].prompt_kept;
      for (const std::vector<Slot>& slots : plan.keep) {
        kept.emplace_back();
        for (Slot slot : slots) kept.back().push_back(raw(slot));
      }
    });
  }
  device_.run(replay);
  return replay;
}

LayerMetrics DeviceReplayer::measure(const DeviceReplay& done, const RowSequence& sequence,
                                     std::span<const double> older, size_t config) const {
  const CacheGeometry& g = source_.geometry();
  const int group = g.group(), n_tokens = sequence.n_tokens, n_prompt = sequence.n_prompt;
  LayerMetrics out;
  const MetricScope& scope = engine_.scope();
  out.scope = {std::max(0, scope.head_begin), std::min(g.n_kv_heads, scope.head_end),
               std::max(0, scope.step_begin), std::min(n_tokens, scope.step_end)};
  const int begin = std::max(n_prompt, out.scope.step_begin), end = out.scope.step_end;
  out.q_heads.resize(g.n_q_heads);
  out.kv_heads.resize(g.n_kv_heads);
  out.held_by_step.resize(n_tokens);
  const auto plane = static_cast<size_t>(g.n_q_heads) * kSeriesBins;
  out.series.assign(kSeriesKinds * plane, std::numeric_limits<float>::quiet_NaN());
  std::vector<std::vector<int32_t>> held_by_step(g.n_kv_heads);
  parallel_for(out.scope.head_begin, out.scope.head_end, [&](int h) {
    std::vector<int32_t>& own_held = held_by_step[h];
    own_held.resize(n_tokens);
    std::vector<int> drops(n_tokens);
    const size_t row = config * static_cast<size_t>(g.n_kv_heads) + static_cast<size_t>(h);
    const int32_t* last = done.last.data() + row * n_tokens;
    const int32_t* last_hot = done.last_hot.data() + static_cast<size_t>(h) * n_tokens;
    KvHeadMetrics& m = out.kv_heads[h];
    for (int pos = 0; pos < n_tokens; ++pos) {
      const int step = last[pos];
      if (step >= n_tokens) continue;
      ++drops[step];
      if (!out.scope.has_step(step)) continue;
      const auto c = static_cast<size_t>(token_class(pos, step, n_prompt));
      ++m.evictions;
      m.prompt_evictions += step < n_prompt;
      ++m.evicted_by_class[c];
      m.lifetime_by_class[c] += step - pos;
      m.lifetime_sketch.add(static_cast<float>(step - pos));
      m.revived += last_hot[pos] > step;
    }
    std::vector<double> retained(kSeriesBins);
    std::vector<int> steps(kSeriesBins);
    int deciding = 0;  // steps in a row that have evicted
    int held = n_prompt - (n_prompt > 0 ? drops[n_prompt - 1] : 0), before = -1;
    for (int t = n_prompt; t < end; ++t) {
      ++held;  // what attention sees
      if (t >= begin) {
        const double share = static_cast<double>(held) / (t + 1);
        ++m.steps;
        m.retained += share;
        m.held_sum += held;
        m.held_peak = std::max(m.held_peak, held);
        own_held[t] = held;
        if (before >= 0) m.churn += 1.0 - static_cast<double>(before - drops[t - 1]) / (held + drops[t - 1]);
        const auto bin = static_cast<size_t>(t) * kSeriesBins / static_cast<size_t>(n_tokens);
        retained[bin] += share;
        ++steps[bin];
        const size_t at = static_cast<size_t>(t) * g.n_kv_heads + h;
        if (deciding >= kFutureHorizon && t - kFutureHorizon >= out.scope.step_begin) {
          m.future_mass += older[at];
        } else {
          for (int j = 1; j <= kFutureHorizon && t - j >= out.scope.step_begin; ++j)
            if (drops[t - j] > 0) m.future_mass += done.older[at * kFutureHorizon + j - 1];
        }
      }
      deciding = drops[t] > 0 ? deciding + 1 : 0;
      before = held;
      held -= drops[t];
    }
    m.future_missed = done.future_missed[row];
    m.prompt_tokens = n_prompt;
    for (int pos = 0; pos < n_prompt; ++pos) m.prompt_kept += last[pos] >= n_tokens;
    for (int q = h * group; q < (h + 1) * group; ++q) {
      const size_t q_row = config * static_cast<size_t>(g.n_q_heads) + static_cast<size_t>(q);
      const DeviceHeadMetrics& from = done.heads[q_row];
      QHeadMetrics& to = out.q_heads[q];
      to.steps = end - begin;
      to.low_recall = from.low_recall;
      to.recall = from.recall;
      to.recall_no_sinks = from.recall_no_sinks;
      to.output_error = from.output_error;
      to.cosine_error = from.cosine_error;
      to.topk_recall = from.topk_recall;
      to.missing = from.missing;
      to.entropy = done.entropy[q];
      to.query_cosine = done.query_cosine[q];
      const uint32_t* counts = done.sketches.data() + q_row * 4 * sketch_bins::kBins;
      Sketch* const sketches[] = {&to.missing_sketch, &to.missing_no_sinks_sketch, &to.error_sketch,
                                  &to.cosine_sketch};
      for (int k = 0; k < 4; ++k)
        sketches[k]->add({counts + k * sketch_bins::kBins, static_cast<size_t>(sketch_bins::kBins)});
      const float* series = done.series.data() + q_row * 2 * kSeriesBins;
      for (size_t b = 0; b < kSeriesBins; ++b) {
        const auto at = [&](SeriesKind kind) -> float& {
          return out.series[static_cast<size_t>(kind) * plane + static_cast<size_t>(q) * kSeriesBins + b];
        };
        at(SeriesKind::recall) = series[b];
        at(SeriesKind::output_error) = series[kSeriesBins + b];
        if (steps[b] > 0) at(SeriesKind::retained) = static_cast<float>(retained[b] / steps[b]);
      }
    }
  });
  for (const std::vector<int32_t>& own : held_by_step)
    for (size_t t = 0; t < own.size(); ++t) out.held_by_step[t] += own[t];
  return out;
}

std::vector<SequenceMetrics> DeviceReplayer::run(int sequence,
                                                 const std::vector<ReplayConfig>& configs) const {
  const int n_layers = engine_.layer_end() - engine_.layer_begin();
  const RowSequence rows = source_.sequence(sequence);
  std::vector<SequenceMetrics> results(configs.size(), SequenceMetrics(n_layers));
  const int threads = options_.threads > 0 ? options_.threads : tbb::this_task_arena::max_concurrency();
  tbb::task_arena arena(threads);
  for (int i = 0; i < n_layers; ++i) {
    arena.execute([&] {
      const DeviceReplay done = run_layer(sequence, engine_.layer_begin() + i, configs, true);
      // Where every step of the horizon evicted.
      std::vector<double> older(done.last_hot.size());
      parallel_for(0, (rows.n_tokens + kRowsAtOnce - 1) / kRowsAtOnce, [&](int block) {
        const auto n_heads = static_cast<size_t>(source_.geometry().n_kv_heads);
        const auto end = static_cast<size_t>(std::min((block + 1) * kRowsAtOnce, rows.n_tokens)) * n_heads;
        for (size_t at = static_cast<size_t>(block) * kRowsAtOnce * n_heads; at < end; ++at)
          for (int j = 0; j < kFutureHorizon; ++j) older[at] += done.older[at * kFutureHorizon + j];
      });
      parallel_for(size_t{0}, configs.size(),
                   [&](size_t c) { results[c][i] = measure(done, rows, older, c); });
    });
    if (options_.progress && !options_.progress(i + 1, n_layers)) throw Interrupted("replay: interrupted");
  }
  return results;
}

}  // namespace kvlapse
