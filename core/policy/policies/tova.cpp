#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

class Tova final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r),
                   [&](int q) { return inputs.attention(q); });
  }
};

}  // namespace

PolicyInfo tova_info() {
  PolicyInfo info;
  info.name = "tova";
  info.summary = "least attention of the current step, shared by the layer; no window";
  info.formula = "score(i) = mean over all query heads of attention(i)";
  info.paper = "arXiv 2401.06104";
  info.source = "schwartz-lab/TOVA";
  info.rule.granularity = Granularity::layer;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.device = DeviceScore::attention;
  return info;
}

PolicyInfo tova_kvpress_info() {
  PolicyInfo info = tova_info();
  info.reference = "kvpress";
  info.summary = "least attention of the current step, shared by the layer, compacted every 128 tokens";
  info.source = "NVIDIA/kvpress 0.5.5, presses/tova_press.py in DecodingPress";
  info.deviations = {"the newest token is protected instead of getting the highest score"};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.rule.recent = 1;
  return info;
}

std::unique_ptr<Policy> make_tova(PolicyInfo info) {
  if (info.rule.gqa == GqaRule::mean) info.fused = FusedScore::attention;
  return std::make_unique<Tova>(std::move(info));
}
std::unique_ptr<Policy> make_tova_kvpress(PolicyInfo info) {
  return std::make_unique<Tova>(std::move(info));
}

}  // namespace kvlapse
