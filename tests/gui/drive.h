// What the driven tests share: the files that they open, and ways to act on the program and to read its
// screen.
#pragma once

#include <chrono>
#include <filesystem>
#include <string>

#include "gui/app/application.h"
#include "imgui_te_context.h"
#include "imgui_te_engine.h"
#include "tests/support/trace/synthetic_trace.h"

namespace kvlapse::gui {

struct Files {
  test::TemporaryFolder folder;
  std::filesystem::path good, other, gpu, empty, interrupted, damaged;
};

// Frames until every visible panel shows the current selection.
void settle(ImGuiTestContext* ctx, Application& app);
// By the command palette.
void run_command(ImGuiTestContext* ctx, const char* text);
// The text of the next frame, windows and tooltips, in the order of drawing; not what plots and maps draw.
// For tests whose GuiFunc is read_screen.
std::string screen(ImGuiTestContext* ctx);
void read_screen(ImGuiTestContext* ctx);
// A point of a window's inner rectangle, both from 0 to 1.
ImVec2 point_of(ImGuiTestContext* ctx, const char* window, float x, float y);

// What a person does, on a good trace and on one with GPU activity.
void register_use_tests(ImGuiTestEngine* engine, Application* app, const Files& files);
void register_gpu_tests(ImGuiTestEngine* engine, Application* app);
// On a trace that says it was recorded on a CPU.
void register_cpu_tests(ImGuiTestEngine* engine, Application* app);

}  // namespace kvlapse::gui
