// ReplayEngine: many configurations (policy x budget) over one recording, open loop. Each configuration runs
// the same CacheSite as live decode over a ReplayMemory; what they have in common (rows, logits,
// exponentials, full-cache attention) is computed once a layer, in blocks of steps. Layers and configurations
// run in parallel; results do not depend on the thread count, the blocking or the other configurations.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "core/policy/spec.h"
#include "replay/metrics.h"
#include "replay/score_probe.h"

namespace kvlapse {

struct ReplayConfig {
  std::shared_ptr<const Policy> policy;
  int budget = 0;  // slots per kv head
};

struct ReplayOptions {
  int threads = 0;  // 0: all
  size_t memory_bytes =
      size_t{768} << 20;  // of working memory; fewer layers at a time, then fewer steps a block
  int layer_begin = -1, layer_end = -1;  // -1: all recorded ones
  // What is measured: kv heads with their query heads, and steps (positions). All heads and the steps before
  // still decide; steps behind are not replayed. -1: all.
  int head_begin = -1, head_end = -1;
  int step_begin = -1, step_end = -1;
  // Layers done and in total, called from any thread. Returning false stops the replay (Interrupted is
  // thrown).
  std::function<bool(int done, int total)> progress = {};
};

struct Interrupted : Error {
  using Error::Error;
};

// Metrics of one configuration over one sequence, by layer.
using SequenceMetrics = std::vector<LayerMetrics>;

// One configuration over the loaded blocks of one (sequence, layer).
class ConfigRun {
 public:
  // Called with every plan, prompt cut included, before the next token.
  using PlanVisitor = std::function<void(const EvictionPlan&)>;
  // `future`: for oracles, null when no policy asks for it.
  // `scope`: what is measured; null when nothing is.
  ConfigRun(const SharedLayer& shared, const ReplayConfig& config, const MetricScope* scope,
            FutureInputs* future, PlanVisitor visitor = {});
  // Runs the steps of the loaded block; their metrics are then due, see MetricsCollector.
  void advance();
  MetricsCollector* collector() { return collector_.get(); }
  LayerMetrics finish() { return collector_->finish(); }
  const CacheSite& site() const { return *site_; }

 private:
  void evicted(const EvictionPlan* plan);

  const SharedLayer& shared_;
  Retention retention_;
  ReplayMemory memory_;
  std::unique_ptr<CacheSite> site_;
  std::unique_ptr<MetricsCollector> collector_;
  PlanVisitor visitor_;
  bool selects_;
  ScoreProbe probe_;
  int next_probe_ = kProbeSteps;  // step from which the next decision is probed
  int next_ = 0;                  // position of the next token
};

// What SharedLayer must hold for these configurations.
SharedLayerNeeds shared_needs(const std::vector<ReplayConfig>& configs, bool metrics);
// First step whose attention some configuration reads, a multiple of kMetricSteps.
int first_attended_step(const std::vector<ReplayConfig>& configs, const RowSequence& sequence);

class ReplayEngine {
 public:
  ReplayEngine(const RowSource& source, ReplayOptions options);
  // [configs] results of one sequence. Throws Error: a budget below a protected set, bad rows, too little
  // memory.
  std::vector<SequenceMetrics> run(int sequence, const std::vector<ReplayConfig>& configs) const;
  // The same without metrics: every eviction plan, in order of steps per (config, layer); different ones
  // concurrently.
  void decide(int sequence, const std::vector<ReplayConfig>& configs,
              const std::function<void(size_t config, int layer, const EvictionPlan&)>& visitor) const;

  int layer_begin() const { return layer_begin_; }
  int layer_end() const { return layer_end_; }
  const MetricScope& scope() const { return scope_; }

 private:
  using Runs = std::vector<std::unique_ptr<ConfigRun>>;
  void over_layers(int sequence, const std::vector<ReplayConfig>& configs, bool metrics,
                   const std::function<ConfigRun::PlanVisitor(size_t config, int layer)>& visitor,
                   const std::function<void(int layer, Runs&)>& finished) const;
  const RowSource& source_;
  ReplayOptions options_;
  int layer_begin_, layer_end_;
  MetricScope scope_;
};

}  // namespace kvlapse
