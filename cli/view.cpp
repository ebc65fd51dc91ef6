// kvlapse view: the dashboard.
#include <charconv>
#include <memory>

#include "cli/command.h"
#include "core/base/error.h"

#ifdef KVLAPSE_WITH_GUI
#include "gui/view.h"
#endif

namespace kvlapse::cli {
namespace {

struct Options {
  std::vector<std::string> files;
  std::string screenshot, panel, size = "1600x900", theme;
  std::optional<int> step, layer, kv_head;
  double scale = 0;
};

#ifdef KVLAPSE_WITH_GUI
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
#endif

void view([[maybe_unused]] const Options& options) {
#ifdef KVLAPSE_WITH_GUI
  gui::ViewOptions view;
  view.files.assign(options.files.begin(), options.files.end());
  view.screenshot = options.screenshot;
  view.panel = options.panel;
  view.step = options.step, view.layer = options.layer, view.kv_head = options.kv_head;
  view.scale = static_cast<float>(options.scale);
  view.theme = options.theme;
  parse_size(options.size, view.width, view.height);
  gui::run_view(view);
#else
  fail("view: this kvlapse was built without the dashboard; configure with -DKVLAPSE_GUI=ON and build again");
#endif
}

}  // namespace

void add_view(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "view", "shows traces and results on the desktop, or draws one picture",
                  "  kvlapse view run.kvl run.kvr\n"
                  "  kvlapse view run.kvl --screenshot lives.png --panel life-map --layer 2 --head 1\n",
                  false);
  auto options = std::make_shared<Options>();
  command->add_option("files", options->files, "traces (.kvl) and results (.kvr)")->type_name("FILE");
  command->add_option("--screenshot", options->screenshot, "draw once into this PNG; needs no display");
  command->add_option("--panel", options->panel, "show this panel alone");
  command->add_option("--step", options->step, "selected step");
  command->add_option("--layer", options->layer, "selected layer");
  command->add_option("--head", options->kv_head, "selected kv head");
  command->add_option("--size", options->size, "WIDTHxHEIGHT in pixels")->capture_default_str();
  command->add_option("--scale", options->scale, "size of text and lines; 0: the display's");
  command->add_option("--theme", options->theme, "dark, light or colour-blind");
  command->callback([options] { view(*options); });
}

}  // namespace kvlapse::cli
