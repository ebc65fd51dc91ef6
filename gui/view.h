// The dashboard's entry: `kvlapse view`. Blocks until the window is closed or the picture is written.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace kvlapse::gui {

struct ViewOptions {
  std::vector<std::filesystem::path> files;
  std::filesystem::path screenshot;  // empty: a window
  std::string panel;                 // this one alone
  std::optional<int> step, layer, kv_head;
  int width = 1600, height = 900;  // physical pixels
  float scale = 1;                 // of text and lines; 0: the display's
  std::string theme;               // "": the settings'
};

// Throws Error (no display, unreadable file) and UsageError (unknown panel or theme).
void run_view(const ViewOptions& options);

}  // namespace kvlapse::gui
