#include <algorithm>
#include <vector>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// Column 0: the last step at which the token's page was among the most attended. Oldest first out.
class Raas final : public Policy {
 public:
  using Policy::Policy;
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    const int page = static_cast<int>(parameter("page"));
    const double share = parameter("share");
    const auto now = static_cast<float>(raw(at.step));
    thread_local std::vector<float> weights, pages, ranked;
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      std::span<const Pos> positions = at.positions(h);
      const int group = at.geometry.group();
      weights.resize(positions.size());
      reduce_heads({h * group, (h + 1) * group}, at.rule.gqa, weights,
                   [&](int q) { return inputs.attention(q); });
      pages.assign(raw(at.step) / page + 1, -1.0f);  // -1: nothing of the page is held
      for (size_t i = 0; i < positions.size(); ++i) {
        float& most = pages[raw(positions[i]) / page];
        most = std::max(most, weights[i]);
      }
      ranked.clear();
      for (float weight : pages)
        if (weight >= 0) ranked.push_back(weight);
      const size_t fresh =
          std::max<size_t>(1, static_cast<size_t>(share * static_cast<double>(ranked.size())));
      std::nth_element(ranked.begin(), ranked.begin() + fresh - 1, ranked.end(), std::greater<>());
      const float threshold = ranked[fresh - 1];
      std::span<float> stamp = state.column(0, h);
      for (size_t i = 0; i < positions.size(); ++i)
        if (pages[raw(positions[i]) / page] >= threshold) stamp[i] = now;
      stamp[raw(at.table->newest(h))] = now;
    }
  }
  void score(const LayerContext& at, LayerInputs&, const SlotState& state, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) reduce_state(at, state, 0, out, r);
  }
};

}  // namespace

PolicyInfo raas_info() {
  PolicyInfo info;
  info.name = "raas";
  info.summary =
      "least recently used page: pages among the most attended half get a fresh stamp; prompt pinned";
  info.formula =
      "score(i) = last step at which page(i) was in the top `share` of held pages by largest attention";
  info.paper = "arXiv 2502.11147";
  info.source = "the paper's rule (secondary description)";
  info.deviations = {
      "a page's attention is the largest weight in it (the paper estimates it from page bounds, as Quest "
      "does)",
      "tokens leave one at a time from the oldest page, pages are position / page size; victims per kv head",
      "all tokens of a page share a stamp: among them the lowest slot goes first"};
  info.parameters = {{"page", 16, 1, 1024, "tokens in a page"},
                     {"share", 0.5, 0.01, 1, "of the held pages that get a fresh stamp"}};
  info.rule.pin_prompt = true;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.state_columns = 1;
  return info;
}

std::unique_ptr<Policy> make_raas(PolicyInfo info) {
  return std::make_unique<Raas>(std::move(info));
}

}  // namespace kvlapse
