// Commands: everything that a person can ask for by name or key. The palette, the menus and the shortcut list
// of the help are drawn from one table. UI thread only.
#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "imgui.h"

namespace kvlapse::gui {

struct Command {
  std::string title;
  ImGuiKeyChord chord = 0;  // 0: none
  std::function<void()> run;
  bool repeat = false;  // while the key is held
};

class Commands {
 public:
  void add(std::string title, ImGuiKeyChord chord, std::function<void()> run, bool repeat = false);
  void clear() { commands_.clear(); }
  const std::vector<Command>& all() const { return commands_; }
  // Runs what was pressed. Plain keys are left to a text field that is being edited.
  void dispatch_shortcuts();

 private:
  std::vector<Command> commands_;
};

std::string chord_name(ImGuiKeyChord chord);

// The letters of `pattern` in order within `text`; higher is better, negative: no match. Word starts and runs
// count more.
int fuzzy_score(std::string_view pattern, std::string_view text);

class Palette {
 public:
  void open() { open_requested_ = true; }
  bool is_open() const { return open_; }
  void draw(const Commands& commands, float scale);

 private:
  bool open_requested_ = false, open_ = false;
  char text_[128] = {};
  int selected_ = 0;
};

}  // namespace kvlapse::gui
