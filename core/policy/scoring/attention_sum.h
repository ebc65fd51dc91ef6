// Policies that remember how much attention each token has got: state column 0 of each kv head gathers the
// step's weights, reduced over the group. For the files of core/policy/policies.
#pragma once

#include "core/base/vector_math.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {

class AttentionSum : public Policy {
 public:
  using Policy::Policy;
  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    const CacheGeometry& g = at.geometry;
    for (int h = 0; h < g.n_kv_heads; ++h) {
      std::span<float> sum = state.column(0, h).first(at.count(h));
      if (at.rule.gqa == GqaRule::max && g.group() > 1) {
        for (size_t i = 0; i < sum.size(); ++i) {
          float most = 0;
          for (int q = h * g.group(); q < (h + 1) * g.group(); ++q)
            most = std::max(most, inputs.attention(q)[i]);
          sum[i] += most;
        }
        continue;
      }
      const float scale = at.rule.gqa == GqaRule::mean ? 1.0f / static_cast<float>(g.group()) : 1.0f;
      for (int q = h * g.group(); q < (h + 1) * g.group(); ++q) add_scaled(scale, inputs.attention(q), sum);
    }
  }
};

}  // namespace kvlapse
