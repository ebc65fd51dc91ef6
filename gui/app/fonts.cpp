#include "gui/app/fonts.h"

#include <array>
#include <filesystem>
#include <system_error>
#include <vector>

#ifdef KVLAPSE_WITH_FONTCONFIG
#include <fontconfig/fontconfig.h>
#endif

namespace kvlapse::gui {
namespace {

namespace fs = std::filesystem;

std::string ask_fontconfig([[maybe_unused]] const char* family) {
#ifdef KVLAPSE_WITH_FONTCONFIG
  FcPattern* pattern = FcPatternCreate();
  FcPatternAddString(pattern, FC_FAMILY, reinterpret_cast<const FcChar8*>(family));
  FcConfigSubstitute(nullptr, pattern, FcMatchPattern);
  FcDefaultSubstitute(pattern);
  FcResult result = FcResultNoMatch;
  std::string found;
  if (FcPattern* match = FcFontMatch(nullptr, pattern, &result)) {
    FcChar8 *file = nullptr, *matched = nullptr;
    if (FcPatternGetString(match, FC_FAMILY, 0, &matched) == FcResultMatch &&
        std::string(reinterpret_cast<const char*>(matched)).starts_with(family) &&
        FcPatternGetString(match, FC_FILE, 0, &file) == FcResultMatch) {
      found = reinterpret_cast<const char*>(file);
    }
    FcPatternDestroy(match);
  }
  FcPatternDestroy(pattern);
  return found;
#else
  return {};
#endif
}

std::string find_font(const char* family, const std::vector<std::string>& candidates) {
  std::error_code ignored;
  const fs::path program = fs::read_symlink("/proc/self/exe", ignored);
  const fs::path installed = program.parent_path().parent_path() / "share" / "kvlapse" / "fonts";
  for (const std::string& candidate : candidates) {
    const fs::path beside = installed / fs::path(candidate).filename();
    if (fs::exists(beside, ignored)) {
      return beside.string();
    }
    if (fs::exists(candidate, ignored)) {
      return candidate;
    }
  }
  return ask_fontconfig(family);
}

ImFont* add(const std::string& path) {
  ImFontConfig config;
  config.OversampleH = 2;
  ImFontAtlas* atlas = ImGui::GetIO().Fonts;
  ImFont* font = path.empty() ? nullptr : atlas->AddFontFromFileTTF(path.c_str(), kFontPixels, &config);
  if (font == nullptr) {
    return atlas->AddFontDefaultVector();
  }
  // Letters that the font lacks (tokens hold any script).
  const std::string wider = find_font("DejaVu Sans", {"/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf"});
  if (!wider.empty()) {
    config.MergeMode = true;
    atlas->AddFontFromFileTTF(wider.c_str(), kFontPixels, &config);
  }
  return font;
}

}  // namespace

Fonts load_fonts(bool builtin) {
  Fonts fonts;
  if (builtin) {
    fonts.text = fonts.mono = ImGui::GetIO().Fonts->AddFontDefaultVector();
    return fonts;
  }
  fonts.text_path = find_font("Inter", {"/usr/share/fonts/opentype/inter/Inter-Regular.otf",
                                        "/usr/share/fonts/truetype/inter/Inter-Regular.ttf"});
  fonts.mono_path =
      find_font("JetBrains Mono", {"/usr/share/fonts/truetype/jetbrains-mono/JetBrainsMono-Regular.ttf"});
  fonts.text = add(fonts.text_path);
  fonts.mono = add(fonts.mono_path);
  return fonts;
}

}  // namespace kvlapse::gui
