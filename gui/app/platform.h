// Platform: window, input and OpenGL, or none of them. `window` is a desktop window; `headless` needs no
// display (GLFW's null platform with EGL, else X11 when DISPLAY is set) and can be read back; `null` draws
// nothing (tests, timing). UI thread, except wake().
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

struct GLFWwindow;

namespace kvlapse::gui {

enum class PlatformKind { window, headless, null };

class Platform {
 public:
  // ImGui's context exists already. Throws Error when there is no display or no OpenGL 3.3.
  Platform(PlatformKind kind, int width, int height, const std::string& title);
  ~Platform();
  Platform(const Platform&) = delete;
  Platform& operator=(const Platform&) = delete;

  PlatformKind kind() const { return kind_; }
  void new_frame();
  // Draws ImGui's draw data and presents it.
  void present(uint32_t clear_colour);
  // The last presented picture, RGBA, first row on top; empty without a renderer.
  std::vector<uint32_t> read_pixels(int* width, int* height) const;
  bool wants_close() const;
  // Handles events that have come. With a timeout it waits for the first one.
  void poll(double timeout_seconds);
  // Input or window events since the last call.
  bool take_activity();
  std::vector<std::string> take_dropped_files();
  float content_scale() const;
  static void wake();  // any thread: ends a wait

 private:
  PlatformKind kind_;
  GLFWwindow* window_ = nullptr;
  std::vector<uint32_t> pixels_;
  int width_ = 0, height_ = 0;
};

}  // namespace kvlapse::gui
