#include "gui/draw/line_pyramid.h"

#include <algorithm>
#include <cmath>

namespace kvlapse::gui {

LinePyramid::LinePyramid(std::span<const float> values, double first_x) : first_x_(first_x) {
  if (values.empty()) return;
  std::vector<Extremes> level;
  level.reserve(values.size());
  lowest_ = INFINITY, highest_ = -INFINITY;
  for (float value : values) {
    level.push_back({value, value});
    if (std::isnan(value)) continue;
    lowest_ = std::min(lowest_, value), highest_ = std::max(highest_, value);
  }
  if (lowest_ > highest_) lowest_ = highest_ = 0;
  while (true) {
    levels_.push_back(level);
    if (level.size() == 1) break;
    std::vector<Extremes> above((level.size() + 1) / 2);
    for (size_t i = 0; i < above.size(); ++i) {
      const Extremes& a = level[2 * i];
      const Extremes& b = level[std::min(2 * i + 1, level.size() - 1)];
      above[i] = {std::fmin(a.low, b.low), std::fmax(a.high, b.high)};
    }
    level = std::move(above);
  }
}

DrawnLine LinePyramid::line(double x_min, double x_max, int width) const {
  DrawnLine drawn;
  if (levels_.empty() || width <= 0) return drawn;
  const double per_pixel = std::max((x_max - x_min) / width, 1e-9);
  const size_t depth =
      std::min(static_cast<size_t>(std::max(0.0, std::floor(std::log2(per_pixel)))), levels_.size() - 1);
  const auto& level = levels_[depth];
  const double span = std::ldexp(1.0, static_cast<int>(depth));
  const auto index = [&](double x) { return static_cast<std::ptrdiff_t>(std::floor((x - first_x_) / span)); };
  const std::ptrdiff_t begin = std::max<std::ptrdiff_t>(index(x_min) - 1, 0);
  const std::ptrdiff_t end =
      std::min<std::ptrdiff_t>(index(x_max) + 2, static_cast<std::ptrdiff_t>(level.size()));
  for (std::ptrdiff_t i = begin; i < end; ++i) {
    const float x = static_cast<float>(first_x_ + (static_cast<double>(i) + (depth == 0 ? 0.0 : 0.5)) * span);
    const Extremes& value = level[static_cast<size_t>(i)];
    if (std::isnan(value.low)) continue;
    drawn.xs.push_back(x), drawn.ys.push_back(value.low);
    if (value.high != value.low) drawn.xs.push_back(x), drawn.ys.push_back(value.high);
  }
  return drawn;
}

}  // namespace kvlapse::gui
