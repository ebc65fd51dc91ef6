// The dashboard's entry: `kvlapse view`. Blocks until the window is closed or the pictures are written.
#pragma once

#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace kvlapse::gui {

// A part of this machine: what `kvlapse doctor` says of it.
struct MachineFinding {
  std::string part, state, found, advice;
};

// What this machine's CPU can do at most, measured when asked for.
struct MachineCeilings {
  double read_gbps = 0, fp32_gflops = 0;
};

struct Screenshot {
  std::filesystem::path file;
  std::string panel;  // this one alone, NAME or NAME:STATE; "": all of them
};

struct ViewOptions {
  std::vector<std::filesystem::path> files;
  std::vector<Screenshot> screenshots;  // empty: a window
  std::string panel;                    // this one alone, in the window
  std::optional<int> step, layer, kv_head;
  int width = 1600, height = 900;                                // physical pixels
  float scale = 1;                                               // of text and lines; 0: the display's
  std::string theme;                                             // "": the settings'
  std::function<std::vector<MachineFinding>()> examine_machine;  // shown in Trace info; called from a worker
  std::function<MachineCeilings(int threads)> measure_machine;  // shown in the roofline; called from a worker
};

// Throws Error (no display, unreadable file) and UsageError (unknown panel or theme).
void run_view(const ViewOptions& options);

}  // namespace kvlapse::gui
