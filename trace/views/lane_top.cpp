#include "trace/views/lane_top.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <vector>

namespace kvlapse {

float lane_top(std::span<const float> values) {
  constexpr float kPress = 3;  // the highest value over the ordinary ones
  std::vector<float> known;
  known.reserve(values.size());
  std::ranges::copy_if(values, std::back_inserter(known), [](float value) { return std::isfinite(value); });
  if (known.empty()) return 0;
  const float highest = *std::ranges::max_element(known);
  const auto at = known.begin() + static_cast<std::ptrdiff_t>(static_cast<double>(known.size() - 1) * 0.99);
  std::ranges::nth_element(known, at);
  return *at > 0 && highest > kPress * *at ? 1.25F * *at : highest;
}

}  // namespace kvlapse
