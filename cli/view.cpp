// kvlapse view: the dashboard.
#include "gui/view.h"

#include <algorithm>
#include <charconv>
#include <memory>

#include "cli/command.h"
#include "cli/doctor.h"
#include "core/base/error.h"
#include "kernels/cpu/bench/bench.h"

namespace kvlapse::cli {
namespace {

struct Options {
  std::vector<std::string> files, screenshots, panels;
  std::string size = "1600x900", theme;
  std::optional<int> step, layer, kv_head;
  double scale = 0;
};

void parse_size(const std::string& text, int& width, int& height) {
  const char* end = text.data() + text.size();
  const auto first = std::from_chars(text.data(), end, width);
  bool good = first.ec == std::errc{} && first.ptr < end && *first.ptr == 'x';
  if (good) {
    const auto second = std::from_chars(first.ptr + 1, end, height);
    good = second.ec == std::errc{} && second.ptr == end;
  }
  if (!good || width < 320 || height < 240 || width > 16384 || height > 16384) {
    fail_usage("--size {}: expected WIDTHxHEIGHT in pixels, 320x240 to 16384x16384", text);
  }
}

void view(const Options& options) {
  gui::ViewOptions view;
  view.files.assign(options.files.begin(), options.files.end());
  const size_t n_panels = options.panels.size(), n_pictures = options.screenshots.size();
  if (n_panels > std::max<size_t>(1, n_pictures) ||
      (n_pictures > 1 && n_panels != 0 && n_panels != n_pictures))
    fail_usage("--panel: expected one for each of the {} screenshots, found {}", n_pictures, n_panels);
  const auto panel = [&](size_t i) {
    return i < n_panels && options.panels[i] != "all" ? options.panels[i] : "";
  };
  view.panel = panel(0);
  for (size_t i = 0; i < n_pictures; ++i) view.screenshots.push_back({options.screenshots[i], panel(i)});
  view.step = options.step, view.layer = options.layer, view.kv_head = options.kv_head;
  view.scale = static_cast<float>(options.scale);
  view.theme = options.theme;
  parse_size(options.size, view.width, view.height);
  view.examine_machine = [] {
    std::vector<gui::MachineFinding> rows;
    for (const Finding& finding : examine_machine())
      rows.push_back({finding.name, std::string(state_name(finding.state)), finding.detail, finding.advice});
    return rows;
  };
  view.measure_machine = [](int threads) {
    constexpr size_t kBytes = size_t{192} << 20;  // beyond the last-level cache of most machines
    return gui::MachineCeilings{read_bandwidth_gbps(threads, kBytes), multiply_add_gflops(threads)};
  };
  gui::run_view(view);
}

}  // namespace

void add_view(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "view", "shows traces and results on the desktop, or draws pictures",
      "  kvlapse view run.kvl run.kvr\n"
      "  kvlapse view run.kvl --screenshot lives.png --panel life-map --layer 2 --head 1\n"
      "  kvlapse view run.kvl --screenshot all.png --panel all --screenshot text.png --panel text\n",
      false);
  auto options = std::make_shared<Options>();
  command->add_option("files", options->files, "traces (.kvl) and results (.kvr)")->type_name("FILE");
  command
      ->add_option("--screenshot", options->screenshots,
                   "draw once into this PNG; needs no display; repeatable")
      ->allow_extra_args(false);
  command
      ->add_option("--panel", options->panels,
                   "show this panel alone; once for each screenshot, 'all': every panel")
      ->allow_extra_args(false);
  command->add_option("--step", options->step, "selected step");
  command->add_option("--layer", options->layer, "selected layer");
  command->add_option("--head", options->kv_head, "selected kv head");
  command->add_option("--size", options->size, "WIDTHxHEIGHT in pixels")->capture_default_str();
  command->add_option("--scale", options->scale, "size of text and lines; 0: the display's");
  command->add_option("--theme", options->theme, "dark, light or colour-blind");
  command->callback([options] { view(*options); });
}

}  // namespace kvlapse::cli
