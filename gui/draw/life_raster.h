// Life raster: pictures of token lives for any view rectangle at its own pixel size, from single cells to 32K
// x 32K. Each pixel is the exact mean over the cells under it (occupancy, age) or their maximum (evictions,
// attention), as the level of a mip pyramid would be, but at every zoom; cost is linear in the visible
// tokens. Worker threads.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trace/views/head_attention.h"
#include "trace/views/layer_life.h"

namespace kvlapse::gui {

// Pixel (column, row) covers steps [x_min + column * dx, ...) and positions [y_min + row * dy, ...); row 0 is
// y_min.
struct RasterView {
  double x_min = 0, x_max = 1, y_min = 0, y_max = 1;
  int width = 1, height = 1;
  double dx() const { return (x_max - x_min) / width; }
  double dy() const { return (y_max - y_min) / height; }
  bool operator==(const RasterView&) const = default;
};

struct LifeRaster {
  RasterView view;
  std::vector<float> alive;   // share of the pixel's (head, position, step) cells where the token is held
  std::vector<float> born;    // share where it exists, held or not
  std::vector<uint8_t> lost;  // an eviction falls into the pixel
};
// Adds one head's lives; divide by the number of heads with finish().
class LifeRasterizer {
 public:
  explicit LifeRasterizer(const RasterView& view);
  void add(std::span<const int32_t> evicted_at, int n_steps);
  LifeRaster finish();

 private:
  void add_interval(std::vector<float>& area, int row, double begin, double end, float weight);
  LifeRaster raster_;
  std::vector<float> alive_slope_, born_slope_;  // differences along x, one more column
  int n_heads_ = 0;
};

// Largest attention weight per pixel; 0: none. `held` chooses points of tokens that are still held at that
// step.
std::vector<float> rasterize_attention(const RasterView& view, std::span<const AttentionPoint> points,
                                       std::span<const int32_t> evicted_at, bool held);

// y = slot. Mean age (steps since birth) of the tokens in the pixel's slots, -1: nothing is there.
std::vector<float> rasterize_slot_age(const RasterView& view, const SlotHistory& history);

}  // namespace kvlapse::gui
