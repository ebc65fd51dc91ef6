#include "core/policy/policies/policies.h"

namespace kvlapse {
namespace {

class Full final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext&, LayerInputs&, const SlotState&, Scores&) const override {}
};

}  // namespace

PolicyInfo full_info() {
  PolicyInfo info;
  info.name = "full";
  info.summary = "keeps every token; the reference that all others are compared with";
  info.formula = "no eviction";
  info.evicts = false;
  return info;
}

std::unique_ptr<Policy> make_full(PolicyInfo info) {
  return std::make_unique<Full>(std::move(info));
}

}  // namespace kvlapse
