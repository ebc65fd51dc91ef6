#include "core/policy/policies/policies.h"
#include "core/policy/scoring/attention_sum.h"

namespace kvlapse {
namespace {

class H2o final : public AttentionSum {
 public:
  using AttentionSum::AttentionSum;
  void score(const LayerContext& at, LayerInputs&, const SlotState& state, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) reduce_state(at, state, 0, out, r);
  }
};

// Ranks by the current step alone, whatever the repository accumulates beside it.
class H2oLongFlow final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r),
                   [&](int q) { return inputs.attention(q); });
  }
};

}  // namespace

PolicyInfo h2o_fminference_info() {
  PolicyInfo info;
  info.name = "h2o";
  info.reference = "fminference";
  info.summary = "heavy hitters: most attention since birth, and the newest half of the budget";
  info.formula = "score(i) = sum over steps since birth of attention(i), mean over the group";
  info.paper = "arXiv 2306.14048";
  info.source = "FMInference/H2O, per head";
  info.deviations = {"the original has one kv head per query head; a group of query heads is averaged (gqa)",
                     "prompt tokens accumulate from causal attention over the prompt"};
  info.rule.recent = 0.5;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.device = DeviceScore::accumulated;
  info.state_columns = 1;
  return info;
}

std::unique_ptr<Policy> make_h2o_fminference(PolicyInfo info) {
  return std::make_unique<H2o>(std::move(info));
}

PolicyInfo h2o_longflow_info() {
  PolicyInfo info;
  info.name = "h2o";
  info.reference = "longflow";
  info.summary = "the LongFlow repository's H2O baseline: the current step's attention, shared by the layer";
  info.formula = "score(i) = mean over all query heads of the current step's attention(i)";
  info.paper = "arXiv 2603.11504 (as a baseline); compare arXiv 2306.14048";
  info.source = "yisunlp/LongFlow 89a68d3, models/h2o.py";
  info.deviations = {
      "against h2o@fminference: ranks by the current step, not by the accumulated score that it keeps",
      "attention sees one token more than the budget, as in the code"};
  info.rule.granularity = Granularity::layer;
  info.rule.headroom = 0;
  info.rule.recent = 0.5;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.device = DeviceScore::attention;
  return info;
}

std::unique_ptr<Policy> make_h2o_longflow(PolicyInfo info) {
  return std::make_unique<H2oLongFlow>(std::move(info));
}

}  // namespace kvlapse
