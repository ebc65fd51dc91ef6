// Theme: every colour that the dashboard uses, and the colour ramps of its maps. UI thread only.
// Series colours are those of Okabe and Ito (2008), told apart with every common kind of colour blindness;
// ramps are viridis and inferno (van der Walt, Smith 2015) and, in the colour-blind safe theme, cividis
// (Nunez et al. 2018).
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "imgui.h"

namespace kvlapse::gui {

enum class ThemeKind { dark, light, colour_blind };
inline constexpr std::array<std::string_view, 3> kThemeNames = {"dark", "light", "colour-blind safe"};

using Ramp = std::array<ImU32, 256>;

struct Theme {
  ThemeKind kind = ThemeKind::dark;
  ImU32 background, surface, text, muted, grid, accent;
  ImU32 selection;  // of no series and no ramp
  ImU32 good, warning, bad;
  ImU32 map_unborn, map_alive, map_evicted;  // life map: before birth, held, gone
  ImU32 missed;                              // attention to what was evicted: no colour of the heat ramp
  std::array<ImU32, 7> series;
  const Ramp* sequential = nullptr;  // 0 dark .. 255 bright: amounts
  const Ramp* heat = nullptr;        // attention, regret
  ImU32 measured, sampled, modelled, derived;

  ImU32 ramp(float value) const { return (*sequential)[index(value)]; }
  ImU32 heat_at(float value) const { return (*heat)[index(value)]; }
  // Black or white, whichever can be read on `fill`.
  static ImU32 ink_on(ImU32 fill);
  static ImU32 blend(ImU32 from, ImU32 to, float share);
  static ImU32 with_alpha(ImU32 colour, float alpha);

 private:
  static int index(float value) {
    return value <= 0 ? 0 : value >= 1 ? 255 : static_cast<int>(value * 255.0F + 0.5F);
  }
};

Theme make_theme(ThemeKind kind);
// Sets ImGui's and ImPlot's styles; `scale` is physical pixels per design pixel.
void apply_theme(const Theme& theme, float scale);

}  // namespace kvlapse::gui
