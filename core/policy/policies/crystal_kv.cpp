#include <vector>

#include "core/base/rng.h"
#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// Columns: 0 combined recency and frequency (CRF), 1 position of the last hit. A hit is a token in the
// nucleus of the step's attention.
class CrystalKv final : public Policy {
 public:
  explicit CrystalKv(PolicyInfo info)
      : Policy(std::move(info)), log_decay_(static_cast<float>(fixed_log(parameter("decay")))) {}

  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    const auto mass = static_cast<float>(parameter("nucleus"));
    const auto now = static_cast<float>(raw(at.step));
    thread_local std::vector<float> weights;
    thread_local std::vector<int> heap;
    for (int h = 0; h < at.geometry.n_kv_heads; ++h) {
      const int n = at.count(h), group = at.geometry.group();
      weights.resize(n);
      reduce_heads({h * group, (h + 1) * group}, at.rule.gqa, weights,
                   [&](int q) { return inputs.attention(q); });
      // Largest first; among equals the lower slot. Most of the mass sits in few tokens.
      heap.resize(n);
      for (int i = 0; i < n; ++i) heap[i] = i;
      auto lower = [&](int a, int b) { return weights[a] != weights[b] ? weights[a] < weights[b] : a > b; };
      std::make_heap(heap.begin(), heap.end(), lower);
      float gathered = 0;
      std::span<float> crf = state.column(0, h), last = state.column(1, h);
      for (auto end = heap.end(); end != heap.begin() && gathered < mass; --end) {
        std::pop_heap(heap.begin(), end, lower);
        const int hit = *(end - 1);
        gathered += weights[hit];
        crf[hit] = decay(now - last[hit]) * crf[hit] + 1.0f;
        last[hit] = now;
      }
    }
  }

  void score(const LayerContext& at, LayerInputs&, const SlotState& state, Scores& out) const override {
    const auto now = static_cast<float>(raw(at.step));
    thread_local std::vector<float> faded;
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<float> row = out.row(r);
      faded.resize(row.size());
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, row, [&](int h) {
        std::span<const float> crf = state.column(0, h), last = state.column(1, h);
        for (size_t i = 0; i < row.size(); ++i) faded[i] = (now - last[i]) * log_decay_;
        exp_minus(faded, 0, faded);
        for (size_t i = 0; i < row.size(); ++i) faded[i] *= crf[i];
        return std::span<const float>(faded);
      });
    }
  }

 private:
  float decay(float steps) const {
    float power = steps * log_decay_;
    exp_minus({&power, 1}, 0, {&power, 1});
    return power;
  }
  float log_decay_;
};

}  // namespace

PolicyInfo crystal_kv_info() {
  PolicyInfo info;
  info.name = "crystal_kv";
  info.summary =
      "LRFU: recency and frequency of hits, a hit being a token in the nucleus of a step's attention";
  info.formula = "hit: CRF = decay^(t - last) CRF + 1, last = t; score = decay^(t - last) CRF";
  info.paper = "arXiv 2601.16986";
  info.source = "the paper's formulas";
  info.deviations = {"layers keep equal budgets (the paper shifts them by the layers' CRF over time)",
                     "the nucleus is that of the group's reduced attention; victims per kv head"};
  info.parameters = {{"nucleus", 0.9, 0.01, 1, "attention mass that hits cover"},
                     {"decay", 0.6, 0.01, 1, "per step; small: recency (LRU), 1: frequency (LFU)"}};
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.state_columns = 2;
  return info;
}

std::unique_ptr<Policy> make_crystal_kv(PolicyInfo info) {
  return std::make_unique<CrystalKv>(std::move(info));
}

}  // namespace kvlapse
