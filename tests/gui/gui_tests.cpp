// Drives the real program through the Dear ImGui test engine, without a renderer: every panel on a good, an
// empty, an interrupted and a damaged trace, then what a person does. A crash, an ImGui error or a failed
// check fails the run.
#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "core/base/error.h"
#include "gui/app/application.h"
#include "gui/app/platform.h"
#include "imgui_te_context.h"
#include "imgui_te_engine.h"
#include "imgui_te_exporters.h"
#include "tests/gui/drive.h"
#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/sqlite.h"

namespace kvlapse::gui {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

std::string word(int32_t token) {
  return token % 3 == 0 ? " carry" : token % 3 == 1 ? " the" : " one";
}

test::SyntheticProcess small_process() {
  test::SyntheticProcess process;
  process.n_steps = 260;
  process.n_prompt = 30;
  process.budget = 64;
  return process;
}

TraceWriterOptions with_texts() {
  TraceWriterOptions options;
  options.token_text = word;
  return options;
}

void make_files(Files& files) {
  const test::SyntheticProcess process = small_process();
  files.good = files.folder / "good.kvl";
  write_synthetic_trace(files.good, process, with_texts());
  files.other = files.folder / "other.kvl";  // the same tokens under a smaller budget
  test::SyntheticProcess tighter = process;
  tighter.budget = 40;
  write_synthetic_trace(files.other, tighter, with_texts());
  files.gpu = files.folder / "gpu.kvl";
  test::SyntheticProcess wide = process;  // enough bytes for a share of the memory's peak
  wide.geometry.head_dim = 128;
  write_synthetic_trace(files.gpu, test::with_gpu(wide), with_texts());
  files.empty = files.folder / "empty.kvl";
  { TraceWriter writer(files.empty, process.header(), with_texts()); }
  files.interrupted = files.folder / "interrupted.kvl";
  {
    TraceHeader header = process.header();
    header.meta["device"] = "cpu AVX2, 2 threads";
    TraceWriter writer(files.interrupted, header, with_texts());
    test::SyntheticRun run(writer, process);
    for (int i = 0; i < 150; ++i) run.step();
    run.end("interrupted");
    writer.finish(true);
  }
  files.damaged = files.folder / "damaged.kvl";
  fs::copy_file(files.good, files.damaged);
  Database database = Database::open_for_writing(files.damaged);
  database.execute(
      "UPDATE KV_CHUNK SET data = zeroblob(length(data)) WHERE kind = 'occupancy' AND layer = 1 AND "
      "step_begin = 64");
}

void register_panel_tests(ImGuiTestEngine* engine, Application* app, const std::string& kind, bool has_data) {
  for (const PanelInfo& info : panel_registry()) {
    ImGuiTest* test = IM_REGISTER_TEST(engine, "panels", "");
    test->SetOwnedName(fmt::format("{} on {}", info.name, kind).c_str());
    const std::string name = info.name;
    test->TestFunc = [app, name, has_data, kind](ImGuiTestContext* ctx) {
      app->set_panel_open(name, true);
      settle(ctx, *app);
      const DrawModel* model = app->shown_model(name);
      IM_CHECK(model != nullptr);
      const bool may_be_absent =
          (name == "kernels" && kind != "a GPU trace") || name == "compare" || name == "recordings";
      if (has_data && !may_be_absent) IM_CHECK_STR_EQ(model->absence.c_str(), "");
      // What is absent has nothing to export; what is there has rows.
      if (!model->absence.empty()) IM_CHECK(app->shown_table(name).columns.empty());
      // Never an empty box: what is absent is explained.
      if (name == "kernels" && app->ui().trace && kind != "a GPU trace")
        IM_CHECK(model->absence.find("--counters") != std::string::npos);
      if (!has_data && (name == "timeline" || name == "life-map" || name == "text"))
        IM_CHECK(!model->absence.empty());
    };
  }
}

struct Totals {
  int run = 0, passed = 0;
};

// One program, as a person would start it, under the engine.
template <typename Register>
void drive(Totals& totals, const fs::path& file, Register add_tests) {
  ApplicationOptions options;
  options.examine_machine = [] { return std::vector<MachineFinding>{{"cpu", "works", "a made-up one", ""}}; };
  options.measure_machine = [](int threads) { return MachineCeilings{15.0 * threads, 100.0 * threads}; };
  auto app = std::make_unique<Application>(options);
  auto platform = std::make_unique<Platform>(PlatformKind::null, 1280, 800, "kvlapse");
  ImGuiTestEngine* engine = ImGuiTestEngine_CreateContext();
  ImGuiTestEngineIO& io = ImGuiTestEngine_GetIO(engine);
  io.ConfigRunSpeed = ImGuiTestRunSpeed_Fast;
  io.ConfigNoThrottle = true;
  io.ConfigFixedDeltaTime = 1.0F / 60.0F;
  io.ConfigVerboseLevelOnError = ImGuiTestVerboseLevel_Debug;
  io.ConfigLogToTTY = true;
  io.ConfigWatchdogWarning = io.ConfigWatchdogKillTest = io.ConfigWatchdogKillApp =
      1e6F;  // of made-up seconds
  io.ConfigVerboseLevel = ImGuiTestVerboseLevel_Warning;
  ImGuiTestEngine_Start(engine, ImGui::GetCurrentContext());
  if (!file.empty()) app->open(file);
  add_tests(engine, app.get());
  ImGuiTestEngine_QueueTests(engine, ImGuiTestGroup_Tests, nullptr, ImGuiTestRunFlags_RunFromCommandLine);
  while (!ImGuiTestEngine_IsTestQueueEmpty(engine)) {
    platform->new_frame();
    app->frame();
    ImGui::Render();
    platform->present(0);
    ImGuiTestEngine_PostSwap(engine);
  }
  ImGuiTestEngineResultSummary summary;
  ImGuiTestEngine_GetResultSummary(engine, &summary);
  totals.run += summary.CountTested;
  totals.passed += summary.CountSuccess;
  ImGuiTestEngine_Stop(engine);
  platform.reset();
  app.reset();
  ImGuiTestEngine_DestroyContext(engine);
}

// A file that another process writes: what it committed is on screen within half a second, and the writer is
// not held up.
void live_test(Totals& totals, const Files& files) {
  const fs::path file = files.folder / "live.kvl";
  FILE* child = popen(fmt::format("'{}' '{}' 5000", KVLAPSE_TRACE_CHILD, file.string()).c_str(), "r");
  if (child == nullptr) fail("{}: cannot start", KVLAPSE_TRACE_CHILD);
  struct Commit {
    int steps;
    Clock::time_point at;
  };
  std::mutex mutex;
  std::vector<Commit> commits;
  std::thread listener([&] {
    for (char line[64]; std::fgets(line, sizeof line, child) != nullptr;) {
      const std::scoped_lock lock(mutex);
      commits.push_back({std::atoi(line), Clock::now()});
    }
  });
  const auto last_commit = [&] {
    const std::scoped_lock lock(mutex);
    return commits.empty() ? Commit{0, Clock::now()} : commits.back();
  };
  while (last_commit().steps == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  drive(totals, file, [&](ImGuiTestEngine* engine, Application* app) {
    ImGuiTest* test = IM_REGISTER_TEST(engine, "live", "follows a growing trace");
    test->TestFunc = [app, &last_commit](ImGuiTestContext* ctx) {
      std::vector<double> seconds;
      for (int round = 0; round < 8; ++round) {
        const Commit target = last_commit();
        const Clock::time_point deadline = Clock::now() + std::chrono::seconds(30);
        // Read, and drawn: the timeline's model is that of the newest version.
        while ((app->ui().n_steps < target.steps || !app->shows_current("timeline")) &&
               Clock::now() < deadline)
          ctx->Yield();
        seconds.push_back(std::chrono::duration<double>(Clock::now() - target.at).count());
        IM_CHECK_GE(app->ui().n_steps, target.steps);
        IM_CHECK_EQ(app->ui().selection.step, app->ui().n_steps - 1);
        const Clock::time_point next = Clock::now() + std::chrono::milliseconds(130);
        while (Clock::now() < next) ctx->Yield();
      }
      // One hiccup of a shared machine is forgiven, which stops the writer as well.
      std::ranges::sort(seconds);
      fmt::print("live: a committed step is shown after {:.2f} s, {:.2f} s at most\n",
                 seconds[seconds.size() - 2], seconds.back());
      IM_CHECK_LT(seconds[seconds.size() - 2], 0.5);
    };
  });
  std::vector<double> pauses = {0, 0};
  {
    const std::scoped_lock lock(mutex);
    for (size_t i = 1; i < commits.size(); ++i)
      pauses.push_back(std::chrono::duration<double>(commits[i].at - commits[i - 1].at).count());
  }
  std::ranges::sort(pauses);
  fmt::print("live: the writer pauses {:.2f} s between commits, {:.2f} s at most\n",
             pauses[pauses.size() - 2], pauses.back());
  ++totals.run;
  totals.passed += pauses[pauses.size() - 2] < 0.5 ? 1 : 0;
  listener.join();
  pclose(child);
}

int run() {
  Files files;
  make_files(files);
  fs::current_path(files.folder.path());
  setenv("KVLAPSE_CONFIG_DIR", (files.folder / "config").c_str(), 1);
  Totals totals;
  int failures = 0;
  const auto panels = [&](const fs::path& file, const std::string& kind, bool has_data) {
    drive(totals, file, [&](ImGuiTestEngine* engine, Application* app) {
      register_panel_tests(engine, app, kind, has_data);
      if (kind == "an interrupted trace") register_cpu_tests(engine, app);
      if (kind != "a damaged trace") return;
      ImGuiTest* test = IM_REGISTER_TEST(engine, "banner", "names the damaged chunk");
      test->TestFunc = [app](ImGuiTestContext* ctx) {
        const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
        while (!app->ui().trace->damage_checked() && Clock::now() < deadline) ctx->Yield();
        ctx->Yield(3);
        const std::vector<ChunkDamage> damage = app->ui().trace->damage();
        IM_CHECK_EQ(static_cast<int>(damage.size()), 1);
        IM_CHECK_STR_EQ(damage.front().kind.c_str(), "occupancy");
        IM_CHECK(ctx->WindowInfo("//##banner").Window != nullptr);
      };
    });
  };
  panels(files.good, "a good trace", true);
  panels({}, "no trace", false);
  panels(files.empty, "an empty trace", false);
  panels(files.interrupted, "an interrupted trace", true);
  panels(files.damaged, "a damaged trace", true);
  panels(files.gpu, "a GPU trace", true);
  drive(totals, files.good,
        [&](ImGuiTestEngine* engine, Application* app) { register_use_tests(engine, app, files); });
  drive(totals, files.gpu,
        [&](ImGuiTestEngine* engine, Application* app) { register_gpu_tests(engine, app); });
  live_test(totals, files);
  // An unreadable file is refused.
  std::ofstream(files.folder / "noise.kvl") << "this is no trace";
  try {
    TraceSource source(files.folder / "noise.kvl");
    fmt::print("FAILED: noise.kvl was opened\n");
    ++failures;
  } catch (const Error&) {
  }
  failures += totals.run - totals.passed;
  fmt::print("{} of {} tests passed\n", totals.passed, totals.run);
  return failures == 0 && totals.run > 0 ? 0 : 1;
}

}  // namespace
}  // namespace kvlapse::gui

int main() {
  return kvlapse::gui::run();
}
