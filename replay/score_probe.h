// ScoreProbe: at a few sampled decisions, compares a policy's scores with the exact leave-one-out output
// error of every held token, alpha / (1 - alpha) |o - v| over the held set, mean over the query heads that
// share the victim. Tests the assumption behind every score that stands for output error. Also asks the
// evictor how many of these victims fp16 scores, one unit in the last place or the other tie order would
// change. One per configuration; not thread-safe.
#pragma once

#include <span>
#include <vector>

#include "core/engine/cache_site.h"
#include "replay/shared_layer.h"

namespace kvlapse {

inline constexpr int kProbeSteps = 256;  // one decision of so many steps is sampled

class ScoreProbe {
 public:
  // Before the decision of `step`: leave-one-out errors of what is held. Turns the evictor's sensitivity
  // count on.
  void take(CacheSite& site, LayerInputs& inputs, const SharedLayer& shared, int step);
  // Behind it: rank correlation of each score row with them, over the tokens that could have been evicted.
  std::span<const double> correlations(const Scores& scores);

 private:
  std::vector<std::vector<float>> errors_;  // per kv head, by slot: sum over its query heads
  std::vector<std::vector<char>> free_;     // per kv head, by slot: may be evicted
  std::vector<double> correlations_;
  std::vector<float> a_, b_;
};

}  // namespace kvlapse
