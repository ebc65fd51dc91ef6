// LinePyramid: minima and maxima of a column at every power of two, so that a line of any length is drawn
// with two points a pixel and no extreme is lost. Immutable after construction; any thread.
#pragma once

#include <span>
#include <vector>

namespace kvlapse::gui {

// Points of a polyline, ready to draw.
struct DrawnLine {
  std::vector<float> xs, ys;
};

class LinePyramid {
 public:
  LinePyramid() = default;
  // Value i lies at x = first_x + i.
  LinePyramid(std::span<const float> values, double first_x);
  // At most two points for each of `width` pixels over [x_min, x_max], one outside at each end.
  DrawnLine line(double x_min, double x_max, int width) const;
  float lowest() const { return lowest_; }
  float highest() const { return highest_; }
  bool empty() const { return levels_.empty(); }

 private:
  struct Extremes {
    float low, high;
  };
  std::vector<std::vector<Extremes>> levels_;  // [0]: the values themselves
  double first_x_ = 0;
  float lowest_ = 0, highest_ = 0;
};

}  // namespace kvlapse::gui
