#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/redundancy.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

constexpr float kSimilar = 0.5f;

void divide_by_max(std::span<float> values) {
  const float most = max_value(values);
  if (most > 0)
    for (float& v : values) v /= most;
}

// R-KV with a memory: column 0 is the importance F over all compactions so far, fading at each.
class Gkv final : public Policy {
 public:
  using Policy::Policy;

  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    if ((raw(at.step) + 1) % at.rule.cadence != 0) return;
    const int window = static_cast<int>(parameter("window")), group = at.geometry.group();
    const auto fade = static_cast<float>(parameter("fade"));
    std::vector<float> rows;
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      const int n = at.count(h), prefix = n - std::min(window, n);
      if (prefix == 0) continue;
      std::vector<float> importance(prefix);
      const int n_rows = window_logits_of({h * group, (h + 1) * group}, at.rule.gqa, inputs, window, n, rows);
      vote(rows, n_rows, n, n, /*mean=*/true, importance);
      divide_by_max(importance);
      std::span<float> memory = state.column(0, h);
      std::span<const Pos> positions = at.positions(h);
      for (int i = 0, before = 0; i < n; ++i) {
        if (raw(positions[i]) > raw(at.step) - window) continue;  // the window's own tokens
        memory[i] = std::max(fade * memory[i], importance[before++]);
      }
    }
  }

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    const auto weight = static_cast<float>(parameter("weight"));
    std::vector<float> redundancy;
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<float> row = out.row(r), importance = out.part(0, r), similar = out.part(1, r);
      reduce_heads(kv_heads_of(at, out, r), GqaRule::mean, importance,
                   [&](int h) { return state.column(0, h).first(row.size()); });
      redundancy.resize(row.size());
      reduce_heads(kv_heads_of(at, out, r), GqaRule::mean, similar, [&](int h) {
        forgiving_redundancy(inputs, h, at.geometry.head_dim, kSimilar, redundancy);
        divide_by_max(redundancy);
        return std::span<const float>(redundancy);
      });
      for (size_t i = 0; i < row.size(); ++i) row[i] = weight * importance[i] - (1.0f - weight) * similar[i];
    }
  }
};

}  // namespace

PolicyInfo gkv_info() {
  PolicyInfo info;
  info.name = "gkv";
  info.summary = "R-KV whose importance remembers earlier compactions, compacted every 128 tokens";
  info.formula =
      "F = max(fade F, I / max I) at each compaction; score = weight F - (1 - weight) R / max R, I and R as "
      "R-KV, I "
      "with causal softmax over all held tokens and without a pool";
  info.paper = "arXiv 2512.00504";
  info.source = "microsoft/G-KV 6db3b2e";
  info.deviations = {
      "the last `window` tokens are protected and gather importance only once they have left it",
      "the repository's other memories (mean, sum) are left out"};
  info.parameters = {{"window", 16, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"fade", 0.8, 0, 1, "what a compaction leaves of earlier importance"},
                     {"weight", 0.5, 0, 1, "of importance against redundancy"}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact;
  info.signals = Signal::query_window | Signal::keys;
  info.state_columns = 1;
  info.pairwise_similarity = true;
  info.alike_above = kSimilar;
  info.score_parts = {"importance", "redundancy"};
  return info;
}

std::unique_ptr<Policy> make_gkv(PolicyInfo info) {
  adopt_window(info, info.parameters[0].value);
  return std::make_unique<Gkv>(std::move(info));
}

}  // namespace kvlapse
