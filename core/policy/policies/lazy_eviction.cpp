#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// Columns: 0 position of the last step that attended to the token, 1 longest gap between two such steps
// (MRI).
class LazyEviction final : public Policy {
 public:
  using Policy::Policy;
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    const auto threshold = static_cast<float>(parameter("threshold"));
    const auto now = static_cast<float>(raw(at.step));
    thread_local std::vector<float> weights;
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      const int n = at.count(h), group = at.geometry.group();
      std::span<float> last = state.column(0, h), gap = state.column(1, h);
      last[raw(at.table->newest(h))] = now;
      weights.resize(n);
      reduce_heads({h * group, (h + 1) * group}, at.rule.gqa, weights,
                   [&](int q) { return inputs.attention(q); });
      for (int i = 0; i < n; ++i) {
        if (!(weights[i] > threshold)) continue;
        gap[i] = std::max(gap[i], now - last[i]);
        last[i] = now;
      }
    }
  }

  void score(const LayerContext& at, LayerInputs&, const SlotState& state, Scores& out) const override {
    const auto now = static_cast<float>(raw(at.step));
    std::vector<float> idle, one;
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<float> row = out.row(r);
      idle.resize(row.size());
      one.resize(row.size());
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, row, [&](int h) {
        std::span<const float> last = state.column(0, h), gap = state.column(1, h);
        // 2 sigmoid(-x) = 2 / (1 + exp(x)); a token that never came back scores 0 unless it was just seen.
        for (size_t i = 0; i < row.size(); ++i) {
          idle[i] = gap[i] > 0 ? (now - last[i]) / gap[i] : now > last[i] ? kNever : 0.0f;
          one[i] = gap[i] > 0 ? 1.0f / gap[i] : kNever;
        }
        exp_minus(idle, 0, idle);
        exp_minus(one, 0, one);
        for (size_t i = 0; i < row.size(); ++i) idle[i] = 2.0f / (1.0f + idle[i]) + 2.0f / (1.0f + one[i]);
        return std::span<const float>(idle);
      });
    }
  }

 private:
  static constexpr float kNever = 1000;  // exp overflows to infinity: the term is 0
};

}  // namespace

PolicyInfo lazy_eviction_info() {
  PolicyInfo info;
  info.name = "lazy_eviction";
  info.summary =
      "keeps tokens whose attention comes back, by the longest gap so far; lags behind by a window";
  info.formula =
      "score(i) = 2 sigmoid(-(t - TS)/MRI) + 2 sigmoid(-1/MRI); TS last step with attention above the "
      "threshold, MRI "
      "longest gap between such steps";
  info.paper = "arXiv 2506.15969";
  info.source = "the paper's formulas (secondary description)";
  info.deviations = {
      "window and cadence are free (the paper chooses them so that they cover 80 % of the gaps, about 175 "
      "for "
      "Qwen on MATH500): window=W:cadence=W",
      "a token that was never attended again scores 0 (the paper leaves the first term undefined)",
      "attention is reduced over the group before it is compared with the threshold; per kv head"};
  info.parameters = {{"threshold", 1e-4, 0, 1, "attention weight that counts as use"},
                     {"window", 64, 1, 8192, "newest tokens that are kept"}};
  info.rule.cadence = 64;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.state_columns = 2;
  return info;
}

std::unique_ptr<Policy> make_lazy_eviction(PolicyInfo info) {
  info.rule.recent = std::max(info.rule.recent, info.parameters[1].value);
  return std::make_unique<LazyEviction>(std::move(info));
}

}  // namespace kvlapse
