#include "gui/app/settings.h"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <system_error>

namespace kvlapse::gui {
namespace {

constexpr size_t kMostRecent = 12;

std::string write(const std::filesystem::path& file, const std::string& text) {
  std::error_code error;
  std::filesystem::create_directories(file.parent_path(), error);
  std::ofstream out(file, std::ios::binary);
  out << text;
  return out.flush() ? "" : file.string() + ": could not be written";
}

// Newlines of panel states within one line.
std::string escape(const std::string& text) {
  std::string out;
  for (char c : text)
    out += c == '\n' ? std::string("\\n") : c == '\\' ? std::string("\\\\") : std::string(1, c);
  return out;
}
std::string unescape(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\\' && i + 1 < text.size()) {
      out += text[++i] == 'n' ? '\n' : text[i];
    } else {
      out += text[i];
    }
  }
  return out;
}

}  // namespace

void Settings::remember(const std::filesystem::path& file) {
  const std::string path = std::filesystem::absolute(file).string();
  std::erase(recent, path);
  recent.insert(recent.begin(), path);
  if (recent.size() > kMostRecent) recent.resize(kMostRecent);
}

SettingsStore::SettingsStore(bool persistent) : persistent_(persistent) {}

std::filesystem::path SettingsStore::folder() {
  if (const char* folder = std::getenv("KVLAPSE_CONFIG_DIR")) return folder;
  if (const char* config = std::getenv("XDG_CONFIG_HOME")) return std::filesystem::path(config) / "kvlapse";
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr ? home : ".") / ".config" / "kvlapse";
}

Settings SettingsStore::load() const {
  Settings settings;
  if (!persistent_) return settings;
  std::ifstream in(folder() / "view.conf");
  for (std::string line; std::getline(in, line);) {
    const size_t equals = line.find('=');
    if (equals == std::string::npos) continue;
    const std::string key = line.substr(0, equals), value = line.substr(equals + 1);
    if (key == "theme") {
      const auto found = std::ranges::find(kThemeNames, value);
      if (found != kThemeNames.end()) settings.theme = static_cast<ThemeKind>(found - kThemeNames.begin());
    } else if (key == "font_percent") {
      settings.font_percent = std::clamp(std::atoi(value.c_str()), 60, 250);
    } else if (key == "recent") {
      settings.recent.push_back(value);
    } else if (key.starts_with("panel.")) {
      settings.panel_state[key.substr(6)] = unescape(value);
    }
  }
  return settings;
}

std::string SettingsStore::save(const Settings& settings) const {
  if (!persistent_) return {};
  std::string text = "theme=" + std::string(kThemeNames[static_cast<int>(settings.theme)]) + "\n";
  text += "font_percent=" + std::to_string(settings.font_percent) + "\n";
  for (const std::string& file : settings.recent) text += "recent=" + file + "\n";
  for (const auto& [name, state] : settings.panel_state) text += "panel." + name + "=" + escape(state) + "\n";
  return write(folder() / "view.conf", text);
}

std::vector<std::string> SettingsStore::layouts() const {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder() / "layouts", error)) {
    if (entry.path().extension() == ".ini") names.push_back(entry.path().stem().string());
  }
  std::ranges::sort(names);
  return names;
}

std::string SettingsStore::load_layout(const std::string& name) const {
  std::ifstream in(folder() / "layouts" / (name + ".ini"), std::ios::binary);
  return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

std::string SettingsStore::save_layout(const std::string& name, const std::string& text) const {
  if (name.empty() || name.find_first_of("/\\") != std::string::npos)
    return "layout name \"" + name + "\": expected a name without slashes";
  return write(folder() / "layouts" / (name + ".ini"), text);
}

}  // namespace kvlapse::gui
