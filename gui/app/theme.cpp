#include "gui/app/theme.h"

#include <algorithm>
#include <cmath>

#include "implot.h"

namespace kvlapse::gui {
namespace {

ImU32 rgb(uint32_t hex, uint32_t alpha = 255) {
  return IM_COL32((hex >> 16) & 255, (hex >> 8) & 255, hex & 255, alpha);
}

// Anchors at equal distances, blended linearly: within 1/255 of the published tables where the ramps are
// smooth.
template <size_t N>
Ramp make_ramp(const std::array<uint32_t, N>& anchors) {
  Ramp ramp{};
  for (size_t i = 0; i < ramp.size(); ++i) {
    const float at = static_cast<float>(i) / 255.0F * static_cast<float>(N - 1);
    const size_t low = std::min(static_cast<size_t>(at), N - 2);
    ramp[i] = Theme::blend(rgb(anchors[low]), rgb(anchors[low + 1]), at - static_cast<float>(low));
  }
  return ramp;
}

const Ramp& viridis() {
  static const Ramp ramp =
      make_ramp(std::array<uint32_t, 11>{0x440154, 0x482475, 0x414487, 0x355f8d, 0x2a788e, 0x21918c, 0x22a884,
                                         0x44bf70, 0x7ad151, 0xbddf26, 0xfde725});
  return ramp;
}
const Ramp& inferno() {
  static const Ramp ramp =
      make_ramp(std::array<uint32_t, 11>{0x000004, 0x160b39, 0x420a68, 0x6a176e, 0x932667, 0xbc3754, 0xdd513a,
                                         0xf37819, 0xfca50a, 0xf6d746, 0xfcffa4});
  return ramp;
}
const Ramp& cividis() {
  static const Ramp ramp =
      make_ramp(std::array<uint32_t, 11>{0x00224e, 0x083370, 0x35456c, 0x4f576c, 0x666970, 0x7d7c78, 0x948e77,
                                         0xaea371, 0xc8b866, 0xe5cf52, 0xfee838});
  return ramp;
}

float luminance(ImU32 colour) {
  const auto linear = [](uint32_t byte) {
    const float value = static_cast<float>(byte) / 255.0F;
    return value <= 0.04045F ? value / 12.92F : std::pow((value + 0.055F) / 1.055F, 2.4F);
  };
  return 0.2126F * linear(colour & 255) + 0.7152F * linear((colour >> 8) & 255) +
         0.0722F * linear((colour >> 16) & 255);
}

ImVec4 vec(ImU32 colour) {
  return ImGui::ColorConvertU32ToFloat4(colour);
}

}  // namespace

ImU32 Theme::blend(ImU32 from, ImU32 to, float share) {
  ImU32 out = 0;
  for (int shift = 0; shift < 32; shift += 8) {
    const float a = static_cast<float>((from >> shift) & 255), b = static_cast<float>((to >> shift) & 255);
    out |= static_cast<ImU32>(a + (b - a) * share + 0.5F) << shift;
  }
  return out;
}

ImU32 Theme::with_alpha(ImU32 colour, float alpha) {
  return (colour & 0x00ffffffU) | (static_cast<ImU32>(alpha * 255.0F + 0.5F) << 24);
}

ImU32 Theme::ink_on(ImU32 fill) {
  return luminance(fill) > 0.179F ? rgb(0x101114) : rgb(0xffffff);
}

Theme make_theme(ThemeKind kind) {
  Theme theme;
  theme.kind = kind;
  if (kind == ThemeKind::light) {
    theme.background = rgb(0xf3f4f6), theme.surface = rgb(0xffffff), theme.text = rgb(0x17191c),
    theme.muted = rgb(0x5b616b);
    theme.grid = rgb(0xd4d8de), theme.accent = rgb(0x0b62b8), theme.selection = rgb(0x000000);
    theme.good = rgb(0x00795a), theme.warning = rgb(0x9a5b00), theme.bad = rgb(0xb3261e);
    theme.map_unborn = rgb(0xffffff), theme.map_alive = rgb(0x2f6fb0), theme.map_evicted = rgb(0xe3e6ea);
    theme.series = {rgb(0x0072b2), rgb(0xd55e00), rgb(0x00805f), rgb(0xb04a86),
                    rgb(0xa87400), rgb(0x2b8fc7), rgb(0x44474d)};
    theme.missed = theme.series[2];
    theme.sequential = &viridis(), theme.heat = &inferno();
    theme.measured = rgb(0x00795a), theme.sampled = rgb(0x0b62b8), theme.modelled = rgb(0x9a5b00),
    theme.derived = rgb(0x6b5a9a);
    return theme;
  }
  theme.background = rgb(0x15171b), theme.surface = rgb(0x1c1f25), theme.text = rgb(0xe7e9ed),
  theme.muted = rgb(0x9aa2ae);
  theme.grid = rgb(0x363b45), theme.accent = rgb(0x58a6e8), theme.selection = rgb(0xffffff);
  theme.good = rgb(0x2fbf95), theme.warning = rgb(0xf0b13c), theme.bad = rgb(0xff7b72);
  theme.map_unborn = rgb(0x1c1f25), theme.map_alive = rgb(0x4f9bd9), theme.map_evicted = rgb(0x2b3038);
  theme.series = {rgb(0x56b4e9), rgb(0xe69f00), rgb(0x2fbf95), rgb(0xdd8fbc),
                  rgb(0xf0e442), rgb(0xe8743b), rgb(0xc5cad3)};
  theme.missed = theme.series[2];
  theme.sequential = &viridis(), theme.heat = &inferno();
  theme.measured = rgb(0x2fbf95), theme.sampled = rgb(0x58a6e8), theme.modelled = rgb(0xf0b13c),
  theme.derived = rgb(0xb39ddb);
  if (kind == ThemeKind::colour_blind) {
    theme.good = rgb(0x56b4e9), theme.warning = rgb(0xf0e442), theme.bad = rgb(0xe8743b);
    theme.map_alive = rgb(0x56b4e9);
    theme.missed =
        rgb(0x9fdcff);  // light blue against yellow, which every kind of colour blindness leaves apart
    theme.sequential = &cividis(), theme.heat = &cividis();
    theme.measured = rgb(0x56b4e9), theme.sampled = rgb(0xdd8fbc), theme.modelled = rgb(0xf0e442),
    theme.derived = rgb(0xc5cad3);
  }
  return theme;
}

void apply_theme(const Theme& theme, float scale) {
  const bool light = theme.kind == ThemeKind::light;
  ImGuiStyle style;
  if (light) {
    ImGui::StyleColorsLight(&style);
  } else {
    ImGui::StyleColorsDark(&style);
  }
  style.WindowRounding = style.ChildRounding = 0;
  style.FrameRounding = style.GrabRounding = style.TabRounding = style.PopupRounding = 3;
  style.FrameBorderSize = light ? 1 : 0;
  style.WindowBorderSize = style.ChildBorderSize = style.PopupBorderSize = 1;
  style.WindowPadding = ImVec2(8, 6), style.FramePadding = ImVec2(7, 3), style.ItemSpacing = ImVec2(8, 5);
  style.CellPadding = ImVec2(6, 2), style.ScrollbarSize = 12;
  style.ScaleAllSizes(scale);
  style.FontScaleDpi = scale;
  auto& colours = style.Colors;
  const ImU32 raised = Theme::blend(theme.surface, theme.text, light ? 0.06F : 0.09F);
  const ImU32 hovered = Theme::blend(theme.surface, theme.accent, light ? 0.22F : 0.30F);
  const ImU32 active = Theme::blend(theme.surface, theme.accent, light ? 0.35F : 0.48F);
  const auto set = [&](ImGuiCol index, ImU32 colour) { colours[index] = vec(colour); };
  set(ImGuiCol_Text, theme.text), set(ImGuiCol_TextDisabled, theme.muted),
      set(ImGuiCol_WindowBg, theme.surface);
  set(ImGuiCol_ChildBg, Theme::with_alpha(theme.surface, 0)), set(ImGuiCol_PopupBg, theme.surface);
  set(ImGuiCol_Border, theme.grid), set(ImGuiCol_FrameBg, raised), set(ImGuiCol_FrameBgHovered, hovered);
  set(ImGuiCol_FrameBgActive, active), set(ImGuiCol_TitleBg, theme.background),
      set(ImGuiCol_TitleBgActive, theme.background);
  set(ImGuiCol_TitleBgCollapsed, theme.background), set(ImGuiCol_MenuBarBg, theme.background);
  set(ImGuiCol_Button, raised), set(ImGuiCol_ButtonHovered, hovered), set(ImGuiCol_ButtonActive, active);
  set(ImGuiCol_Header, hovered), set(ImGuiCol_HeaderHovered, hovered), set(ImGuiCol_HeaderActive, active);
  set(ImGuiCol_CheckMark, theme.accent), set(ImGuiCol_SliderGrab, theme.accent),
      set(ImGuiCol_SliderGrabActive, theme.accent);
  set(ImGuiCol_Tab, theme.background), set(ImGuiCol_TabHovered, hovered),
      set(ImGuiCol_TabSelected, theme.surface);
  set(ImGuiCol_TabDimmed, theme.background), set(ImGuiCol_TabDimmedSelected, theme.surface);
  set(ImGuiCol_TabSelectedOverline, theme.accent), set(ImGuiCol_TabDimmedSelectedOverline, theme.grid);
  set(ImGuiCol_DockingEmptyBg, theme.background),
      set(ImGuiCol_DockingPreview, Theme::with_alpha(theme.accent, 0.5F));
  set(ImGuiCol_TableHeaderBg, raised), set(ImGuiCol_TableBorderLight, theme.grid),
      set(ImGuiCol_TableBorderStrong, theme.grid);
  set(ImGuiCol_TableRowBgAlt, Theme::with_alpha(theme.text, 0.03F)), set(ImGuiCol_Separator, theme.grid);
  set(ImGuiCol_ScrollbarBg, Theme::with_alpha(theme.background, 0.4F)),
      set(ImGuiCol_PlotHistogram, theme.accent);
  set(ImGuiCol_TextSelectedBg, active), set(ImGuiCol_NavCursor, theme.accent),
      set(ImGuiCol_TextLink, theme.accent);
  ImGui::GetStyle() = style;

  ImPlotStyle plot;
  ImPlot::StyleColorsAuto(&plot);
  plot.PlotPadding = ImVec2(6 * scale, 6 * scale), plot.LabelPadding = ImVec2(5 * scale, 4 * scale),
  plot.PlotBorderSize = 1;
  plot.LegendPadding = ImVec2(6 * scale, 6 * scale), plot.LegendInnerPadding = ImVec2(4 * scale, 3 * scale);
  plot.MajorTickLen = ImVec2(5 * scale, 5 * scale), plot.MinorTickLen = ImVec2(3 * scale, 3 * scale);
  plot.MinorAlpha = 0, plot.PlotMinSize = ImVec2(60 * scale, 30 * scale);
  plot.Colors[ImPlotCol_PlotBg] = vec(theme.surface),
  plot.Colors[ImPlotCol_FrameBg] = vec(Theme::with_alpha(theme.surface, 0));
  plot.Colors[ImPlotCol_PlotBorder] = vec(theme.grid), plot.Colors[ImPlotCol_AxisGrid] = vec(theme.grid);
  plot.Colors[ImPlotCol_AxisText] = vec(theme.text),
  plot.Colors[ImPlotCol_LegendBg] = vec(Theme::with_alpha(theme.surface, 0.9F));
  ImPlot::GetStyle() = plot;
}

}  // namespace kvlapse::gui
