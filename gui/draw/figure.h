// Table and Figure: a panel's content without pixels, for export as CSV and SVG. Plain data.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

namespace kvlapse::gui {

struct Table {
  std::vector<std::string> columns;  // with unit, e.g. "held_tokens"
  std::vector<std::vector<std::string>> rows;
};
void write_csv(const std::filesystem::path& file, const Table& table);

struct FigureSeries {
  std::string name;
  std::vector<double> xs, ys;
  uint32_t colour = 0;  // ImU32
  bool line = true;     // otherwise markers
};

// An RGBA image that covers [x_min, x_max] x [y_min, y_max] of the axes; row 0 is at y_min.
struct FigureImage {
  int width = 0, height = 0;
  std::vector<uint32_t> pixels;
  double x_min = 0, x_max = 1, y_min = 0, y_max = 1;
};

struct Figure {
  std::string title, x_label, y_label;
  double x_min = 0, x_max = 1, y_min = 0, y_max = 1;
  bool y_down = false;
  std::vector<FigureImage> images;
  std::vector<FigureSeries> series;
};
// Black on white for papers; images are embedded as PNG, everything else stays vectors and text.
void write_svg(const std::filesystem::path& file, const Figure& figure);
// A table as SVG text.
void write_svg(const std::filesystem::path& file, const Table& table, const std::string& title);

}  // namespace kvlapse::gui
