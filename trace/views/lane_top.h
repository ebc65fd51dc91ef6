// Where a lane ends: at the highest value, or, when a few peaks would press everything else to the ground,
// above all but the highest hundredth of the values. Pure function.
#pragma once

#include <span>

namespace kvlapse {

float lane_top(std::span<const float> values);

}  // namespace kvlapse
