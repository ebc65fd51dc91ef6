#include <algorithm>
#include <limits>
#include <vector>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// An upper bound of q.k within a page, from the page's smallest and largest key coordinates. Every token of a
// page scores alike; the newest page is always read.
class Quest final : public Policy {
 public:
  using Policy::Policy;

  int layer_budget(int layer, int /*n_layers*/, int budget) const override {
    if (layer < static_cast<int>(parameter("dense_layers"))) return std::numeric_limits<int>::max() / 2;
    const int page = static_cast<int>(parameter("page"));
    return std::max(budget / page, static_cast<int>(parameter("least_pages"))) * page;
  }

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int page = static_cast<int>(parameter("page")), newest = raw(at.step) / page, n_pages = newest + 1;
    const size_t d = at.geometry.head_dim;
    if (at.budget > raw(at.step)) return;  // everything is read
    thread_local std::vector<float> low, high, bounds, scores;
    for (int r = 0; r < out.n_rows(); ++r) {
      int bounded = -1;
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int q) {
        const int h = at.geometry.kv_head_of(q);
        std::span<const Pos> positions = at.positions(h);
        if (h != bounded) {
          std::span<const float> keys = inputs.keys(h);
          low.assign(n_pages * d, std::numeric_limits<float>::infinity());
          high.assign(n_pages * d, -std::numeric_limits<float>::infinity());
          for (size_t i = 0; i < positions.size(); ++i) {
            float* lowest = &low[static_cast<size_t>(raw(positions[i]) / page) * d];
            float* highest = &high[static_cast<size_t>(raw(positions[i]) / page) * d];
            for (size_t j = 0; j < d; ++j) {
              lowest[j] = std::min(lowest[j], keys[i * d + j]);
              highest[j] = std::max(highest[j], keys[i * d + j]);
            }
          }
          bounded = h;
        }
        const float* query = &inputs.window_queries(1)[static_cast<size_t>(q) * d];
        bounds.assign(n_pages, 0.0f);
        for (int p = 0; p < n_pages; ++p)
          for (size_t j = 0; j < d; ++j)
            bounds[p] += std::max(query[j] * low[p * d + j], query[j] * high[p * d + j]);
        bounds[newest] = std::numeric_limits<float>::max();
        scores.resize(positions.size());
        for (size_t i = 0; i < positions.size(); ++i) scores[i] = bounds[raw(positions[i]) / page];
        return std::span<const float>(scores);
      });
    }
  }
};

}  // namespace

PolicyInfo quest_info() {
  PolicyInfo info;
  info.name = "quest";
  info.summary =
      "selection: reads the pages that may matter to the query; every token is held, memory not reduced";
  info.formula = "U(page) = sum over D of max(q_d min_d, q_d max_d); the pages of highest U, B tokens in all";
  info.paper = "arXiv 2406.10774";
  info.source = "mit-han-lab/Quest (from its paper)";
  info.deviations = {
      "one choice per kv head (the mean bound of its query heads) instead of one per query head",
      "pages are position / page size; the budget is rounded down to whole pages"};
  info.parameters = {{"page", 16, 1, 1024, "tokens in a page"},
                     {"least_pages", 3, 1, 1024, "pages that are read whatever the budget"},
                     {"dense_layers", 2, 0, 1024, "first layers that read everything"}};
  info.signals = Signal::keys | Signal::query_window;
  info.query_window = 1;
  info.evicts = false;
  info.selects = true;
  return info;
}

std::unique_ptr<Policy> make_quest(PolicyInfo info) {
  return std::make_unique<Quest>(std::move(info));
}

}  // namespace kvlapse
