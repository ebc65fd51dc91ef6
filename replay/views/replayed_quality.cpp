#include "replay/views/replayed_quality.h"

#include <algorithm>
#include <cmath>

namespace kvlapse {
namespace {

// Mean of the rows of all layers, bin by bin.
std::vector<float> mean_series(const ResultCell& cell, std::string_view metric, int n_q_heads) {
  std::vector<double> sums;
  std::vector<int> counts;
  for (const LayerSeries& series : cell.series) {
    if (series.metric != metric || n_q_heads == 0) continue;
    const size_t n_bins = series.data.size() / static_cast<size_t>(n_q_heads);
    sums.resize(std::max(sums.size(), n_bins), 0);
    counts.resize(sums.size(), 0);
    for (size_t i = 0; i < n_bins * static_cast<size_t>(n_q_heads); ++i) {
      if (std::isnan(series.data[i])) continue;
      sums[i % n_bins] += static_cast<double>(series.data[i]);
      ++counts[i % n_bins];
    }
  }
  std::vector<float> means;
  for (size_t i = 0; i < sums.size(); ++i)
    means.push_back(counts[i] > 0 ? static_cast<float>(sums[i] / counts[i]) : NAN);
  return means;
}

std::vector<float> head_means(const ResultCell& cell, std::string_view metric,
                              const CacheGeometry& geometry) {
  std::vector<float> means(static_cast<size_t>(geometry.n_layers) * geometry.n_kv_heads, 0);
  std::vector<int> counts(means.size(), 0);
  for (const HeadSummary& head : cell.heads) {
    const int kv_head = head.q_head / geometry.group();
    if (head.metric != metric || head.layer >= geometry.n_layers || kv_head >= geometry.n_kv_heads) continue;
    const size_t at = static_cast<size_t>(head.layer) * geometry.n_kv_heads + kv_head;
    means[at] += static_cast<float>(head.mean);
    ++counts[at];
  }
  for (size_t i = 0; i < means.size(); ++i)
    means[i] = counts[i] > 0 ? means[i] / static_cast<float>(counts[i]) : NAN;
  return means;
}

}  // namespace

std::optional<ReplayedQuality> find_quality(const Results& results, const std::string& content_hash,
                                            const CacheGeometry& geometry, const std::string& policy,
                                            const std::string& budget) {
  const auto cell = std::ranges::find_if(results.cells, [&](const ResultCell& candidate) {
    return candidate.trace == content_hash && candidate.policy == policy && candidate.budget == budget;
  });
  if (cell == results.cells.end()) return {};
  return ReplayedQuality{.policy = policy,
                         .budget = budget,
                         .file = {},
                         .recall = mean_series(*cell, "recall", geometry.n_q_heads),
                         .output_error = mean_series(*cell, "output_error", geometry.n_q_heads),
                         .head_recall = head_means(*cell, "recall", geometry),
                         .head_error = head_means(*cell, "output_error", geometry)};
}

}  // namespace kvlapse
