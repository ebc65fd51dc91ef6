#include "replay/score_probe.h"

#include <algorithm>
#include <cmath>

#include "core/base/vector_math.h"
#include "replay/statistics.h"

namespace kvlapse {

void ScoreProbe::take(CacheSite& site, LayerInputs& inputs, const SharedLayer& shared, int step) {
  site.evictor().count_sensitivity(true);
  const CacheGeometry& g = shared.geometry();
  const auto dim = static_cast<size_t>(g.head_dim);
  const EvictionRule& rule = site.rule();
  const int first_free = std::max(rule.sinks, rule.pin_prompt ? shared.sequence().n_prompt : 0);
  const int last_free = step - rule.recent_slots(site.budget());
  errors_.resize(g.n_kv_heads);
  free_.resize(g.n_kv_heads);
  for (int h = 0; h < g.n_kv_heads; ++h) {
    const std::span<const Pos> positions = site.table().positions(h);
    errors_[h].assign(positions.size(), 0.0f);
    free_[h].resize(positions.size());
    for (size_t s = 0; s < positions.size(); ++s)
      free_[h][s] = raw(positions[s]) >= first_free && raw(positions[s]) <= last_free;
    for (int q = h * g.group(); q < (h + 1) * g.group(); ++q) {
      const std::span<const float> weights = inputs.attention(q), output = inputs.output(q);
      const float oo = dot(output.data(), output.data(), dim);
      for (size_t s = 0; s < positions.size(); ++s) {
        const float* v = shared.value(h, raw(positions[s]));
        const float square = oo + dot(v, v, dim) - 2 * dot(output.data(), v, dim);
        errors_[h][s] += weights[s] / std::max(1.0f - weights[s], 1e-7f) * std::sqrt(std::max(square, 0.0f));
      }
    }
  }
}

std::span<const double> ScoreProbe::correlations(const Scores& scores) {
  correlations_.clear();
  for (int r = 0; r < scores.n_rows(); ++r) {
    const std::span<const float> row = scores.row(r);
    a_.clear();
    b_.clear();
    for (size_t s = 0; s < std::min(row.size(), errors_[r].size()); ++s) {
      if (!free_[r][s]) continue;
      float error = errors_[r][s];
      if (scores.shared())
        for (size_t h = 1; h < errors_.size(); ++h) error += errors_[h][s];
      a_.push_back(row[s]);
      b_.push_back(error);
    }
    correlations_.push_back(spearman(a_, b_));
  }
  return correlations_;
}

}  // namespace kvlapse
