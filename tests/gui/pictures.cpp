// pictures REFERENCES [write]: draws panels of a small synthetic trace through OpenGL without a display and
// compares them with references: block averages of 8 x 8 pixels, so that antialiasing does not count and a
// missing line does. The built-in font is used everywhere. Then shows that the tolerance notices a missing
// series: each one that is drawn invisibly must fail its picture.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "core/base/error.h"
#include "gui/app/application.h"
#include "gui/app/platform.h"
#include "replay/sweep.h"
#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"

namespace kvlapse::gui {
namespace {

namespace fs = std::filesystem;

constexpr int kWidth = 960, kHeight = 600, kBlock = 8;
constexpr int kColumns = kWidth / kBlock, kRows = kHeight / kBlock;
constexpr int kSame = 12;  // levels of 255 that a block may differ
// A block that changes this much is no antialiasing: a single marker must not get lost among many blocks.
constexpr int kFar = 48, kFarWeight = 10;
constexpr double kMostWrong = 0.002;  // share of blocks that may differ more
struct Picture {
  const char* name;  // of the reference
  const char* trace;
  const char* panel;
  std::vector<int> series;  // colours of the theme that this picture draws lines with
  bool replayed = false;    // with results of a replay, of which one is chosen
};
const std::vector<Picture>& pictures() {
  static const std::vector<Picture> all = {
      {"timeline", "a.kvl", "timeline", {0, 1, 3, 4, 5, 6}},
      {"timeline-gpu", "gpu.kvl", "timeline", {}},
      {"head-grid", "a.kvl", "head-grid", {}},
      {"life-map", "a.kvl", "life-map", {}},
      {"life-map-slots", "a.kvl", "life-map:0 1 0 0", {}},
      {"life-map-attention", "a.kvl", "life-map:0 0 1 0", {}},
      {"life-map-against", "a.kvl", "life-map:0 0 0 3", {3}},
      {"text", "a.kvl", "text", {}},
      {"text-regret", "a.kvl", "text:3", {}},
      {"roofline", "gpu.kvl", "bandwidth:1", {0, 1, 2, 3}},
      {"info", "a.kvl", "info", {}},
      {"memory", "a.kvl", "memory", {0, 1, 2, 6}},
      {"bandwidth", "a.kvl", "bandwidth", {4, 5}},
      {"bandwidth-gpu", "gpu.kvl", "bandwidth", {1, 4, 5}},
      {"kernels", "a.kvl", "kernels", {}},
      {"kernels-gpu", "gpu.kvl", "kernels", {0, 1}},
      {"recordings", "a.kvl", "recordings", {0, 1, 2}},
      {"what-if", "a.kvl", "what-if", {}},
      {"compare", "b.kvl", "compare", {0, 1}, true},
      {"compare-error", "b.kvl", "compare:1", {0, 1}, true},
      {"head-grid-error", "b.kvl", "head-grid:4 0", {}, true},
      {"timeline-recall", "b.kvl", "timeline", {0, 2}, true},
      {"life-map-difference", "b.kvl", "life-map:0 0 0 2", {1}, true},
  };
  return all;
}

using Blocks = std::vector<uint8_t>;  // [kRows][kColumns][3]

Blocks average(const std::vector<uint32_t>& pixels) {
  Blocks blocks;
  for (int row = 0; row < kRows; ++row) {
    for (int column = 0; column < kColumns; ++column) {
      for (int shift = 0; shift < 24; shift += 8) {
        int sum = 0;
        for (int y = 0; y < kBlock; ++y) {
          for (int x = 0; x < kBlock; ++x)
            sum += static_cast<int>(
                pixels[static_cast<size_t>(row * kBlock + y) * kWidth + column * kBlock + x] >> shift & 255);
        }
        blocks.push_back(static_cast<uint8_t>(sum / (kBlock * kBlock)));
      }
    }
  }
  return blocks;
}

double share_wrong(const Blocks& a, const Blocks& b) {
  if (a.size() != b.size()) return 1;
  int wrong = 0;
  for (size_t i = 0; i < a.size(); i += 3) {
    int most = 0;
    for (size_t c = 0; c < 3; ++c) most = std::max(most, std::abs(a[i + c] - b[i + c]));
    wrong += most > kFar ? kFarWeight : most > kSame ? 1 : 0;
  }
  return static_cast<double>(wrong) / (kRows * kColumns);
}

// `hidden`: series whose colour is that of the background; -1: none.
Blocks draw(const Picture& picture, int hidden = -1) {
  const std::string panel = picture.panel;
  ApplicationOptions options;
  options.persistent = false;
  options.builtin_font = true;
  options.only_panel = panel;
  Application app(options);
  app.open(picture.trace);
  if (picture.replayed) {
    app.open("b.kvr");
    app.ui().what_if = {"streaming_llm", "40%"};
  }
  if (panel == "recordings" || panel == "life-map:0 0 0 3") app.open("b.kvl");
  if (hidden >= 0) app.ui().theme.series[static_cast<size_t>(hidden)] = app.ui().theme.background;
  Platform platform(PlatformKind::headless, kWidth, kHeight, "kvlapse");
  app.select(200, 1, 0);
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  for (int settled = 0, frames = 0; settled < 4 || frames < 8; ++frames) {
    platform.new_frame();
    app.frame();
    ImGui::Render();
    platform.present(app.clear_colour());
    settled = app.settled() ? settled + 1 : 0;
    if (settled == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (std::chrono::steady_clock::now() > deadline) fail("{}: not ready after 60 s", panel);
  }
  int width = 0, height = 0;
  return average(platform.read_pixels(&width, &height));
}

Blocks read(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::string header;
  for (int line = 0; line < 3; ++line) std::getline(in, header);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write(const fs::path& file, const Blocks& blocks) {
  std::ofstream out(file, std::ios::binary);
  out << fmt::format("P6\n{} {}\n255\n", kColumns, kRows);
  out.write(reinterpret_cast<const char*>(blocks.data()), static_cast<std::streamsize>(blocks.size()));
}

int run(const fs::path& references, bool make) {
  const test::TemporaryFolder folder;
  fs::current_path(folder.path());
  test::SyntheticProcess process;
  process.n_steps = 400;
  process.n_prompt = 40;
  process.budget = 96;
  process.cadence = 32;
  write_synthetic_trace("a.kvl", process);
  test::SyntheticProcess wide = process;  // enough bytes for a share of the memory's peak
  wide.geometry.head_dim = 128;
  write_synthetic_trace("gpu.kvl", test::with_gpu(wide));
  process.budget = 0;  // nothing is evicted: the series of evictions is flat
  write_synthetic_trace("b.kvl", process);
  Sweep sweep({"b.kvl"}, parse_policy_list("streaming_llm,h2o,random:pin_prompt=1,oracle_mass"),
              parse_budget_list("20%,40%,70%"), {});
  ResultsFile results("b.kvr", ResultsFile::Open::create);
  sweep.run(results);
  results.finish();
  int failures = 0;
  for (const Picture& picture : pictures()) {
    const Blocks found = draw(picture);
    const fs::path file = references / (std::string(picture.name) + ".ppm");
    if (make) {
      write(file, found);
      continue;
    }
    const Blocks reference = read(file);
    const double wrong = share_wrong(found, reference);
    fmt::print("{}: {:.3f} % of the blocks differ (limit {:.3f} %)\n", picture.name, 100 * wrong,
               100 * kMostWrong);
    if (wrong > kMostWrong) {
      ++failures;
      write(fs::temp_directory_path() / fmt::format("kvlapse-picture-{}.ppm", picture.name), found);
    }
    for (int series : picture.series) {
      const double without = share_wrong(draw(picture, series), reference);
      fmt::print("{} without series {}: {:.3f} % differ, must exceed the limit\n", picture.name, series,
                 100 * without);
      if (without <= kMostWrong) ++failures;
    }
  }
  if (make) return 0;
  for (const char* panel : {"timeline", "life-map", "memory"}) {
    const double wrong =
        share_wrong(draw({panel, "b.kvl", panel, {}}), read(references / (std::string(panel) + ".ppm")));
    fmt::print("{} without evictions: {:.3f} % differ, must exceed the limit\n", panel, 100 * wrong);
    if (wrong <= kMostWrong) ++failures;
  }
  return failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvlapse::gui

int main(int argc, char** argv) {
  if (argc < 2) {
    fmt::print(stderr, "usage: gui_pictures REFERENCES [write]\n");
    return 64;
  }
  try {
    return kvlapse::gui::run(std::filesystem::absolute(argv[1]), argc > 2);
  } catch (const std::exception& error) {
    fmt::print(stderr, "gui_pictures: {}\n", error.what());
    return 2;
  }
}
