#include <vector>

#include "core/base/rng.h"
#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// Column 0 gathers softmax((logits + Gumbel noise) / tau): noise gives tokens that lost out another chance.
class Keyformer final : public Policy {
 public:
  using Policy::Policy;
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    const CacheGeometry& g = at.geometry;
    const int generated = std::max(0, raw(at.step) + 1 - at.n_prompt);
    const auto inverse_tau = static_cast<float>(1.0 / (parameter("tau") + generated * parameter("tau_step")));
    thread_local std::vector<float> noise, weights;
    for (int h = 0; h < g.n_kv_heads; ++h) {
      std::span<const Pos> positions = at.positions(h);
      const size_t n = positions.size();
      const uint64_t key =
          counter_random({static_cast<uint64_t>(parameter("seed")), static_cast<uint64_t>(at.layer),
                          static_cast<uint64_t>(h), static_cast<uint64_t>(raw(at.step))});
      noise.resize(n);
      weights.resize(n);
      for (size_t i = 0; i < n; ++i) noise[i] = gumbel(mix64(key ^ static_cast<uint64_t>(raw(positions[i]))));
      std::span<float> sum = state.column(0, h).first(n);
      const float share = at.rule.gqa == GqaRule::mean ? 1.0f / static_cast<float>(g.group()) : 1.0f;
      for (int q = h * g.group(); q < (h + 1) * g.group(); ++q) {
        std::span<const float> logits = inputs.logits(q);
        for (size_t i = 0; i < n; ++i) weights[i] = (logits[i] + noise[i]) * inverse_tau;
        softmax(weights, weights);
        add_scaled(share, weights, sum);
      }
    }
  }
  void score(const LayerContext& at, LayerInputs&, const SlotState& state, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) reduce_state(at, state, 0, out, r);
  }
};

}  // namespace

PolicyInfo keyformer_info() {
  PolicyInfo info;
  info.name = "keyformer";
  info.summary = "accumulated attention under Gumbel noise and a rising temperature, and the newest 30 %";
  info.formula =
      "score(i) = sum over steps of softmax((q.k / sqrt(D) + gumbel) / (tau + t tau_step))(i), t generated "
      "tokens";
  info.paper = "arXiv 2403.09054";
  info.source = "d-matrix-ai/keyformer-llm (from its description)";
  info.deviations = {
      "the noise is drawn per kv head, token and step from a counter-based generator: its query heads "
      "share it, and a replay draws the same",
      "gqa=max counts as sum",
      "the default temperature steps were taken from a description of the code, not from it"};
  info.parameters = {{"tau", 1, 0.01, 100, "first temperature"},
                     {"tau_step", 0.01, 0, 1, "rise of the temperature per generated token"},
                     {"seed", 0, 0, 4294967295.0, "key of the noise"}};
  info.rule.recent = 0.3;
  info.signals = static_cast<SignalSet>(Signal::logits);
  info.state_columns = 1;
  return info;
}

std::unique_ptr<Policy> make_keyformer(PolicyInfo info) {
  return std::make_unique<Keyformer>(std::move(info));
}

}  // namespace kvlapse
