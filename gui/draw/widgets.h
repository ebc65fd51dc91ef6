// Widgets that several panels share. UI thread, between NewFrame and Render.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "gui/panel.h"

namespace kvlapse::gui {

// Where a number comes from.
enum class Provenance { measured, sampled, modelled, derived };

// A small coloured label; its tooltip says what the word means and where this number comes from.
void badge(const Ui& ui, Provenance provenance, const char* from);
// Same line when it still fits into the content width, else a new one.
void same_line_if_fits(float next_width);

// Says why there is nothing to draw and what to do, in the middle of the panel.
void draw_absence(const Ui& ui, std::string_view title, std::string_view why);

// Text in the muted colour, cut with an ellipsis at `width` pixels (tooltip: all of it).
void cut_text(const Ui& ui, const std::string& text, float width, bool muted = false);

// A vertical colour bar with its ends labelled, in the current cursor position.
void ramp_legend(const Ui& ui, const Ramp& ramp, const char* low, const char* high, const char* title,
                 float width);

// A frame in the colour of the selection that is seen on every ground.
void outline(const Ui& ui, ImDrawList* list, ImVec2 low, ImVec2 high, float width);
// Muted text over a plot, on a ground that keeps it legible.
void label(const Ui& ui, ImDrawList* list, ImVec2 at, const std::string& text);

// Combo over names; returns true when changed.
bool choose(const char* label, int& index, const std::vector<const char*>& names, float width);

std::string format_count(double value);  // 12.3K, 4.56M
std::string format_bytes(double bytes);  // 12.3 MiB
std::string format_value(double value);  // 3 to 4 significant digits

// The text of a token as one line: escapes for blanks and control letters.
std::string visible_token(std::string_view text);

// Ticks of the current plot's axis at round steps, far enough apart for their labels. Before SetupFinish;
// `pixels` is the axis' length as last drawn.
void round_ticks(const Ui& ui, int axis, double low, double high, float pixels);

// Vertical cursor at `step` in the current plot; drags set the step. Also shades the selected token range
// when `range_on_x`.
void step_cursor(Ui& ui, bool range_on_x);
// Left click or drag in the plot sets the step.
void pick_step(Ui& ui);

}  // namespace kvlapse::gui
