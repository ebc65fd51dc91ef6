#include "gui/draw/life_raster.h"

#include <algorithm>
#include <cmath>

namespace kvlapse::gui {

LifeRasterizer::LifeRasterizer(const RasterView& view) {
  const size_t cells = static_cast<size_t>(view.width) * view.height;
  raster_.view = view;
  raster_.alive.assign(cells, 0);
  raster_.born.assign(cells, 0);
  raster_.lost.assign(cells, 0);
  alive_slope_.assign(static_cast<size_t>(view.width + 1) * view.height, 0);
  born_slope_ = alive_slope_;
}

// `area` gets the two partly covered end columns, the slope the columns between them.
void LifeRasterizer::add_interval(std::vector<float>& area, int row, double begin, double end, float weight) {
  const int width = raster_.view.width;
  begin = std::max(begin, 0.0);
  end = std::min(end, static_cast<double>(width));
  if (begin >= end) return;
  std::vector<float>& slope = &area == &raster_.alive ? alive_slope_ : born_slope_;
  float* cells = area.data() + static_cast<size_t>(row) * width;
  float* steps = slope.data() + static_cast<size_t>(row) * (width + 1);
  const int first = static_cast<int>(begin), last = std::min(static_cast<int>(end), width - 1);
  if (first == last) {
    cells[first] += weight * static_cast<float>(end - begin);
    return;
  }
  cells[first] += weight * static_cast<float>(first + 1 - begin);
  cells[last] += weight * static_cast<float>(end - last);
  steps[first + 1] += weight;
  steps[last] -= weight;
}

void LifeRasterizer::add(std::span<const int32_t> evicted_at, int n_steps) {
  ++n_heads_;
  const RasterView& view = raster_.view;
  const double dx = view.dx(), dy = view.dy();
  const auto column = [&](double step) { return (step - view.x_min) / dx; };
  const int n = std::min(n_steps, static_cast<int>(evicted_at.size()));
  for (int row = 0; row < view.height; ++row) {
    const double low = view.y_min + row * dy, high = low + dy;
    const int first = static_cast<int>(std::floor(low));
    const int end = std::max(first + 1, static_cast<int>(std::floor(high)));
    const float weight = 1.0F / static_cast<float>(end - first);
    for (int pos = std::max(first, 0); pos < std::min(end, n); ++pos) {
      const int32_t lost = evicted_at[pos];
      add_interval(raster_.born, row, column(pos), column(n), weight);
      add_interval(raster_.alive, row, column(pos), column(lost == kHeldToEnd ? n : std::min(lost + 1, n)),
                   weight);
      if (lost != kHeldToEnd) {
        const double at = column(lost + 1.0);
        if (at >= 0 && at < view.width)
          raster_.lost[static_cast<size_t>(row) * view.width + static_cast<size_t>(at)] = 1;
      }
    }
  }
}

LifeRaster LifeRasterizer::finish() {
  const int width = raster_.view.width;
  const float share = n_heads_ > 0 ? 1.0F / static_cast<float>(n_heads_) : 0.0F;
  for (int row = 0; row < raster_.view.height; ++row) {
    float alive = 0, born = 0;
    for (int x = 0; x < width; ++x) {
      alive += alive_slope_[static_cast<size_t>(row) * (width + 1) + x];
      born += born_slope_[static_cast<size_t>(row) * (width + 1) + x];
      const size_t cell = static_cast<size_t>(row) * width + x;
      raster_.alive[cell] = (raster_.alive[cell] + alive) * share;
      raster_.born[cell] = (raster_.born[cell] + born) * share;
    }
  }
  return std::move(raster_);
}

std::vector<float> rasterize_attention(const RasterView& view, std::span<const AttentionPoint> points,
                                       std::span<const int32_t> evicted_at, bool held) {
  std::vector<float> most(static_cast<size_t>(view.width) * view.height, 0);
  const double dx = view.dx(), dy = view.dy();
  const auto begin = std::ranges::lower_bound(points, static_cast<int32_t>(std::floor(view.x_min)), {},
                                              &AttentionPoint::step);
  for (auto point = begin; point != points.end() && point->step < view.x_max; ++point) {
    if (point->pos < view.y_min - 1 || point->pos > view.y_max) continue;
    if ((evicted_at[point->pos] >= point->step) != held) continue;
    const int x0 = std::max(0, static_cast<int>((point->step - view.x_min) / dx));
    const int y0 = std::max(0, static_cast<int>((point->pos - view.y_min) / dy));
    const int x1 =
        std::min(view.width, std::max(x0 + 1, static_cast<int>((point->step + 1 - view.x_min) / dx)));
    const int y1 =
        std::min(view.height, std::max(y0 + 1, static_cast<int>((point->pos + 1 - view.y_min) / dy)));
    for (int y = y0; y < y1; ++y) {
      for (int x = x0; x < x1; ++x) {
        float& cell = most[static_cast<size_t>(y) * view.width + x];
        cell = std::max(cell, point->weight);
      }
    }
  }
  return most;
}

std::vector<float> rasterize_slot_age(const RasterView& view, const SlotHistory& history) {
  const size_t cells = static_cast<size_t>(view.width) * view.height;
  std::vector<float> age(cells, 0), count(cells, 0);
  const double dx = view.dx(), dy = view.dy();
  for (const SlotStay& stay : history.stays) {
    if (stay.end <= view.x_min || stay.begin >= view.x_max || stay.slot + 1 <= view.y_min ||
        stay.slot >= view.y_max)
      continue;
    const int y0 = std::max(0, static_cast<int>((stay.slot - view.y_min) / dy));
    const int y1 =
        std::min(view.height, std::max(y0 + 1, static_cast<int>((stay.slot + 1 - view.y_min) / dy)));
    const int x0 = std::max(0, static_cast<int>((stay.begin - view.x_min) / dx));
    const int x1 = std::min(view.width, std::max(x0 + 1, static_cast<int>((stay.end - view.x_min) / dx)));
    for (int y = y0; y < y1; ++y) {
      for (int x = x0; x < x1; ++x) {
        const size_t cell = static_cast<size_t>(y) * view.width + x;
        const double middle = std::clamp(view.x_min + (x + 0.5) * dx, static_cast<double>(stay.begin),
                                         static_cast<double>(stay.end));
        age[cell] += static_cast<float>(middle - stay.pos);
        count[cell] += 1;
      }
    }
  }
  for (size_t i = 0; i < cells; ++i) age[i] = count[i] > 0 ? age[i] / count[i] : -1;
  return age;
}

}  // namespace kvlapse::gui
