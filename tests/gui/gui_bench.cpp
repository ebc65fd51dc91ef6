// gui_bench TRACE.kvl [frames]: the dashboard without a renderer. Prints the time to the first useful frame,
// the UI thread's CPU time of a frame while loading and while playing with the default panels, and the
// memory, as JSON lines.
#include <sys/resource.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "gui/app/application.h"
#include "gui/app/platform.h"

namespace {

using Clock = std::chrono::steady_clock;

double thread_cpu_ms() {
  timespec now{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) * 1e3 + static_cast<double>(now.tv_nsec) * 1e-6;
}

double frame_ms(kvlapse::gui::Application& app, kvlapse::gui::Platform& platform) {
  const double start = thread_cpu_ms();
  platform.new_frame();
  app.frame();
  ImGui::Render();
  platform.present(0);
  return thread_cpu_ms() - start;
}

void print(const char* what, double median, double limit, const char* unit) {
  std::printf(
      "{\"bench\": \"view\", \"case\": \"%s\", \"device\": \"cpu\", \"median\": %.3f, \"unit\": \"%s\", "
      "\"limit\": %.0f, \"ratio_to_limit\": %.3f}\n",
      what, median, unit, limit, median / limit);
}

}  // namespace

int main(int argc, char** argv) {
  using namespace kvlapse::gui;
  if (argc < 2) {
    std::fprintf(stderr, "usage: gui_bench TRACE.kvl [frames]\n");
    return 64;
  }
  const int frames = argc > 2 ? std::atoi(argv[2]) : 1200;
  try {
    const Clock::time_point start = Clock::now();
    ApplicationOptions options;
    options.persistent = false;
    Application app(options);
    Platform platform(PlatformKind::null, 1920, 1080, "kvlapse");
    app.open(argv[1]);
    app.select(0, 0, 0);
    std::vector<double> loading, playing;
    const auto shows = [&](const char* name) {
      const DrawModel* model = app.shown_model(name);
      return model != nullptr && model->absence.empty();
    };
    double first_useful_ms = 0, settled_ms = 0;
    while (settled_ms == 0) {
      loading.push_back(frame_ms(app, platform));
      const double now = std::chrono::duration<double, std::milli>(Clock::now() - start).count();
      if (first_useful_ms == 0 && shows("timeline") && shows("life-map") && shows("head-grid"))
        first_useful_ms = now;
      if (first_useful_ms > 0 && app.settled() && loading.size() > 8) settled_ms = now;
      if (now > 120e3) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(4));
    }
    app.ui().playback.playing = true;
    app.ui().playback.steps_per_second = app.ui().n_steps / (frames / 60.0);
    for (int i = 0; i < frames; ++i) {
      playing.push_back(frame_ms(app, platform));
      std::this_thread::sleep_for(std::chrono::milliseconds(8));
    }
    std::ranges::sort(loading);
    std::ranges::sort(playing);
    rusage usage{};
    getrusage(RUSAGE_SELF, &usage);
    print("first useful frame", first_useful_ms, 1000, "ms");
    print("all default panels shown", settled_ms, 5000, "ms");
    print("slowest frame while loading", loading.back(), 50, "ms CPU");
    print("frame while playing, median", playing[playing.size() / 2], 4, "ms CPU");
    print("frame while playing, 99th percentile", playing[playing.size() * 99 / 100], 8, "ms CPU");
    print("peak memory", static_cast<double>(usage.ru_maxrss) / 1024, 1536, "MiB");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "gui_bench: %s\n", error.what());
    return 2;
  }
  return 0;
}
