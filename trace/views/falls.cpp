#include "trace/views/falls.h"

#include <algorithm>
#include <cmath>

namespace kvlapse {
namespace {

constexpr float kDeviations = 3.5F, kToDeviation = 1.4826F;
// A fall below this is rounding, whatever the deviation says: recall is stored as fp16 at best.
constexpr float kLeastDrop = 1e-3F;

float median(std::vector<float> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

std::vector<Fall> find_falls(std::span<const float> values, int window, int most) {
  const int n = static_cast<int>(values.size());
  if (window < 1 || n < 4 * window) return {};
  std::vector<double> sums(values.size() + 1, 0);
  std::vector<int> counts(values.size() + 1, 0);
  for (int i = 0; i < n; ++i) {
    const bool known = !std::isnan(values[i]);
    sums[i + 1] = sums[i] + (known ? static_cast<double>(values[i]) : 0);
    counts[i + 1] = counts[i] + (known ? 1 : 0);
  }
  std::vector<Fall> all;
  std::vector<float> drops;
  for (int i = window; i + window <= n; ++i) {
    const int before = counts[i] - counts[i - window], behind = counts[i + window] - counts[i];
    if (before == 0 || behind == 0) continue;
    const auto drop =
        static_cast<float>((sums[i] - sums[i - window]) / before - (sums[i + window] - sums[i]) / behind);
    all.push_back({i, drop});
    drops.push_back(drop);
  }
  if (all.empty()) return {};
  const float middle = median(drops);
  for (float& drop : drops) drop = std::abs(drop - middle);
  const float least = std::max(kLeastDrop, kDeviations * kToDeviation * median(drops));
  std::erase_if(all, [&](const Fall& fall) { return !(fall.drop > least); });
  std::ranges::stable_sort(all, [](const Fall& a, const Fall& b) { return a.drop > b.drop; });
  std::vector<Fall> falls;
  for (const Fall& fall : all) {
    if (static_cast<int>(falls.size()) == most) break;
    if (std::ranges::none_of(
            falls, [&](const Fall& kept) { return std::abs(kept.index - fall.index) <= 2 * window; }))
      falls.push_back(fall);
  }
  std::ranges::sort(falls, {}, &Fall::index);
  return falls;
}

}  // namespace kvlapse
