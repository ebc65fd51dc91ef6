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
#include "replay/results_file.h"
#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/sqlite.h"

namespace kvlapse::gui {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

struct Files {
  test::TemporaryFolder folder;
  fs::path good, other, gpu, empty, interrupted, damaged;
};

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
  fs::copy_file(files.good, files.gpu);
  test::add_gpu_rows(files.gpu, process.geometry.n_layers);
  files.empty = files.folder / "empty.kvl";
  { TraceWriter writer(files.empty, process.header(), with_texts()); }
  files.interrupted = files.folder / "interrupted.kvl";
  {
    TraceWriter writer(files.interrupted, process.header(), with_texts());
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

// Frames until every visible panel shows the current selection.
void settle(ImGuiTestContext* ctx, Application& app) {
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(20);
  ctx->Yield(3);
  while (!app.settled() && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ctx->Yield();
  }
  IM_CHECK(app.settled());
  ctx->Yield(2);
}

void run_command(ImGuiTestContext* ctx, const char* text) {
  ctx->KeyPress(ImGuiMod_Ctrl | ImGuiMod_Shift | ImGuiKey_P);
  ctx->Yield(2);
  ctx->KeyCharsReplaceEnter(text);
  ctx->Yield(2);
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
      // Never an empty box: what is absent is explained.
      if (name == "kernels" && app->ui().trace && kind != "a GPU trace")
        IM_CHECK(model->absence.find("--counters") != std::string::npos);
      if (!has_data && (name == "timeline" || name == "life-map" || name == "text"))
        IM_CHECK(!model->absence.empty());
    };
  }
}

void register_use_tests(ImGuiTestEngine* engine, Application* app, const Files& files) {
  const auto add = [&](const char* name, std::function<void(ImGuiTestContext*)> run) {
    ImGuiTest* test = IM_REGISTER_TEST(engine, "use", name);
    test->TestFunc = std::move(run);
  };
  add("select a head", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("head-grid", true);
    settle(ctx, *app);
    app->ui().select_head(0, 0);
    ctx->ItemClick("//Heads###head-grid/**/##cells");  // the middle: layer 1 of 2, head 1 of 2
    IM_CHECK_EQ(app->ui().selection.layer, 1);
    IM_CHECK_EQ(app->ui().selection.kv_head, 1);
  });
  add("scrub", [app](ImGuiTestContext* ctx) {
    app->ui().select_step(100);
    ctx->KeyPress(ImGuiKey_RightArrow);
    IM_CHECK_EQ(app->ui().selection.step, 101);
    ctx->KeyPress(ImGuiMod_Shift | ImGuiKey_LeftArrow);
    IM_CHECK_EQ(app->ui().selection.step, 91);
    ctx->KeyPress(ImGuiMod_Ctrl | ImGuiKey_RightArrow);
    IM_CHECK_EQ(app->ui().selection.step, 191);
    ctx->KeyPress(ImGuiKey_End);
    IM_CHECK_EQ(app->ui().selection.step, app->ui().n_steps - 1);
    ctx->KeyPress(ImGuiKey_Home);
    IM_CHECK_EQ(app->ui().selection.step, 0);
    ctx->KeyPress(ImGuiKey_Space);
    ctx->Yield(30);
    IM_CHECK_GT(app->ui().selection.step, 5);  // it plays
    ctx->KeyPress(ImGuiKey_Space);
    IM_CHECK(!app->ui().playback.playing);
    ctx->KeyPress(ImGuiKey_DownArrow);
    IM_CHECK_EQ(app->ui().selection.layer, 1);
  });
  add("search a token", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("text", true);
    settle(ctx, *app);
    app->ui().selection.pinned_token = -1;
    ctx->ItemClick("//Text###text/##search");
    ctx->KeyCharsReplaceEnter("carry");
    settle(ctx, *app);
    ctx->ItemClick("//Text###text/Next");
    ctx->Yield(2);
    IM_CHECK_GE(app->ui().selection.pinned_token, 0);
    ctx->ItemClick("//Text###text/##search");
    ctx->KeyCharsReplaceEnter("");
  });
  add("palette", [app](ImGuiTestContext* ctx) {
    run_command(ctx, "theme light");
    IM_CHECK(app->ui().theme.kind == ThemeKind::light);
    run_command(ctx, "theme colour");
    IM_CHECK(app->ui().theme.kind == ThemeKind::colour_blind);
    run_command(ctx, "theme dark");
    IM_CHECK(app->ui().theme.kind == ThemeKind::dark);
  });
  add("palette prefers whole words", [](ImGuiTestContext*) {
    IM_CHECK_GT(fuzzy_score("export csv", "Export the focused panel as CSV"),
                fuzzy_score("export csv", "Export the focused panel as SVG"));
    IM_CHECK_GT(fuzzy_score("thli", "Theme: light"), 0);
    IM_CHECK_LT(fuzzy_score("zebra", "Theme: light"), 0);
  });
  add("help", [](ImGuiTestContext* ctx) {
    ctx->KeyPress(ImGuiMod_Shift | ImGuiKey_Slash);
    ctx->Yield(2);
    IM_CHECK(ctx->WindowInfo("//Help").Window != nullptr);
    ctx->WindowClose("//Help");
  });
  add("layout saved and restored", [app](ImGuiTestContext* ctx) {
    run_command(ctx, "reset layout");
    app->set_panel_open("sql", false);
    ctx->Yield(2);
    ctx->KeyPress(ImGuiMod_Ctrl | ImGuiKey_S);
    ctx->Yield(2);
    ctx->KeyCharsReplaceEnter("bare");
    ctx->Yield(2);
    app->set_panel_open("sql", true);
    ctx->Yield(2);
    IM_CHECK(app->panel_open("sql"));
    run_command(ctx, "layout: bare");
    ctx->Yield(2);
    IM_CHECK(!app->panel_open("sql"));
    IM_CHECK(app->panel_open("text"));
    run_command(ctx, "reset layout");
  });
  add("export", [app, folder = files.folder.path()](ImGuiTestContext* ctx) {
    app->set_panel_open("life-map", true);
    ctx->WindowFocus("//Token lives###life-map");
    settle(ctx, *app);
    run_command(ctx, "export csv");
    ctx->KeyPress(ImGuiKey_Enter);  // the name that is offered
    ctx->Yield(2);
    run_command(ctx, "export svg");
    ctx->KeyCharsReplaceEnter("lives.svg");
    ctx->Yield(2);
    std::ifstream csv(folder / "good-life-map.csv");
    std::string line;
    IM_CHECK(static_cast<bool>(std::getline(csv, line)));
    IM_CHECK_STR_EQ(line.c_str(),
                    "pos,text,birth_step,evicted_after_step,lifetime_steps,slot,score,threshold");
    int rows = 0;
    while (std::getline(csv, line)) ++rows;
    IM_CHECK_EQ(rows, 260);
    std::ifstream svg(folder / "lives.svg");
    IM_CHECK(static_cast<bool>(std::getline(svg, line)));
    IM_CHECK(line.starts_with("<svg "));
  });
  add("what if is run and joins the others", [app, folder = files.folder.path()](ImGuiTestContext* ctx) {
    app->set_panel_open("what-if", true);
    settle(ctx, *app);
    ctx->ItemClick("//What if###what-if/Replay");
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(60);
    while (app->ui().what_if_runner.finished() == 0 && Clock::now() < deadline) {
      IM_CHECK_STR_EQ(app->ui().what_if_runner.message().c_str(), "");
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
      ctx->Yield();
    }
    settle(ctx, *app);
    IM_CHECK(app->ui().what_if.policy.starts_with("longflow"));
    IM_CHECK_EQ(app->ui().document.results().size(), size_t{1});
    IM_CHECK_EQ(read_results(app->ui().document.results().front()).cells.size(), size_t{1});
    app->set_panel_open("compare", true);
    settle(ctx, *app);
    IM_CHECK_STR_EQ(app->shown_model("compare")->absence.c_str(), "");
    // The recall of the replay is a lane of the timeline, step by step.
    ctx->WindowFocus("//Timeline###timeline");
    settle(ctx, *app);
    run_command(ctx, "export csv");
    ctx->KeyCharsReplaceEnter("timeline.csv");
    ctx->Yield(2);
    std::ifstream csv(folder / "timeline.csv");
    std::string header, row, cell;
    std::getline(csv, header);
    for (std::string line; std::getline(csv, line);) row = line;  // the last step
    std::istringstream names(header), cells(row);
    while (std::getline(names, header, ',') && !header.starts_with("recall")) std::getline(cells, cell, ',');
    IM_CHECK(header.starts_with("recall"));
    std::getline(cells, cell, ',');
    IM_CHECK_GT(std::atof(cell.c_str()), 0.1);
    IM_CHECK_LE(std::atof(cell.c_str()), 1.001);
  });
  add("what if is cancelled", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("what-if", true);
    settle(ctx, *app);
    const int finished = app->ui().what_if_runner.finished();
    app->ui().what_if_runner.start(app->ui().trace->file(), {"rkv", "30%"});
    app->ui().what_if_runner.cancel();
    while (app->ui().what_if_runner.running()) ctx->Yield();
    IM_CHECK(app->ui().what_if_runner.finished() == finished ||
             app->ui().what_if_runner.finished() == finished + 1);
  });
  add("two recordings", [app, other = files.other](ImGuiTestContext* ctx) {
    app->set_panel_open("recordings", true);
    settle(ctx, *app);
    IM_CHECK(app->shown_model("recordings")->absence.find("Open a second one") != std::string::npos);
    app->open(other);
    settle(ctx, *app);
    IM_CHECK_STR_EQ(app->shown_model("recordings")->absence.c_str(), "");
  });
  add("note", [app, good = files.good](ImGuiTestContext* ctx) {
    app->ui().select_step(77);
    ctx->KeyPress(ImGuiKey_B);
    ctx->Yield(2);
    ctx->KeyCharsReplaceEnter("recall falls");
    ctx->Yield(2);
    std::ifstream notes(good.string() + ".notes");
    std::string line;
    IM_CHECK(static_cast<bool>(std::getline(notes, line)));
    IM_CHECK_STR_EQ(line.c_str(), "77\trecall falls");
  });
  add("wrong SQL is said", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("sql", true);
    settle(ctx, *app);
    ctx->ItemClick("//SQL###sql/##sql");
    ctx->KeyCharsReplace("SELECT nothing FROM nowhere");
    ctx->ItemClick("//SQL###sql/Run");
    settle(ctx, *app);
    IM_CHECK(app->shown_model("sql") != nullptr);
  });
}

struct Totals {
  int run = 0, passed = 0;
};

// One program, as a person would start it, under the engine.
template <typename Register>
void drive(Totals& totals, const fs::path& file, Register add_tests) {
  ApplicationOptions options;
  options.examine_machine = [] { return std::vector<MachineFinding>{{"cpu", "works", "a made-up one", ""}}; };
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
