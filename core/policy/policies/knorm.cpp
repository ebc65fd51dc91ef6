#include <cmath>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

class Knorm final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const size_t d = at.geometry.head_dim;
    std::vector<float> minus_norm;
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int h) {
        std::span<const float> keys = inputs.keys(h);
        minus_norm.resize(keys.size() / d);
        for (size_t i = 0; i < minus_norm.size(); ++i)
          minus_norm[i] = -std::sqrt(dot(&keys[i * d], &keys[i * d], d));
        return std::span<const float>(minus_norm);
      });
  }
};

}  // namespace

PolicyInfo knorm_info() {
  PolicyInfo info;
  info.name = "knorm";
  info.reference = "kvpress";
  info.summary = "keeps keys of small norm, compacted every 128 tokens";
  info.formula = "score(i) = -|k_i|_2";
  info.paper = "arXiv 2406.11430";
  info.source = "NVIDIA/kvpress 0.5.5, presses/knorm_press.py";
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.signals = static_cast<SignalSet>(Signal::keys);
  return info;
}

std::unique_ptr<Policy> make_knorm(PolicyInfo info) {
  return std::make_unique<Knorm>(std::move(info));
}

}  // namespace kvlapse
