// Settings: what the dashboard remembers between runs, in $XDG_CONFIG_HOME/kvlapse (KVLAPSE_CONFIG_DIR
// overrides it): view.conf with "key=value" lines, layouts/NAME.ini with ImGui's own text. UI thread only.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "gui/app/theme.h"

namespace kvlapse::gui {

struct Settings {
  ThemeKind theme = ThemeKind::dark;
  int font_percent = 100;
  std::vector<std::string> recent;                 // files, the last opened first
  std::map<std::string, std::string> panel_state;  // by panel name

  void remember(const std::filesystem::path& file);
};

class SettingsStore {
 public:
  // `persistent` false: nothing is read or written (screenshots, tests that want defaults).
  explicit SettingsStore(bool persistent);
  Settings load() const;
  // "" or why it could not be saved.
  std::string save(const Settings& settings) const;

  std::vector<std::string> layouts() const;
  std::string load_layout(const std::string& name) const;  // "": there is none
  std::string save_layout(const std::string& name, const std::string& text) const;
  static std::filesystem::path folder();

 private:
  bool persistent_;
};

}  // namespace kvlapse::gui
