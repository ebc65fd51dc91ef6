#include "gui/draw/figure.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <fstream>

#include "core/base/error.h"
#include "gui/draw/png.h"

namespace kvlapse::gui {
namespace {

std::string csv_field(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) {
    if (c == '"') quoted += '"';
    quoted += c;
  }
  return quoted + '"';
}

std::string xml(const std::string& text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '&': out += "&amp;"; break;
      case '<': out += "&lt;"; break;
      case '>': out += "&gt;"; break;
      case '"': out += "&quot;"; break;
      default: out += static_cast<unsigned char>(c) < 32 ? ' ' : c;
    }
  }
  return out;
}

std::string base64(const std::string& bytes) {
  static constexpr char kLetters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string out;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t group = 0;
    for (size_t j = 0; j < 3; ++j)
      group = group << 8 | (i + j < bytes.size() ? static_cast<unsigned char>(bytes[i + j]) : 0U);
    for (size_t j = 0; j < 4; ++j) out += i + j <= bytes.size() ? kLetters[group >> (18 - 6 * j) & 63] : '=';
  }
  return out;
}

void save(const std::filesystem::path& file, const std::string& text) {
  std::ofstream out(file, std::ios::binary);
  out << text;
  if (!out.flush()) fail("{}: could not write {} bytes", file.string(), text.size());
}

// Round distances for about five ticks.
double tick_step(double span) {
  const double rough = span / 5, magnitude = std::pow(10, std::floor(std::log10(rough)));
  const double rest = rough / magnitude;
  return magnitude * (rest < 1.5 ? 1 : rest < 3.5 ? 2 : rest < 7.5 ? 5 : 10);
}

std::string css(uint32_t colour) {
  return fmt::format("#{:02x}{:02x}{:02x}", colour & 255, colour >> 8 & 255, colour >> 16 & 255);
}

}  // namespace

void write_csv(const std::filesystem::path& file, const Table& table) {
  std::string text;
  const auto line = [&](const std::vector<std::string>& fields) {
    for (size_t i = 0; i < fields.size(); ++i) text += (i > 0 ? "," : "") + csv_field(fields[i]);
    text += '\n';
  };
  line(table.columns);
  for (const auto& row : table.rows) line(row);
  save(file, text);
}

void write_svg(const std::filesystem::path& file, const Figure& figure) {
  constexpr double kWidth = 720, kHeight = 460, kLeft = 72, kRight = 16, kTop = 34, kBottom = 52;
  const double w = kWidth - kLeft - kRight, h = kHeight - kTop - kBottom;
  const double x_span = std::max(figure.x_max - figure.x_min, 1e-12),
               y_span = std::max(figure.y_max - figure.y_min, 1e-12);
  const auto px = [&](double x) { return kLeft + (x - figure.x_min) / x_span * w; };
  const auto py = [&](double y) {
    const double share = (y - figure.y_min) / y_span;
    return kTop + (figure.y_down ? share : 1 - share) * h;
  };
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" "
      "font-family=\"Inter, Helvetica, Arial, sans-serif\" font-size=\"12\">\n<rect width=\"{0}\" "
      "height=\"{1}\" fill=\"#fff\"/>\n"
      "<text x=\"{2}\" y=\"20\" font-size=\"14\">{3}</text>\n"
      "<clipPath id=\"area\"><rect x=\"{2}\" y=\"{4}\" width=\"{5}\" height=\"{6}\"/></clipPath>\n",
      kWidth, kHeight, kLeft, xml(figure.title), kTop, w, h);
  for (const FigureImage& image : figure.images) {
    std::vector<uint32_t> pixels = image.pixels;
    if (!figure.y_down) {
      for (int row = 0; row < image.height / 2; ++row) {
        std::swap_ranges(pixels.begin() + static_cast<std::ptrdiff_t>(row) * image.width,
                         pixels.begin() + static_cast<std::ptrdiff_t>(row + 1) * image.width,
                         pixels.begin() + static_cast<std::ptrdiff_t>(image.height - 1 - row) * image.width);
      }
    }
    const double x = px(image.x_min), y = std::min(py(image.y_min), py(image.y_max));
    svg += fmt::format(
        "<image clip-path=\"url(#area)\" x=\"{:.2f}\" y=\"{:.2f}\" width=\"{:.2f}\" height=\"{:.2f}\" "
        "preserveAspectRatio=\"none\" "
        "image-rendering=\"pixelated\" href=\"data:image/png;base64,{}\"/>\n",
        x, y, px(image.x_max) - x, std::abs(py(image.y_max) - py(image.y_min)),
        base64(encode_png(image.width, image.height, pixels)));
  }
  for (const double step = tick_step(x_span); double x : [&] {
         std::vector<double> ticks;
         for (double at = std::ceil(figure.x_min / step) * step; at <= figure.x_max + step * 1e-9; at += step)
           ticks.push_back(at);
         return ticks;
       }()) {
    svg += fmt::format(
        "<path d=\"M{0:.2f} {1}v5\" stroke=\"#000\"/><text x=\"{0:.2f}\" y=\"{2}\" "
        "text-anchor=\"middle\">{3:g}</text>\n",
        px(x), kTop + h, kTop + h + 19, x);
  }
  for (const double step = tick_step(y_span); double y : [&] {
         std::vector<double> ticks;
         for (double at = std::ceil(figure.y_min / step) * step; at <= figure.y_max + step * 1e-9; at += step)
           ticks.push_back(at);
         return ticks;
       }()) {
    svg += fmt::format(
        "<path d=\"M{1} {0:.2f}h-5\" stroke=\"#000\"/><text x=\"{2}\" y=\"{3:.2f}\" "
        "text-anchor=\"end\">{4:g}</text>\n",
        py(y), kLeft, kLeft - 8, py(y) + 4, y);
  }
  double legend = kTop + 16;
  for (const FigureSeries& series : figure.series) {
    const std::string colour = css(series.colour);
    if (series.line) {
      svg += fmt::format(
          "<polyline clip-path=\"url(#area)\" fill=\"none\" stroke=\"{}\" stroke-width=\"1.5\" points=\"",
          colour);
      for (size_t i = 0; i < series.xs.size(); ++i)
        svg += fmt::format("{:.2f},{:.2f} ", px(series.xs[i]), py(series.ys[i]));
      svg += "\"/>\n";
    } else {
      for (size_t i = 0; i < series.xs.size(); ++i) {
        svg += fmt::format("<circle cx=\"{:.2f}\" cy=\"{:.2f}\" r=\"3.5\" fill=\"{}\"/>\n", px(series.xs[i]),
                           py(series.ys[i]), colour);
      }
    }
    svg += fmt::format(
        "<rect x=\"{0}\" y=\"{1}\" width=\"14\" height=\"3\" fill=\"{2}\"/><text x=\"{3}\" "
        "y=\"{4}\">{5}</text>\n",
        kLeft + w - 170, legend - 6, colour, kLeft + w - 150, legend, xml(series.name));
    legend += 16;
  }
  svg += fmt::format(
      "<rect x=\"{0}\" y=\"{1}\" width=\"{2}\" height=\"{3}\" fill=\"none\" stroke=\"#000\"/>\n"
      "<text x=\"{4}\" y=\"{5}\" text-anchor=\"middle\">{6}</text>\n"
      "<text transform=\"translate(16 {7}) rotate(-90)\" text-anchor=\"middle\">{8}</text>\n</svg>\n",
      kLeft, kTop, w, h, kLeft + w / 2, kHeight - 12, xml(figure.x_label), kTop + h / 2, xml(figure.y_label));
  save(file, svg);
}

void write_svg(const std::filesystem::path& file, const Table& table, const std::string& title) {
  constexpr double kRow = 18, kLetter = 7.2, kMost = 60;
  std::vector<double> width(table.columns.size());
  for (size_t c = 0; c < width.size(); ++c) {
    size_t letters = table.columns[c].size();
    for (const auto& row : table.rows) letters = std::max(letters, row[c].size());
    width[c] = std::min(static_cast<double>(letters), kMost) * kLetter + 16;
  }
  double total = 24;
  for (double w : width) total += w;
  const double height = 50 + kRow * static_cast<double>(table.rows.size() + 1);
  std::string svg = fmt::format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"{1}\" viewBox=\"0 0 {0} {1}\" "
      "font-size=\"12\" "
      "font-family=\"JetBrains Mono, monospace\">\n<rect width=\"{0}\" height=\"{1}\" fill=\"#fff\"/>\n"
      "<text x=\"12\" y=\"20\" font-size=\"14\">{2}</text>\n",
      std::max(total, 200.0), height, xml(title));
  const auto line = [&](const std::vector<std::string>& fields, double y, const char* weight) {
    double x = 12;
    for (size_t c = 0; c < fields.size(); ++c) {
      svg += fmt::format("<text x=\"{:.1f}\" y=\"{:.1f}\" font-weight=\"{}\">{}</text>", x, y, weight,
                         xml(fields[c].substr(0, static_cast<size_t>(kMost))));
      x += width[c];
    }
    svg += '\n';
  };
  line(table.columns, 42, "bold");
  for (size_t r = 0; r < table.rows.size(); ++r)
    line(table.rows[r], 42 + kRow * static_cast<double>(r + 1), "normal");
  save(file, svg + "</svg>\n");
}

}  // namespace kvlapse::gui
