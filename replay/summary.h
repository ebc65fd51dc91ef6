// From the metrics of layers and heads to the named numbers that results files, tables and --json show. The
// list of names is fixed by `summarise`; replay/FORMAT.md explains each.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "replay/replay_engine.h"

namespace kvlapse {

struct NamedValue {
  std::string name;
  double value = 0;
};

// What one sequence under one configuration adds to a summary.
struct SequenceResult {
  SequenceMetrics layers;
  int n_tokens = 0, n_prompt = 0;
  int budget_slots = 0;
};

// Over all layers, heads and sequences given.
std::vector<NamedValue> summarise(const CacheGeometry& geometry, const PolicyInfo& policy,
                                  const std::vector<const SequenceResult*>& sequences);
double value_of(const std::vector<NamedValue>& values, std::string_view name);  // NaN when absent
bool is_integer_metric(std::string_view name);                                  // counts and bytes
bool higher_is_better(std::string_view name);

struct HeadSummary {
  int layer = 0, q_head = 0;
  std::string metric;
  double mean = 0, p10 = 0, p50 = 0, p90 = 0;
};
std::vector<HeadSummary> summarise_heads(int layer_begin,
                                         const std::vector<const SequenceResult*>& sequences);

struct NamedSketch {
  std::string metric;
  Sketch sketch;
};
std::vector<NamedSketch> merged_sketches(const std::vector<const SequenceResult*>& sequences);

struct LayerSeries {
  std::string metric;
  int layer = 0;
  std::vector<float> data;  // [Hq][kSeriesBins], mean over the sequences
};
std::vector<LayerSeries> merged_series(int layer_begin, const std::vector<const SequenceResult*>& sequences);

}  // namespace kvlapse
