// Older tokens go first: the sliding window, and with sinks StreamingLLM. For the files of
// core/policy/policies.
#pragma once

#include "core/policy/policy.h"

namespace kvlapse {

class Recency final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs&, const SlotState&, Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<const Pos> positions = at.positions(r);
      std::span<float> row = out.row(r);
      for (size_t s = 0; s < row.size(); ++s) row[s] = static_cast<float>(raw(positions[s]));
    }
  }
};

}  // namespace kvlapse
