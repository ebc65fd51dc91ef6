#include "gui/app/platform.h"

#include <GLFW/glfw3.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "core/base/error.h"
#include "imgui.h"
#include "imgui_impl_glfw.h"
#include "imgui_impl_null.h"
#include "imgui_impl_opengl3.h"

namespace kvlapse::gui {
namespace {

std::atomic<bool> g_glfw_running{false};

// GLFW hands events to plain functions; there is one window.
struct Events {
  bool activity = true;
  std::vector<std::string> dropped;
};
Events& events() {
  static Events instance;
  return instance;
}

std::string glfw_problem() {
  const char* text = nullptr;
  glfwGetError(&text);
  return text != nullptr ? text : "no reason given";
}

GLFWwindow* make_window(bool headless, int width, int height, const std::string& title) {
  glfwDefaultWindowHints();
  glfwWindowHint(GLFW_CONTEXT_VERSION_MAJOR, 3);
  glfwWindowHint(GLFW_CONTEXT_VERSION_MINOR, 3);
  glfwWindowHint(GLFW_OPENGL_PROFILE, GLFW_OPENGL_CORE_PROFILE);
  if (headless) {
    if (glfwGetPlatform() == GLFW_PLATFORM_NULL)
      glfwWindowHint(GLFW_CONTEXT_CREATION_API, GLFW_EGL_CONTEXT_API);
    glfwWindowHint(GLFW_VISIBLE, GLFW_FALSE);
  }
  return glfwCreateWindow(width, height, title.c_str(), nullptr, nullptr);
}

}  // namespace

Platform::Platform(PlatformKind kind, int width, int height, const std::string& title)
    : kind_(kind), width_(width), height_(height) {
  ImGuiIO& io = ImGui::GetIO();
  if (kind == PlatformKind::null) {
    ImGui_ImplNull_Init();
    io.DisplaySize = ImVec2(static_cast<float>(width), static_cast<float>(height));
    return;
  }
  const bool headless = kind == PlatformKind::headless;
  std::string problem;
  const bool has_display = std::getenv("DISPLAY") != nullptr || std::getenv("WAYLAND_DISPLAY") != nullptr;
  // Without a display, or for pictures: the null platform first, then a hidden X11 window.
  for (const int platform : headless ? std::vector<int>{GLFW_PLATFORM_NULL, GLFW_ANY_PLATFORM}
                                     : std::vector<int>{GLFW_ANY_PLATFORM}) {
    if (platform == GLFW_ANY_PLATFORM && !has_display) break;
    glfwInitHint(GLFW_PLATFORM, platform);
    if (glfwInit() == GLFW_FALSE) {
      problem = glfw_problem();
      continue;
    }
    window_ = make_window(headless, width, height, title);
    if (window_ != nullptr) break;
    problem = glfw_problem();
    glfwTerminate();
  }
  if (window_ == nullptr) {
    if (headless)
      fail("dashboard: no EGL and no display for OpenGL 3.3 ({}); try xvfb-run kvlapse view ...", problem);
    fail("dashboard: {}; use --screenshot, or xvfb-run where there is no display",
         has_display ? "no OpenGL 3.3 window: " + problem : "no display (DISPLAY is not set)");
  }
  g_glfw_running = true;
  glfwMakeContextCurrent(window_);
  glfwSwapInterval(headless ? 0 : 1);
  glfwSetKeyCallback(window_, [](GLFWwindow*, int, int, int, int) { events().activity = true; });
  glfwSetCharCallback(window_, [](GLFWwindow*, unsigned) { events().activity = true; });
  glfwSetMouseButtonCallback(window_, [](GLFWwindow*, int, int, int) { events().activity = true; });
  glfwSetCursorPosCallback(window_, [](GLFWwindow*, double, double) { events().activity = true; });
  glfwSetScrollCallback(window_, [](GLFWwindow*, double, double) { events().activity = true; });
  glfwSetWindowFocusCallback(window_, [](GLFWwindow*, int) { events().activity = true; });
  glfwSetCursorEnterCallback(window_, [](GLFWwindow*, int) { events().activity = true; });
  glfwSetFramebufferSizeCallback(window_, [](GLFWwindow*, int, int) { events().activity = true; });
  glfwSetWindowRefreshCallback(window_, [](GLFWwindow*) { events().activity = true; });
  glfwSetWindowContentScaleCallback(window_, [](GLFWwindow*, float, float) { events().activity = true; });
  glfwSetDropCallback(window_, [](GLFWwindow*, int count, const char** paths) {
    events().dropped.insert(events().dropped.end(), paths, paths + count);
    events().activity = true;
  });
  ImGui_ImplGlfw_InitForOpenGL(window_, true);
  ImGui_ImplOpenGL3_Init("#version 330 core");
}

Platform::~Platform() {
  if (kind_ == PlatformKind::null) {
    ImGui_ImplNull_Shutdown();
    return;
  }
  ImGui_ImplOpenGL3_Shutdown();
  ImGui_ImplGlfw_Shutdown();
  g_glfw_running = false;
  glfwDestroyWindow(window_);
  glfwTerminate();
}

void Platform::new_frame() {
  if (kind_ == PlatformKind::null) {
    ImGui_ImplNullRender_NewFrame();
    ImGuiIO& io = ImGui::GetIO();
    io.DisplaySize = ImVec2(static_cast<float>(width_), static_cast<float>(height_));
    io.DeltaTime = 1.0F / 60.0F;
    return;
  }
  ImGui_ImplOpenGL3_NewFrame();
  ImGui_ImplGlfw_NewFrame();
}

void Platform::present(uint32_t clear_colour) {
  if (kind_ == PlatformKind::null) {
    ImGui_ImplNullRender_RenderDrawData(ImGui::GetDrawData());
    return;
  }
  glfwGetFramebufferSize(window_, &width_, &height_);
  glViewport(0, 0, width_, height_);
  const ImVec4 clear = ImGui::ColorConvertU32ToFloat4(clear_colour);
  glClearColor(clear.x, clear.y, clear.z, 1);
  glClear(GL_COLOR_BUFFER_BIT);
  ImGui_ImplOpenGL3_RenderDrawData(ImGui::GetDrawData());
}

std::vector<uint32_t> Platform::read_pixels(int* width, int* height) const {
  *width = width_, *height = height_;
  if (kind_ == PlatformKind::null) return {};
  std::vector<uint32_t> flipped(static_cast<size_t>(width_) * height_), pixels(flipped.size());
  glPixelStorei(GL_PACK_ALIGNMENT, 4);
  glReadPixels(0, 0, width_, height_, GL_RGBA, GL_UNSIGNED_BYTE, flipped.data());
  for (int row = 0; row < height_; ++row) {
    std::copy_n(flipped.begin() + static_cast<std::ptrdiff_t>(height_ - 1 - row) * width_, width_,
                pixels.begin() + static_cast<std::ptrdiff_t>(row) * width_);
  }
  for (uint32_t& pixel : pixels) pixel |= 0xff000000U;
  return pixels;
}

bool Platform::wants_close() const {
  return window_ != nullptr && glfwWindowShouldClose(window_) != 0;
}

void Platform::poll(double timeout_seconds) {
  if (kind_ == PlatformKind::null) return;
  glfwSwapBuffers(window_);
  if (timeout_seconds > 0) {
    glfwWaitEventsTimeout(timeout_seconds);
  } else {
    glfwPollEvents();
  }
}

bool Platform::take_activity() {
  return std::exchange(events().activity, false);
}

std::vector<std::string> Platform::take_dropped_files() {
  return std::exchange(events().dropped, {});
}

float Platform::content_scale() const {
  if (kind_ != PlatformKind::window) return 1;
  float x = 1, y = 1;
  glfwGetWindowContentScale(window_, &x, &y);
  return std::max(x, y);
}

void Platform::wake() {
  if (g_glfw_running) glfwPostEmptyEvent();
}

}  // namespace kvlapse::gui
