#include "trace/views/outliers.h"

#include <algorithm>
#include <cmath>

namespace kvlapse {
namespace {

float median(std::vector<float>& values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

}  // namespace

std::vector<char> find_outliers(std::span<const float> values) {
  std::vector<char> outlier(values.size(), 0);
  std::vector<float> known;
  for (float value : values) {
    if (!std::isnan(value)) known.push_back(value);
  }
  if (known.size() < 4) return outlier;
  const float middle = median(known);
  for (float& value : known) value = std::abs(value - middle);
  const float deviation = 1.4826F * median(known);
  if (deviation <= 0) return outlier;
  for (size_t i = 0; i < values.size(); ++i)
    outlier[i] = std::abs(values[i] - middle) > 3.5F * deviation ? 1 : 0;
  return outlier;
}

}  // namespace kvlapse
