// Where a line falls: steps at which the mean of the `window` values behind them lies below the mean of the
// `window` values before them by more than 3.5 robust deviations (1.4826 x median absolute deviation) of all
// such differences. Of neighbours the deepest stays. Pure function.
#pragma once

#include <span>
#include <vector>

namespace kvlapse {

struct Fall {
  int index = 0;   // first value behind the fall
  float drop = 0;  // mean before minus mean behind, > 0
};
// In order of index, the `most` deepest; NaN values are left out of the means.
std::vector<Fall> find_falls(std::span<const float> values, int window, int most);

}  // namespace kvlapse
