#include "replay/statistics.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/base/rng.h"

namespace kvlapse {
namespace {

double mean_of(std::span<const double> values) {
  double total = 0;
  for (double v : values) total += v;
  return values.empty() ? 0 : total / static_cast<double>(values.size());
}

// Average ranks, 0-based. Values and indices are sorted as one integer whose order is the value's.
std::vector<double> ranks(std::span<const float> values) {
  std::vector<uint64_t> order(values.size());
  for (size_t i = 0; i < order.size(); ++i) {
    const auto bits = std::bit_cast<uint32_t>(values[i] + 0.0f);  // -0 becomes 0
    const uint32_t ordered = (bits >> 31) != 0 ? ~bits : bits | 0x80000000u;
    order[i] = uint64_t{ordered} << 32 | i;
  }
  std::sort(order.begin(), order.end());
  std::vector<double> rank(values.size());
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin + 1;
    while (end < order.size() && order[end] >> 32 == order[begin] >> 32) ++end;
    for (size_t i = begin; i < end; ++i)
      rank[order[i] & 0xffffffffu] = 0.5 * static_cast<double>(begin + end - 1);
    begin = end;
  }
  return rank;
}

}  // namespace

Interval bootstrap_mean(std::span<const double> samples, double confidence, int block, uint64_t seed) {
  Interval interval;
  interval.mean = interval.low = interval.high = mean_of(samples);
  const size_t n = samples.size();
  if (n < 2) return interval;
  const size_t run = std::clamp<size_t>(static_cast<size_t>(block), 1, n);
  std::vector<double> means(kResamples);
  for (size_t r = 0; r < means.size(); ++r) {
    double total = 0;
    size_t taken = 0;
    for (uint64_t draw = 0; taken < n; ++draw) {
      const size_t start = counter_random({seed, r, draw}) % (n - run + 1);
      for (size_t i = 0; i < run && taken < n; ++i, ++taken) total += samples[start + i];
    }
    means[r] = total / static_cast<double>(n);
  }
  std::sort(means.begin(), means.end());
  const double tail = (1 - confidence) / 2 * static_cast<double>(means.size() - 1);
  interval.low = means[static_cast<size_t>(tail)];
  interval.high = means[means.size() - 1 - static_cast<size_t>(tail)];
  return interval;
}

Interval bootstrap_difference(std::span<const double> a, std::span<const double> b, double confidence) {
  std::vector<double> difference(std::min(a.size(), b.size()));
  for (size_t i = 0; i < difference.size(); ++i) difference[i] = a[i] - b[i];
  return bootstrap_mean(difference, confidence);
}

Interval wilson(int64_t correct, int64_t n) {
  if (n <= 0) return {0, 0, 1};
  constexpr double z = 1.959963984540054;
  const auto count = static_cast<double>(n);
  const double p = static_cast<double>(correct) / count;
  const double centre = (p + z * z / (2 * count)) / (1 + z * z / count);
  const double half = z * std::sqrt(p * (1 - p) / count + z * z / (4 * count * count)) / (1 + z * z / count);
  return {p, std::max(0.0, centre - half), std::min(1.0, centre + half)};
}

double spearman(std::span<const float> a, std::span<const float> b) {
  const size_t n = std::min(a.size(), b.size());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  if (n < 2) return nan;
  const std::vector<double> x = ranks(a.first(n)), y = ranks(b.first(n));
  const double middle = 0.5 * static_cast<double>(n - 1);
  double xy = 0, xx = 0, yy = 0;
  for (size_t i = 0; i < n; ++i) {
    xy += (x[i] - middle) * (y[i] - middle);
    xx += (x[i] - middle) * (x[i] - middle);
    yy += (y[i] - middle) * (y[i] - middle);
  }
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : nan;
}

}  // namespace kvlapse
