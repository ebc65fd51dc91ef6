#include "gui/draw/widgets.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "imgui_internal.h"
#include "implot.h"

namespace kvlapse::gui {

void badge(const Ui& ui, Provenance provenance, const char* from) {
  struct Kind {
    const char* label;
    const char* meaning;
    ImU32 colour;
  };
  const std::array<Kind, 4> kinds = {
      {{"measured", "Measured: counted or timed while recording.", ui.theme.measured},
       {"sampled", "Sampled: from periodic or partial samples.", ui.theme.sampled},
       {"modelled", "Modelled: computed from what the code is known to read or hold, not counted.",
        ui.theme.modelled},
       {"derived", "Derived: computed from recorded values.", ui.theme.derived}}};
  const Kind& kind = kinds[static_cast<int>(provenance)];
  const float size = ImGui::GetFontSize() * 0.8F;
  ImGui::PushFont(nullptr, ImGui::GetStyle().FontSizeBase * 0.8F);
  const ImVec2 text = ImGui::CalcTextSize(kind.label);
  const ImVec2 padding(ui.px(5), ui.px(1));
  const ImVec2 at = ImGui::GetCursorScreenPos();
  const float drop = std::max(0.0F, (ImGui::GetFontSize() / 0.8F - size) * 0.5F + ui.px(1));
  const ImVec2 low(at.x, at.y + drop), high(low.x + text.x + 2 * padding.x, low.y + text.y + 2 * padding.y);
  ImDrawList* list = ImGui::GetWindowDrawList();
  list->AddRect(low, high, kind.colour, ui.px(7));
  list->AddText(ImVec2(low.x + padding.x, low.y + padding.y), kind.colour, kind.label);
  ImGui::PopFont();
  ImGui::Dummy(ImVec2(high.x - low.x, high.y - at.y));
  if (ImGui::BeginItemTooltip()) {
    ImGui::PushTextWrapPos(ui.px(360));
    ImGui::TextUnformatted(kind.meaning);
    ImGui::TextUnformatted(from);
    ImGui::PopTextWrapPos();
    ImGui::EndTooltip();
  }
}

void same_line_if_fits(float next_width) {
  const float right = ImGui::GetItemRectMax().x + ImGui::GetStyle().ItemSpacing.x + next_width;
  if (right < ImGui::GetCursorScreenPos().x + ImGui::GetContentRegionAvail().x) ImGui::SameLine();
}

void draw_absence(const Ui& ui, std::string_view title, std::string_view why) {
  const ImVec2 space = ImGui::GetContentRegionAvail();
  const float width = std::min(space.x - ui.px(16), ui.px(460));
  const std::string text(why);
  const ImVec2 size = ImGui::CalcTextSize(text.c_str(), nullptr, false, width);
  const float left = ImGui::GetCursorPosX() + std::max(0.0F, (space.x - std::min(size.x, width)) / 2);
  ImGui::SetCursorPosY(ImGui::GetCursorPosY() +
                       std::max(ui.px(8), (space.y - size.y) / 2 - ImGui::GetTextLineHeightWithSpacing()));
  ImGui::SetCursorPosX(left);
  ImGui::TextUnformatted(title.data(), title.data() + title.size());
  ImGui::SetCursorPosX(left);
  ImGui::PushTextWrapPos(left + width);
  ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.muted);
  ImGui::TextUnformatted(text.c_str());
  ImGui::PopStyleColor();
  ImGui::PopTextWrapPos();
}

void cut_text(const Ui& ui, const std::string& text, float width, bool muted) {
  const float drop = ImGui::GetCurrentWindow()->DC.CurrLineTextBaseOffset;  // beside framed items
  const ImVec2 cursor = ImGui::GetCursorScreenPos(), at(cursor.x, cursor.y + drop);
  const ImVec2 size = ImGui::CalcTextSize(text.c_str());
  const float height = ImGui::GetTextLineHeight();
  ImGui::PushStyleColor(ImGuiCol_Text, muted ? ui.theme.muted : ui.theme.text);
  // The clip rectangle leaves room for what hangs below the line.
  ImGui::RenderTextEllipsis(ImGui::GetWindowDrawList(), at, ImVec2(at.x + width, at.y + height + ui.px(4)),
                            at.x + width, text.c_str(), nullptr, &size);
  ImGui::PopStyleColor();
  ImGui::Dummy(ImVec2(std::min(width, size.x), height + drop));
  if (size.x > width) ImGui::SetItemTooltip("%s", text.c_str());
}

void ramp_legend(const Ui& ui, const Ramp& ramp, const char* low, const char* high, const char* title,
                 float width) {
  ImGui::AlignTextToFramePadding();
  ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.muted);
  ImGui::TextUnformatted(title);
  ImGui::SameLine();
  ImGui::TextUnformatted(low);
  ImGui::SameLine(0, ui.px(4));
  const ImVec2 at = ImGui::GetCursorScreenPos();
  const float height = ui.px(10), top = at.y + (ImGui::GetFrameHeight() - height) / 2;
  ImDrawList* list = ImGui::GetWindowDrawList();
  constexpr int kParts = 32;
  for (int i = 0; i < kParts; ++i) {
    const float x0 = at.x + width * static_cast<float>(i) / kParts,
                x1 = at.x + width * static_cast<float>(i + 1) / kParts;
    const ImU32 a = ramp[i * 255 / kParts], b = ramp[(i + 1) * 255 / kParts];
    list->AddRectFilledMultiColor(ImVec2(x0, top), ImVec2(x1, top + height), a, b, b, a);
  }
  ImGui::Dummy(ImVec2(width, ImGui::GetFrameHeight()));
  ImGui::SameLine(0, ui.px(4));
  ImGui::TextUnformatted(high);
  ImGui::PopStyleColor();
}

void outline(const Ui& ui, ImDrawList* list, ImVec2 low, ImVec2 high, float width) {
  list->AddRect(ImVec2(low.x - width / 2, low.y - width / 2), ImVec2(high.x + width / 2, high.y + width / 2),
                ui.theme.background, 0, width * 2.4F);
  list->AddRect(low, high, ui.theme.selection, 0, width);
}

void label(const Ui& ui, ImDrawList* list, ImVec2 at, const std::string& text) {
  if (text.empty()) return;
  const ImVec2 size = ImGui::CalcTextSize(text.c_str());
  list->AddRectFilled(ImVec2(at.x - ui.px(2), at.y), ImVec2(at.x + size.x + ui.px(2), at.y + size.y),
                      Theme::with_alpha(ui.theme.surface, 0.8F), ui.px(2));
  list->AddText(at, ui.theme.muted, text.c_str());
}

bool choose(const char* label, int& index, const std::vector<const char*>& names, float width) {
  ImGui::SetNextItemWidth(width);
  bool changed = false;
  if (ImGui::BeginCombo(label, names[static_cast<size_t>(index)])) {
    for (int i = 0; i < static_cast<int>(names.size()); ++i) {
      if (ImGui::Selectable(names[static_cast<size_t>(i)], i == index)) {
        changed = i != index;
        index = i;
      }
    }
    ImGui::EndCombo();
  }
  return changed;
}

std::string format_count(double value) {
  const double size = std::abs(value);
  if (size >= 1e9) return fmt::format("{:.2f}G", value / 1e9);
  if (size >= 1e6) return fmt::format("{:.2f}M", value / 1e6);
  if (size >= 1e4) return fmt::format("{:.1f}K", value / 1e3);
  return size == std::floor(size) ? fmt::format("{:.0f}", value) : format_value(value);
}

std::string format_bytes(double bytes) {
  static constexpr std::array<const char*, 5> kUnits = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (std::abs(bytes) >= 1024 && unit + 1 < kUnits.size()) bytes /= 1024, ++unit;
  return unit == 0 ? fmt::format("{:.0f} B", bytes)
                   : fmt::format("{:.{}f} {}", bytes,
                                 bytes < 10    ? 2
                                 : bytes < 100 ? 1
                                               : 0,
                                 kUnits[unit]);
}

std::string format_value(double value) {
  if (std::isnan(value)) return "unknown";
  if (value == 0) return "0";
  const double size = std::abs(value);
  if (size < 1e-3 || size >= 1e6) return fmt::format("{:.2e}", value);
  return fmt::format("{:.{}f}", value, size < 0.1 ? 5 : size < 10 ? 3 : size < 100 ? 2 : 1);
}

std::string visible_token(std::string_view text) {
  std::string out;
  for (char c : text) {
    switch (c) {
      case '\n': out += "\\n"; break;
      case '\t': out += "\\t"; break;
      case '\r': out += "\\r"; break;
      default:
        if (static_cast<unsigned char>(c) < 32) {
          out += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
        } else {
          out += c;
        }
    }
  }
  return out;
}

void round_ticks(const Ui& ui, int axis, double low, double high, float pixels) {
  const double apart = ui.px(axis == ImAxis_X1 ? 90 : 44);
  const double rough = std::max((high - low) * apart / std::max(1.0, static_cast<double>(pixels)), 1.0);
  const double magnitude = std::pow(10, std::floor(std::log10(rough)));
  const double rest = rough / magnitude;
  const double step = magnitude * (rest <= 1 ? 1 : rest <= 2 ? 2 : rest <= 5 ? 5 : 10);
  std::array<double, 64> ticks{};
  int n = 0;
  for (double at = std::ceil(low / step) * step; at <= high && n < static_cast<int>(ticks.size());
       at += step) {
    // A label that would reach beyond the panel's edge would be cut.
    const double room = (high - at) / std::max(1e-9, high - low) * static_cast<double>(pixels) + ui.px(12);
    if (axis == ImAxis_X1 && ImGui::CalcTextSize(fmt::format("{:.0f}", at).c_str()).x / 2 > room) break;
    ticks[static_cast<size_t>(n++)] = at;
  }
  ImPlot::SetupAxisTicks(axis, ticks.data(), n);
}

void step_cursor(Ui& ui, bool range_on_x) {
  const ImPlotRect limits = ImPlot::GetPlotLimits();
  if (range_on_x && ui.selection.has_range()) {
    const ImVec2 low = ImPlot::PlotToPixels(ui.selection.token_begin, limits.Y.Max),
                 high = ImPlot::PlotToPixels(ui.selection.token_end, limits.Y.Min);
    ImPlot::PushPlotClipRect();
    ImPlot::GetPlotDrawList()->AddRectFilled(low, high, Theme::with_alpha(ui.theme.selection, 0.12F));
    ImPlot::PopPlotClipRect();
  }
  double x = ui.selection.step;
  // ImPlot's tool drags; its own line has ticks at the ends, which fray where plots are stacked.
  if (ImPlot::DragLineX(0, &x, ImVec4(0, 0, 0, 0), ui.px(1.5F), ImPlotDragToolFlags_NoFit))
    ui.select_step(static_cast<int>(std::lround(x)));
  const float at = ImPlot::PlotToPixels(x, limits.Y.Min).x, top = ImPlot::GetPlotPos().y;
  ImPlot::PushPlotClipRect();
  ImPlot::GetPlotDrawList()->AddLine(ImVec2(at, top), ImVec2(at, top + ImPlot::GetPlotSize().y),
                                     ui.theme.selection, ui.px(1.5F));
  ImPlot::PopPlotClipRect();
}

void pick_step(Ui& ui) {
  if (!ImPlot::IsPlotHovered() || ImGui::GetIO().KeyCtrl) return;
  if (ImGui::IsMouseClicked(ImGuiMouseButton_Left) || ImGui::IsMouseDoubleClicked(ImGuiMouseButton_Left)) {
    ui.select_step(static_cast<int>(std::lround(ImPlot::GetPlotMousePos().x)));
  }
}

}  // namespace kvlapse::gui
