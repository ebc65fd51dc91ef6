#include "replay/knee.h"

#include <algorithm>

namespace kvlapse {

int find_knee(std::span<const double> xs, std::span<const double> ys, bool higher_is_better) {
  constexpr double kLeastGain = 0.02;
  const size_t n = std::min(xs.size(), ys.size());
  if (n < 3) return -1;
  const double width = xs[n - 1] - xs[0], height = ys[n - 1] - ys[0];
  if (!(width > 0) || !(higher_is_better ? height > 0 : height < 0)) return -1;
  int knee = -1;
  double most = kLeastGain;
  for (size_t i = 1; i + 1 < n; ++i) {
    const double gain = (ys[i] - ys[0]) / height - (xs[i] - xs[0]) / width;  // of the whole improvement
    if (gain > most) most = gain, knee = static_cast<int>(i);
  }
  return knee;
}

}  // namespace kvlapse
