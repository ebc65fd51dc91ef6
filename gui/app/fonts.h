// Fonts: Inter for the interface, JetBrains Mono for tokens, numbers in columns and SQL; found beside the
// installed program, in Debian's packages or through fontconfig, else ImGui's built-in font. UI thread only.
#pragma once

#include <string>

#include "imgui.h"

namespace kvlapse::gui {

inline constexpr float kFontPixels = 15;  // design pixels at font size 100 %

struct Fonts {
  ImFont* text = nullptr;
  ImFont* mono = nullptr;
  std::string text_path, mono_path;  // "": built in
};

Fonts load_fonts(bool builtin);

}  // namespace kvlapse::gui
