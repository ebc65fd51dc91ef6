#include "core/policy/policies/policies.h"
#include "core/policy/scoring/recency.h"

namespace kvlapse {

PolicyInfo window_info() {
  PolicyInfo info;
  info.name = "window";
  info.summary = "the newest tokens only: a sliding window";
  info.formula = "score = position";
  info.paper = "arXiv 2004.05150";
  info.rule.granularity = Granularity::layer;
  info.device = DeviceScore::position;
  return info;
}

std::unique_ptr<Policy> make_window(PolicyInfo info) {
  return std::make_unique<Recency>(std::move(info));
}

}  // namespace kvlapse
