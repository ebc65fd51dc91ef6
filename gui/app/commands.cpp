#include "gui/app/commands.h"

#include <algorithm>
#include <cctype>
#include <utility>

#include "imgui_internal.h"

namespace kvlapse::gui {

void Commands::add(std::string title, ImGuiKeyChord chord, std::function<void()> run, bool repeat) {
  commands_.push_back({std::move(title), chord, std::move(run), repeat});
}

void Commands::dispatch_shortcuts() {
  const bool typing = ImGui::GetIO().WantTextInput;
  for (const Command& command : commands_) {
    if (command.chord == 0) continue;
    const bool plain = (command.chord & (ImGuiMod_Ctrl | ImGuiMod_Alt)) == 0;
    if (plain && typing) continue;
    if (ImGui::IsPopupOpen(nullptr, ImGuiPopupFlags_AnyPopup)) continue;
    const ImGuiInputFlags repeat = command.repeat ? ImGuiInputFlags_Repeat : ImGuiInputFlags_None;
    if (ImGui::IsKeyChordPressed(command.chord, repeat)) {
      command.run();
      return;  // a command may rebuild the table
    }
  }
}

std::string chord_name(ImGuiKeyChord chord) {
  if (chord == 0) return {};
  if (chord == (ImGuiMod_Shift | ImGuiKey_Slash)) return "?";
  return ImGui::GetKeyChordName(chord);
}

namespace {

char lower(char letter) {
  return static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
}

// Where `word` stands in `text` from `from` on, at the beginning of a word if it does so anywhere; npos:
// nowhere.
size_t find_word(std::string_view word, std::string_view text, size_t from) {
  size_t inside = std::string_view::npos;
  for (size_t at = from; at + word.size() <= text.size(); ++at) {
    if (!std::ranges::equal(word, text.substr(at, word.size()), {}, lower, lower)) continue;
    if (at == 0 || text[at - 1] == ' ') return at;
    if (inside == std::string_view::npos) inside = at;
  }
  return inside;
}

}  // namespace

int fuzzy_score(std::string_view pattern, std::string_view text) {
  int score = 0;
  size_t at = 0;
  while (!pattern.empty()) {
    const size_t space = std::min(pattern.find(' '), pattern.size());
    const std::string_view word = pattern.substr(0, space);
    pattern.remove_prefix(std::min(space + 1, pattern.size()));
    // A word as a whole beats its letters scattered: "csv" is no match of "foCuSed ... SVg".
    if (const size_t whole = find_word(word, text, at); !word.empty() && whole != std::string_view::npos) {
      score += static_cast<int>(word.size()) * 8 + (whole == 0 || text[whole - 1] == ' ' ? 12 : 0);
      at = whole + word.size();
      continue;
    }
    for (int run = 0; const char letter : word) {
      size_t found = at;
      while (found < text.size() && lower(text[found]) != lower(letter)) ++found;
      if (found == text.size()) return -1;
      run = found == at ? run + 1 : 1;
      score += run * 2 + (found == 0 || text[found - 1] == ' ' ? 6 : 0);
      at = found + 1;
    }
  }
  return score * 16 - static_cast<int>(std::min<size_t>(text.size(), 15));
}

void Palette::draw(const Commands& commands, float scale) {
  constexpr const char* kTitle = "Command palette";
  if (open_requested_) {
    open_requested_ = false;
    text_[0] = 0;
    selected_ = 0;
    ImGui::OpenPopup(kTitle);
  }
  const ImGuiViewport* viewport = ImGui::GetMainViewport();
  const float width = std::min(560 * scale, viewport->Size.x * 0.9F);
  ImGui::SetNextWindowPos(
      ImVec2(viewport->Pos.x + viewport->Size.x / 2, viewport->Pos.y + viewport->Size.y * 0.14F),
      ImGuiCond_Always, ImVec2(0.5F, 0));
  ImGui::SetNextWindowSize(ImVec2(width, 0));
  open_ = ImGui::BeginPopup(kTitle);
  if (!open_) return;
  if (ImGui::IsWindowAppearing()) ImGui::SetKeyboardFocusHere();
  ImGui::SetNextItemWidth(-1);
  if (ImGui::InputTextWithHint("##command", "Type a command", text_, sizeof text_)) selected_ = 0;
  std::vector<std::pair<int, const Command*>> matches;
  for (const Command& command : commands.all()) {
    const int score = fuzzy_score(text_, command.title);
    if (score >= 0 || text_[0] == 0) matches.emplace_back(score, &command);
  }
  std::ranges::stable_sort(matches, [](const auto& a, const auto& b) { return a.first > b.first; });
  const int n = static_cast<int>(matches.size());
  if (ImGui::IsKeyPressed(ImGuiKey_DownArrow)) selected_ = std::min(selected_ + 1, n - 1);
  if (ImGui::IsKeyPressed(ImGuiKey_UpArrow)) selected_ = std::max(selected_ - 1, 0);
  const Command* chosen = nullptr;
  if (ImGui::IsKeyPressed(ImGuiKey_Enter) && n > 0) chosen = matches[static_cast<size_t>(selected_)].second;
  ImGui::BeginChild("##matches", ImVec2(0, ImGui::GetTextLineHeightWithSpacing() * 12));
  for (int i = 0; i < n; ++i) {
    const Command& command = *matches[static_cast<size_t>(i)].second;
    if (ImGui::Selectable(command.title.c_str(), i == selected_)) chosen = &command;
    if (i == selected_ && (ImGui::IsKeyPressed(ImGuiKey_DownArrow) || ImGui::IsKeyPressed(ImGuiKey_UpArrow)))
      ImGui::SetScrollHereY();
    const std::string chord = chord_name(command.chord);
    if (!chord.empty()) {
      ImGui::SameLine(ImGui::GetWindowWidth() - ImGui::CalcTextSize(chord.c_str()).x - 16 * scale);
      ImGui::TextDisabled("%s", chord.c_str());
    }
  }
  if (n == 0) ImGui::TextDisabled("No command matches.");
  ImGui::EndChild();
  const auto run = chosen != nullptr ? chosen->run : std::function<void()>{};
  if (chosen != nullptr || ImGui::IsKeyPressed(ImGuiKey_Escape)) ImGui::CloseCurrentPopup();
  ImGui::EndPopup();
  if (run) run();
}

}  // namespace kvlapse::gui
