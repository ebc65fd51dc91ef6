#include "core/base/rng.h"
#include "core/policy/policies/policies.h"

namespace kvlapse {
namespace {

class Random final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs&, const SlotState&, Scores& out) const override {
    const auto seed = static_cast<uint64_t>(parameter("seed"));
    for (int r = 0; r < out.n_rows(); ++r) {
      uint64_t key = counter_random({seed, static_cast<uint64_t>(at.layer), static_cast<uint64_t>(r),
                                     static_cast<uint64_t>(raw(at.step))});
      std::span<const Pos> positions = at.positions(r);
      std::span<float> row = out.row(r);
      for (size_t s = 0; s < row.size(); ++s)
        row[s] = unit_float(mix64(key ^ static_cast<uint64_t>(raw(positions[s]))));
    }
  }
};

}  // namespace

PolicyInfo random_info() {
  PolicyInfo info;
  info.name = "random";
  info.summary = "a uniform draw; with pin_prompt=1 the null model that every informed policy must beat";
  info.formula = "score = uniform(seed, layer, kv head, step, position)";
  info.paper = "arXiv 2609.03430 (Random Attention: prompt pinned, per head, rounds of 64)";
  info.deviations = {"evicts every step by default; cadence=64:pin_prompt=1 is the paper's setting"};
  info.parameters = {{"seed", 0, 0, 4294967295.0, "key of the draws"}};
  info.device = DeviceScore::random;
  return info;
}

std::unique_ptr<Policy> make_random(PolicyInfo info) {
  return std::make_unique<Random>(std::move(info));
}

}  // namespace kvlapse
