#include "gui/view.h"

#include <chrono>
#include <thread>

#include "core/base/error.h"
#include "gui/app/application.h"
#include "gui/app/platform.h"
#include "gui/draw/png.h"

namespace kvlapse::gui {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kScreenshotPatience{120};
constexpr std::chrono::milliseconds kAfterInput{600};  // tooltips and hover effects settle
constexpr double kIdleWait = 1.0;                      // seconds; events end it

ThemeKind parse_theme(const std::string& name) {
  for (size_t i = 0; i < kThemeNames.size(); ++i) {
    if (kThemeNames[i].substr(0, name.size()) == name) return static_cast<ThemeKind>(i);
  }
  fail_usage("--theme {}: expected dark, light or colour-blind", name);
}

void draw_frame(Application& app, Platform& platform) {
  platform.new_frame();
  app.frame();
  ImGui::Render();
  platform.present(app.clear_colour());
  if (const auto picture = app.take_picture_request()) {
    int width = 0, height = 0;
    const std::vector<uint32_t> pixels = platform.read_pixels(&width, &height);
    const int x = std::clamp(picture->x, 0, width), y = std::clamp(picture->y, 0, height);
    const int w = std::min(picture->width, width - x), h = std::min(picture->height, height - y);
    if (pixels.empty() || w <= 0 || h <= 0) return app.picture_done("no picture: nothing is rendered here");
    std::vector<uint32_t> cut(static_cast<size_t>(w) * h);
    for (int row = 0; row < h; ++row)
      std::copy_n(pixels.begin() + static_cast<std::ptrdiff_t>(y + row) * width + x, w,
                  cut.begin() + static_cast<std::ptrdiff_t>(row) * w);
    try {
      write_png(picture->file, w, h, cut);
      app.picture_done("Written: " + picture->file.string());
    } catch (const Error& error) {
      app.picture_done(error.what());
    }
  }
}

void take_screenshot(Application& app, Platform& platform, const Screenshot& screenshot) {
  app.show_alone(screenshot.panel);
  const Clock::time_point deadline = Clock::now() + kScreenshotPatience;
  // Sizes found in one frame change what is prepared for the next: settled twice in a row is settled.
  for (int settled = 0, frames = 0; settled < 4 || frames < 8; ++frames) {
    draw_frame(app, platform);
    platform.poll(0);
    settled = app.settled() ? settled + 1 : 0;
    if (settled == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    if (Clock::now() > deadline)
      fail("{}: the panels were not ready after {} s", screenshot.file.string(), kScreenshotPatience.count());
  }
  draw_frame(app, platform);
  int width = 0, height = 0;
  const std::vector<uint32_t> pixels = platform.read_pixels(&width, &height);
  write_png(screenshot.file, width, height, pixels);
}

}  // namespace

void run_view(const ViewOptions& options) {
  const bool headless = !options.screenshots.empty();
  ApplicationOptions app_options;
  app_options.persistent = !headless;
  app_options.only_panel = options.panel;
  app_options.wake = [] { Platform::wake(); };
  app_options.scale = options.scale > 0 ? options.scale : 1;
  app_options.examine_machine = options.examine_machine;
  app_options.measure_machine = options.measure_machine;
  if (!options.theme.empty()) app_options.theme = parse_theme(options.theme);
  Application app(app_options);
  for (const auto& file : options.files) app.open(file);
  Platform platform(headless ? PlatformKind::headless : PlatformKind::window, options.width, options.height,
                    "kvlapse");
  if (options.scale <= 0) app.set_scale(platform.content_scale());
  app.select(options.step, options.layer, options.kv_head);
  if (headless) {
    for (const Screenshot& screenshot : options.screenshots) take_screenshot(app, platform, screenshot);
    return;
  }

  Clock::time_point active_until = Clock::now() + kAfterInput;
  while (!platform.wants_close() && !app.wants_quit()) {
    const bool busy = app.wants_frame() || Clock::now() < active_until;
    platform.poll(busy ? 0 : kIdleWait);
    for (const std::string& file : platform.take_dropped_files()) app.open_or_tell(file);
    if (platform.take_activity()) active_until = Clock::now() + kAfterInput;
    if (app.wants_frame() || app.document_changed() || Clock::now() < active_until) draw_frame(app, platform);
  }
}

}  // namespace kvlapse::gui
