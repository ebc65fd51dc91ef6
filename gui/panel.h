// Panel: one view of the open files. `request` says, on the UI thread, what the panel would show now: a key
// over everything that its model depends on, and a job that makes the model on a worker thread. `draw` draws
// a model, on the UI thread, and computes nothing; it may change the selection. A panel is one file and one
// line in panels/registry.cpp.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "gui/app/fonts.h"
#include "gui/app/theme.h"
#include "gui/document/document.h"
#include "gui/document/preparer.h"
#include "gui/document/quality.h"
#include "gui/document/selection.h"
#include "gui/document/what_if.h"
#include "gui/draw/figure.h"
#include "gui/view.h"

namespace kvlapse::gui {

// What panels share, on the UI thread.
struct Ui {
  Document& document;
  Preparer& preparer;
  WhatIf& what_if_runner;
  WhatIfChoice what_if;  // shown beside the recording; empty policy: none
  std::shared_ptr<QualitySource> quality;
  std::function<std::vector<MachineFinding>()> examine_machine;  // slow; null: this program cannot
  std::function<MachineCeilings(int threads)> measure_machine;   // slow; null: this program cannot
  Selection selection;
  Playback playback;
  Theme theme;
  Fonts fonts;
  float scale = 1;                     // physical pixels per design pixel
  std::shared_ptr<TraceSource> trace;  // the primary one, null: none
  int n_steps = 0;                     // of the selected sequence
  std::function<void(const std::string&)> toast;
  std::function<void(std::string_view)> open_panel;
  std::function<void(const std::filesystem::path&)> open_file;

  float px(float design_pixels) const { return design_pixels * scale; }
  // Changes when files are opened or grow and when replays finish: part of the keys of what is read from
  // results.
  uint64_t results_version() const {
    return document.version() * 1000 + static_cast<uint64_t>(what_if_runner.finished());
  }
  void select_step(int step);
  void select_head(int layer, int kv_head);
};

struct PanelRequest {
  uint64_t key = 0;  // 0: nothing to prepare
  Job job;
};

class Panel {
 public:
  virtual ~Panel() = default;
  virtual PanelRequest request(const Ui& ui) = 0;
  // Settings on top, drawn with and without data: a choice without data must be reversible.
  virtual void controls(Ui&) {}
  virtual void draw(Ui& ui, const DrawModel& model) = 0;
  // What export writes; empty where a panel has no such form.
  virtual Table table(const DrawModel&) const { return {}; }
  virtual std::optional<Figure> figure(const Ui&, const DrawModel&) const { return {}; }
  // The panel's data as a query for the SQL panel and for other programs; "": none.
  virtual std::string sql(const Ui&) const { return {}; }
  // Settings of the panel that a saved layout keeps, "key=value" a line.
  virtual std::string state() const { return {}; }
  virtual void set_state(std::string_view) {}
};

enum class DockPlace { top, left, centre, right };

struct PanelInfo {
  const char* name;  // on the command line
  const char* title;
  DockPlace place;
  bool front;        // the tab in front of its place in the default layout
  const char* help;  // one sentence: what it shows
  std::unique_ptr<Panel> (*make)();
};
const std::vector<PanelInfo>& panel_registry();

// A hash of values, for keys.
uint64_t mix_key(std::initializer_list<uint64_t> values);
inline uint64_t key_of(float value) {
  return static_cast<uint64_t>(static_cast<int64_t>(value * 4096));
}

}  // namespace kvlapse::gui
