// Outliers of a set of values: further than 3.5 robust deviations (1.4826 x median absolute deviation) from
// the median (Iglewicz and Hoaglin, 1993). NaN never is one.
#pragma once

#include <span>
#include <vector>

namespace kvlapse {

std::vector<char> find_outliers(std::span<const float> values);

}  // namespace kvlapse
