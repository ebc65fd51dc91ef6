#include "replay/knee.h"

#include <algorithm>
#include <cmath>

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

std::vector<int> find_front(std::span<const double> xs, std::span<const double> ys, bool higher_is_better) {
  std::vector<int> order;
  for (size_t i = 0; i < std::min(xs.size(), ys.size()); ++i) {
    if (!std::isnan(xs[i]) && !std::isnan(ys[i])) order.push_back(static_cast<int>(i));
  }
  const auto better = [&](double a, double b) { return higher_is_better ? a > b : a < b; };
  std::ranges::stable_sort(
      order, [&](int a, int b) { return xs[a] != xs[b] ? xs[a] < xs[b] : better(ys[a], ys[b]); });
  std::vector<int> front;
  for (const int i : order) {
    if (front.empty() || better(ys[i], ys[front.back()])) front.push_back(i);
  }
  return front;
}

}  // namespace kvlapse
