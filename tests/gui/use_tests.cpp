// What a person does with the program, driven: each test acts by mouse and keyboard and looks at the state,
// at what would be exported, or at the text on the screen.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <thread>

#include "imgui_internal.h"
#include "replay/results_file.h"
#include "tests/gui/drive.h"
#include "trace/sql.h"

namespace kvlapse::gui {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;

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

namespace {

std::string shown_text;
bool wants_text = false;

}  // namespace

// ImGui's own log of what is rendered, from here to the same place of the next frame.
void read_screen(ImGuiTestContext*) {
  ImGuiContext& g = *ImGui::GetCurrentContext();
  if (g.LogEnabled) {
    shown_text.assign(g.LogBuffer.begin(), g.LogBuffer.end());
    ImGui::LogFinish();
  }
  if (!wants_text) return;
  ImGui::LogToBuffer();
  g.LogWindow = nullptr;  // not at the end of this window
  g.ItemUnclipByLog = false;
}

std::string screen(ImGuiTestContext* ctx) {
  wants_text = true;
  ctx->Yield(2);
  wants_text = false;
  ctx->Yield();
  return std::exchange(shown_text, {});
}

ImVec2 point_of(ImGuiTestContext* ctx, const char* window, float x, float y) {
  const ImGuiWindow* found = ctx->WindowInfo(window).Window;
  if (found == nullptr) return {0, 0};
  const ImRect inner = found->InnerRect;
  return {inner.Min.x + x * inner.GetWidth(), inner.Min.y + y * inner.GetHeight()};
}

namespace {

bool holds(const std::string& text, std::string_view part) {
  return text.find(part) != std::string::npos;
}

// An item of a combo, "COMBO/ITEM".
void pick(ImGuiTestContext* ctx, const char* window, const std::string& path) {
  ctx->SetRef(window);
  ctx->ComboClick(path.c_str());
  ctx->SetRef(ImGuiTestRef());
}

// Hovers points along a line until the screen holds the text.
bool hover_finds(ImGuiTestContext* ctx, ImVec2 from, ImVec2 to, std::string_view part, int points = 40) {
  for (int i = 0; i <= points; ++i) {
    const float share = static_cast<float>(i) / static_cast<float>(points);
    ctx->MouseMoveToPos({from.x + (to.x - from.x) * share, from.y + (to.y - from.y) * share});
    ctx->Yield(14);  // tooltips of items wait until the pointer rests
    if (holds(screen(ctx), part)) return true;
  }
  return false;
}

void wait_for_replay(ImGuiTestContext* ctx, Application& app) {
  const Clock::time_point deadline = Clock::now() + std::chrono::seconds(60);
  while (app.ui().what_if_runner.running() && Clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    ctx->Yield();
  }
  ctx->Yield(2);
  settle(ctx, app);
}

}  // namespace

void register_use_tests(ImGuiTestEngine* engine, Application* app, const Files& files) {
  const auto add = [&](const char* name, std::function<void(ImGuiTestContext*)> run) {
    ImGuiTest* test = IM_REGISTER_TEST(engine, "use", name);
    test->TestFunc = std::move(run);
    test->GuiFunc = read_screen;
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
    const std::string shown = app->ui().what_if.policy;
    // Long enough to be cancelled: every sixth of the budgets under many policies.
    app->ui().what_if_runner.start(app->ui().trace->file(),
                                   {"rkv,h2o,tova,streaming_llm,oracle_mass,oracle_max,oracle_error",
                                    "20%,26%,32%,38%,44%,50%,56%,62%,68%,74%,80%,86%"});
    ctx->Yield(2);
    ctx->ItemClick("//What if###what-if/Cancel");
    const Clock::time_point deadline = Clock::now() + std::chrono::seconds(60);
    while (app->ui().what_if_runner.running() && Clock::now() < deadline) ctx->Yield();
    IM_CHECK_EQ(app->ui().what_if_runner.finished(), finished);
    IM_CHECK_STR_EQ(app->ui().what_if_runner.message().c_str(), "cancelled");
    IM_CHECK_STR_EQ(app->ui().what_if.policy.c_str(), shown.c_str());
    IM_CHECK(holds(screen(ctx), "cancelled"));
  });
  add("what if's sliders change budget and parameters", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("what-if", true);
    settle(ctx, *app);
    ctx->ItemInputValue("//What if###what-if/##budget", 40.0F);
    IM_CHECK(holds(screen(ctx), "budget 40 % of the sequence: 104 tokens"));
    pick(ctx, "//What if###what-if", "policy/streaming_llm");
    ctx->Yield(2);
    IM_CHECK(ctx->ItemExists("//What if###what-if/sinks"));
    pick(ctx, "//What if###what-if", "policy/longflow@yisunlp");
    ctx->ItemInputValue("//What if###what-if/##budget", 25.0F);
  });
  add("compare: a row is shown in token lives, missing bounds are added", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("compare", true);
    settle(ctx, *app);
    IM_CHECK(holds(screen(ctx), "missing: random:pin_prompt=1,oracle_mass"));
    ctx->ItemClick("//Compare###compare/Add the missing bounds");
    wait_for_replay(ctx, *app);
    IM_CHECK_STR_EQ(app->ui().what_if_runner.message().c_str(), "");
    const std::string text = screen(ctx);
    IM_CHECK(!holds(text, "missing:"));
    IM_CHECK(holds(text, "oracle_mass"));
    IM_CHECK(app->ui().what_if.policy.starts_with("longflow"));  // a bound is not what one looks at
    int rows = 0;
    for (const auto& row : app->shown_table("compare").rows) rows += row[0] == "open" ? 1 : 0;
    IM_CHECK_EQ(rows, 3);
    ctx->ItemClick("//Compare###compare/**/oracle_mass##25%");
    IM_CHECK_STR_EQ(app->ui().what_if.policy.c_str(), "oracle_mass");
    ctx->ItemClick("//Compare###compare/**/longflow@yisunlp##25%");
    IM_CHECK(app->ui().what_if.policy.starts_with("longflow"));
  });
  add("heads: every measure, or why it is missing", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("head-grid", true);
    for (const char* metric : {"evicted so far", "recall", "output error"}) {
      pick(ctx, "//Heads###head-grid", fmt::format("##metric/{}", metric));
      settle(ctx, *app);
      IM_CHECK_STR_EQ(app->shown_model("head-grid")->absence.c_str(), "");
    }
    // The error is that of the replay, and says so; each head has one.
    IM_CHECK(holds(screen(ctx), "longflow@yisunlp at 25%, all steps"));
    const Table table = app->shown_table("head-grid");
    IM_CHECK_STR_EQ(table.columns.back().c_str(), "output_error");
    for (const auto& row : table.rows) IM_CHECK_GT(std::atof(row.back().c_str()), 0);
    const WhatIfChoice choice = std::exchange(app->ui().what_if, {});
    settle(ctx, *app);
    IM_CHECK(holds(app->shown_model("head-grid")->absence, "No output error here"));
    IM_CHECK(holds(app->shown_model("head-grid")->absence, "run What if"));
    app->ui().what_if = choice;
    pick(ctx, "//Heads###head-grid", "##metric/entropy (nats)");
    settle(ctx, *app);
    IM_CHECK(holds(app->shown_model("head-grid")->absence, "--tier sketch"));
    pick(ctx, "//Heads###head-grid", "##metric/held tokens");
    pick(ctx, "//Heads###head-grid", "##form/list");
    settle(ctx, *app);
    IM_CHECK(holds(screen(ctx), "held tokens"));
    pick(ctx, "//Heads###head-grid", "##form/grid");
  });
  add("heads: a badge says where the number comes from", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("head-grid", true);
    settle(ctx, *app);
    const float y = ctx->ItemInfo("//Heads###head-grid/##form").RectFull.GetCenter().y;
    const ImVec2 left = point_of(ctx, "//Heads###head-grid", 0, 0),
                 right = point_of(ctx, "//Heads###head-grid", 1, 0);
    IM_CHECK(hover_finds(ctx, {left.x, y}, {right.x, y}, "Measured: counted or timed while recording.", 60));
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
    Notes read;  // by the next program that opens the trace
    read.load(good);
    IM_CHECK_EQ(read.all().size(), size_t{1});
    app->ui().select_step(0);
    ctx->KeyPress(ImGuiKey_N);
    IM_CHECK_EQ(app->ui().selection.step, 77);
    ctx->KeyPress(ImGuiKey_B);
    ctx->Yield(2);
    ctx->KeyCharsReplaceEnter("");
    ctx->Yield(2);
    IM_CHECK(app->ui().document.notes().all().empty());
  });
  add("a range is selected and looped", [app](ImGuiTestContext* ctx) {
    ctx->WindowFocus("//Timeline###timeline");
    settle(ctx, *app);
    app->ui().select_step(0);
    const ImVec2 from = point_of(ctx, "//Timeline###timeline", 0.5F, 0.6F),
                 to = point_of(ctx, "//Timeline###timeline", 0.6F, 0.6F);
    ctx->MouseMoveToPos(from);
    ctx->KeyDown(ImGuiMod_Shift);
    ctx->MouseDown();
    ctx->MouseMoveToPos(to);
    ctx->MouseUp();
    ctx->KeyUp(ImGuiMod_Shift);
    ctx->Yield(2);
    const Selection selection = app->ui().selection;
    IM_CHECK(selection.has_range());
    IM_CHECK_GT(selection.token_begin, 80);
    IM_CHECK_LT(selection.token_end, 200);
    app->ui().select_step(selection.token_begin);
    ctx->KeyPress(ImGuiKey_L);
    IM_CHECK(app->ui().playback.loop);
    app->ui().playback.steps_per_second = 600;
    ctx->KeyPress(ImGuiKey_Space);
    int least = 10000, most = 0, turns = 0, before = app->ui().selection.step;
    for (int frame = 0; frame < 60; ++frame) {
      ctx->Yield();
      const int step = app->ui().selection.step;
      least = std::min(least, step), most = std::max(most, step);
      turns += step < before ? 1 : 0;
      before = step;
    }
    ctx->KeyPress(ImGuiKey_Space);
    ctx->KeyPress(ImGuiKey_L);
    app->ui().playback.steps_per_second = 60;
    IM_CHECK_GE(least, selection.token_begin);
    IM_CHECK_LT(most, selection.token_end);
    IM_CHECK_GT(turns, 1);
    ctx->KeyPress(ImGuiKey_Escape);
    IM_CHECK(!app->ui().selection.has_range());
  });
  add("token lives: zoom to single cells without blur, back to all", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("life-map", true);
    ctx->WindowFocus("//Token lives###life-map");
    settle(ctx, *app);
    const auto width = [&] {
      const auto figure = app->shown_figure("life-map");
      return figure->x_max - figure->x_min;
    };
    IM_CHECK_EQ(width(), 260.0);
    ctx->MouseMoveToPos(point_of(ctx, "//Token lives###life-map", 0.6F, 0.45F));
    for (int i = 0; i < 40 && width() > 12; ++i) {
      ctx->MouseWheelY(2);
      settle(ctx, *app);
    }
    IM_CHECK_LE(width(), 12.0);
    // Cells are tens of pixels wide: nearly every pixel is of one colour, that of its cell.
    const auto figure = app->shown_figure("life-map");
    const Theme& theme = app->ui().theme;
    int pure = 0;
    for (uint32_t pixel : figure->images.front().pixels)
      pure += pixel == theme.map_alive || pixel == theme.map_evicted || pixel == theme.map_unborn ? 1 : 0;
    IM_CHECK_GT(pure, static_cast<int>(0.9 * static_cast<double>(figure->images.front().pixels.size())));
    ctx->MouseDoubleClick();
    settle(ctx, *app);
    IM_CHECK_EQ(width(), 260.0);
  });
  add("token lives: slots, attention, and what a cell tells", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("life-map", true);
    ctx->WindowFocus("//Token lives###life-map");
    app->ui().what_if = {};
    app->ui().select_head(0, 0);
    app->ui().select_step(259);
    pick(ctx, "//Token lives###life-map", "##rows/slots");
    settle(ctx, *app);
    IM_CHECK_STR_EQ(app->shown_figure("life-map")->y_label.c_str(), "slot");
    IM_CHECK(hover_finds(ctx, point_of(ctx, "//Token lives###life-map", 0.5F, 0.4F),
                         point_of(ctx, "//Token lives###life-map", 0.5F, 0.6F), ", slot ", 6));
    pick(ctx, "//Token lives###life-map", "##rows/positions");
    pick(ctx, "//Token lives###life-map", "##colour/attention");
    settle(ctx, *app);
    // Down a late step: some token there was evicted before.
    const ImVec2 top = point_of(ctx, "//Token lives###life-map", 0.9F, 0.2F),
                 bottom = point_of(ctx, "//Token lives###life-map", 0.9F, 0.8F);
    IM_CHECK(hover_finds(ctx, top, bottom, "evicted after step"));
    const std::string text = screen(ctx);
    for (const char* part : {"score", "lowest kept", "value", "age", "reason: over budget",
                             "attention received while held", "attention missed after eviction"})
      IM_CHECK(holds(text, part));
    ctx->KeyDown(ImGuiMod_Ctrl);
    ctx->MouseClick();
    ctx->KeyUp(ImGuiMod_Ctrl);
    IM_CHECK_GE(app->ui().selection.pinned_token, 0);
    ctx->KeyPress(ImGuiKey_Escape);
    pick(ctx, "//Token lives###life-map", "##colour/held");
    for (const char* scope : {"this layer", "all heads", "this kv head"}) {
      pick(ctx, "//Token lives###life-map", fmt::format("##scope/{}", scope));
      settle(ctx, *app);
      IM_CHECK_STR_EQ(app->shown_model("life-map")->absence.c_str(), "");
    }
  });
  add("text: regular expressions, colours, a click pins", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("text", true);
    settle(ctx, *app);
    const auto found = [&](const char* pattern) {
      ctx->ItemClick("//Text###text/##search");
      ctx->KeyCharsReplaceEnter(pattern);
      settle(ctx, *app);
      const std::string text = screen(ctx);
      const size_t at = text.find(" found");
      return at == std::string::npos ? -1 : std::atoi(text.substr(text.rfind(' ', at - 1) + 1).c_str());
    };
    const int carries = found("carry"), others = found("the");
    IM_CHECK_GT(carries, 10);
    IM_CHECK_EQ(found("car+y|the"), 0);  // as plain text
    ctx->ItemCheck("//Text###text/regex");
    IM_CHECK_EQ(found("car+y|the"), carries + others);
    IM_CHECK_EQ(found("(?<=carry) the"), [&] {  // a look-behind: PCRE2, not a simpler dialect
      const Table table = app->shown_table("text");
      int count = 0;
      for (size_t i = 1; i < table.rows.size(); ++i)
        count += table.rows[i - 1][1] == " carry" && table.rows[i][1] == " the" ? 1 : 0;
      return count;
    }());
    found("(unclosed");
    IM_CHECK(holds(screen(ctx), "unclosed"));
    ctx->ItemUncheck("//Text###text/regex");
    found("");
    for (const char* mode : {"lifetime", "attention", "regret", "held by heads"}) {
      pick(ctx, "//Text###text", fmt::format("##mode/{}", mode));
      settle(ctx, *app);
      IM_CHECK_STR_EQ(app->shown_model("text")->absence.c_str(), "");
    }
    ctx->KeyPress(ImGuiKey_Escape);
    ctx->MouseMoveToPos(point_of(ctx, "//Text###text", 0.4F, 0.5F));
    ctx->MouseClick();
    IM_CHECK_GE(app->ui().selection.pinned_token, 0);
    IM_CHECK(holds(screen(ctx), "click pins it"));
    ctx->KeyPress(ImGuiKey_Escape);
  });
  add("sql: rows, a plot of two columns, history", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("sql", true);
    settle(ctx, *app);
    ctx->ItemClick("//SQL###sql/##sql");
    ctx->KeyCharsReplace("SELECT step, held_tokens, evicted_tokens FROM KV_STEP ORDER BY step LIMIT 7");
    ctx->ItemClick("//SQL###sql/Run");
    settle(ctx, *app);
    IM_CHECK(holds(screen(ctx), "7 rows"));
    IM_CHECK_EQ(app->shown_table("sql").rows.size(), size_t{7});
    ctx->ItemCheck("//SQL###sql/plot");
    pick(ctx, "//SQL###sql", "y/evicted_tokens");
    IM_CHECK(ctx->WindowInfo("//SQL###sql/##plot").Window != nullptr ||
             ctx->ItemExists("//SQL###sql/##plot"));
    ctx->ItemClick("//SQL###sql/History");
    ctx->Yield(2);
    IM_CHECK(holds(screen(ctx), "LIMIT 7"));
    ctx->PopupCloseAll();
  });
  add("copy as SQL is a query that runs", [app, good = files.good](ImGuiTestContext* ctx) {
    int copied = 0;
    for (const char* name : {"timeline", "head-grid", "life-map", "text", "info"}) {
      app->set_panel_open(name, true);
      settle(ctx, *app);
      ImGui::SetClipboardText("");
      ctx->KeyPress(ImGuiMod_Ctrl | ImGuiMod_Shift | ImGuiKey_C);
      ctx->Yield(2);
      const std::string sql = ImGui::GetClipboardText();
      IM_CHECK(sql.starts_with("SELECT"));
      SqlQuery query(good, sql);
      std::vector<SqlValue> row;
      copied += query.next(row) ? 1 : 0;
    }
    IM_CHECK_EQ(copied, 5);
  });
  add("export PNG asks for the panel's pixels", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("text", true);
    ctx->WindowFocus("//Text###text");
    settle(ctx, *app);
    app->take_picture_request();
    run_command(ctx, "export png");
    ctx->KeyCharsReplaceEnter("text.png");
    ctx->Yield(2);
    const auto picture = app->take_picture_request();
    IM_CHECK(picture.has_value());
    const ImGuiWindow* window = ctx->WindowInfo("//Text###text").Window;
    IM_CHECK_EQ(picture->width, static_cast<int>(window->Size.x));
    IM_CHECK_EQ(picture->height, static_cast<int>(window->Size.y));
    IM_CHECK_STR_EQ(picture->file.string().c_str(), "text.png");
  });
  add("settings: theme and size; larger text by key", [app](ImGuiTestContext* ctx) {
    ctx->KeyPress(ImGuiMod_Ctrl | ImGuiKey_Comma);
    ctx->Yield(2);
    pick(ctx, "//Settings", "Theme/light");
    IM_CHECK(app->ui().theme.kind == ThemeKind::light);
    pick(ctx, "//Settings", "Theme/dark");
    IM_CHECK(app->ui().theme.kind == ThemeKind::dark);
    ctx->WindowClose("//Settings");
    const float before = app->ui().scale;
    ctx->KeyPress(ImGuiMod_Ctrl | ImGuiKey_Equal);
    ctx->Yield(2);
    IM_CHECK_GT(app->ui().scale, before);
    ctx->KeyPress(ImGuiMod_Ctrl | ImGuiKey_Minus);
    ctx->Yield(2);
    IM_CHECK_EQ(app->ui().scale, before);
  });
  add("a panel fills the window and goes back", [app](ImGuiTestContext* ctx) {
    ctx->WindowFocus("//Token lives###life-map");
    ctx->Yield(2);
    ctx->KeyPress(ImGuiKey_F11);
    ctx->Yield(3);
    IM_CHECK(ctx->WindowInfo("//Token lives###alone-life-map").Window != nullptr);
    ctx->KeyPress(ImGuiKey_F11);
    ctx->Yield(3);
    IM_CHECK(holds(screen(ctx), "step "));
  });
  add("recent files and files that cannot be opened",
      [app, folder = files.folder.path()](ImGuiTestContext* ctx) {
        std::ofstream(folder / "garbage.kvl") << "this is no trace";
        app->open_or_tell(folder / "garbage.kvl");  // as a file that is dropped
        IM_CHECK(holds(screen(ctx), "garbage.kvl"));
        app->open_or_tell(folder / "nowhere.kvl");
        IM_CHECK(holds(screen(ctx), "no such file"));
        ctx->ItemClick("//##MainMenuBar/**/File");
        ctx->Yield(2);
        ctx->ItemClick("//$FOCUSED/Recent files");
        ctx->Yield(2);
        IM_CHECK(holds(screen(ctx), "good.kvl"));
        ctx->PopupCloseAll();
      });
  add("info: the machine's findings are shown", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("info", true);
    settle(ctx, *app);
    bool found = false;
    for (const auto& row : app->shown_table("info").rows)
      found |= row[0] == "This machine now (kvlapse doctor)" && row[2] == "works: a made-up one";
    IM_CHECK(found);
  });
  add("wrong SQL is said", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("sql", true);
    settle(ctx, *app);
    ctx->ItemClick("//SQL###sql/##sql");
    ctx->KeyCharsReplace("SELECT nothing FROM nowhere");
    ctx->ItemClick("//SQL###sql/Run");
    settle(ctx, *app);
    IM_CHECK(holds(screen(ctx), "nowhere"));
  });
}

void register_gpu_tests(ImGuiTestEngine* engine, Application* app) {
  const auto add = [&](const char* name, std::function<void(ImGuiTestContext*)> run) {
    ImGuiTest* test = IM_REGISTER_TEST(engine, "gpu", name);
    test->TestFunc = std::move(run);
    test->GuiFunc = read_screen;
  };
  add("kernels: search, statistics of a range, a launch", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("kernels", true);
    settle(ctx, *app);
    const auto launches = [&] {
      int all = 0;
      for (const auto& row : app->shown_table("kernels").rows) all += std::atoi(row[1].c_str());
      return all;
    };
    IM_CHECK_EQ(app->shown_table("kernels").rows.size(), size_t{4});
    const int all = launches();
    ctx->ItemClick("//Kernels###kernels/##find");
    ctx->KeyCharsReplaceEnter("lowest");
    std::string text = screen(ctx);
    IM_CHECK(holds(text, "lowest_scores"));
    IM_CHECK(!holds(text, "feed_forward") && !holds(text, "fused_decode"));
    ctx->ItemClick("//Kernels###kernels/##find");
    ctx->KeyCharsReplaceEnter("");
    app->ui().selection.token_begin = 100, app->ui().selection.token_end = 110;
    pick(ctx, "//Kernels###kernels", "##range/selected range");
    settle(ctx, *app);
    IM_CHECK_EQ(launches(), 10 * 2 * 4);
    IM_CHECK_LT(launches(), all);
    pick(ctx, "//Kernels###kernels", "##range/this step");
    settle(ctx, *app);
    IM_CHECK_EQ(launches(), 2 * 4);
    app->ui().selection.token_begin = app->ui().selection.token_end = 0;
    pick(ctx, "//Kernels###kernels", "##range/all steps");
    settle(ctx, *app);
    // The first launches of the step, in the lane of the first stream.
    const ImRect lanes = ctx->ItemInfo("//Kernels###kernels/##launches").RectFull;
    const float y = lanes.Min.y + lanes.GetHeight() * 0.25F;
    IM_CHECK(hover_finds(ctx, {lanes.Min.x, y}, {lanes.Min.x + lanes.GetWidth() * 0.15F, y}, "GB/s", 60));
  });
  add("roofline: both ceilings, each with its origin", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("bandwidth", true);
    pick(ctx, "//Bandwidth###bandwidth", "##view/roofline");
    settle(ctx, *app);
    const std::string text = screen(ctx);
    IM_CHECK(holds(text, "memory: 3.350 TB/s"));
    IM_CHECK(holds(text, "fp32: 66.91 TFLOP/s"));
    const float y = ctx->ItemInfo("//Bandwidth###bandwidth/##view").RectFull.GetCenter().y;
    const ImVec2 left = point_of(ctx, "//Bandwidth###bandwidth", 0, 0),
                 right = point_of(ctx, "//Bandwidth###bandwidth", 1, 0);
    IM_CHECK(hover_finds(ctx, {left.x, y}, {right.x, y}, "share of the peak", 80));
    pick(ctx, "//Bandwidth###bandwidth", "##view/over steps");
  });
  add("timeline: the counted step is marked", [app](ImGuiTestContext* ctx) {
    ctx->WindowFocus("//Timeline###timeline");
    settle(ctx, *app);
    const float y = ctx->ItemInfo("//Timeline###timeline/##phases").RectFull.GetCenter().y;
    const ImVec2 left = point_of(ctx, "//Timeline###timeline", 0.1F, 0),
                 right = point_of(ctx, "//Timeline###timeline", 0.4F, 0);
    IM_CHECK(hover_finds(ctx, {left.x, y}, {right.x, y}, "counted one by one", 120));
  });
  add("info: sources of the GPU's facts", [app](ImGuiTestContext* ctx) {
    app->set_panel_open("info", true);
    settle(ctx, *app);
    bool found = false;
    for (const auto& row : app->shown_table("info").rows)
      found |= row[0] == "GPU sources while recording" && row[1] == "dram" &&
               row[2].starts_with("recorded, sampled");
    IM_CHECK(found);
  });
}

void register_cpu_tests(ImGuiTestEngine* engine, Application* app) {
  ImGuiTest* test =
      IM_REGISTER_TEST(engine, "cpu", "roofline: ceilings of this machine, measured when looked at");
  test->GuiFunc = read_screen;
  test->TestFunc = [app](ImGuiTestContext* ctx) {
    app->set_panel_open("bandwidth", true);
    pick(ctx, "//Bandwidth###bandwidth", "##view/roofline");
    settle(ctx, *app);
    const std::string text = screen(ctx);
    IM_CHECK(holds(text, "memory: 30.00 GB/s"));
    IM_CHECK(holds(text, "fp32: 200.0 GFLOP/s"));
    const float y = ctx->ItemInfo("//Bandwidth###bandwidth/##view").RectFull.GetCenter().y;
    const ImVec2 left = point_of(ctx, "//Bandwidth###bandwidth", 0, 0),
                 right = point_of(ctx, "//Bandwidth###bandwidth", 1, 0);
    IM_CHECK(
        hover_finds(ctx, {left.x, y}, {right.x, y}, "Measured just now with 2 threads on this machine", 80));
    pick(ctx, "//Bandwidth###bandwidth", "##view/over steps");
  };
}

}  // namespace kvlapse::gui
