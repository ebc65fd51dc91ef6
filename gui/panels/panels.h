// The panels, one file each. A new one is its file, a line here and a line in registry.cpp.
#pragma once

#include <memory>

#include "gui/panel.h"

namespace kvlapse::gui {

std::unique_ptr<Panel> make_timeline_panel();
std::unique_ptr<Panel> make_head_grid_panel();
std::unique_ptr<Panel> make_life_map_panel();
std::unique_ptr<Panel> make_text_panel();
std::unique_ptr<Panel> make_trace_info_panel();
std::unique_ptr<Panel> make_compare_panel();
std::unique_ptr<Panel> make_recordings_panel();
std::unique_ptr<Panel> make_what_if_panel();
std::unique_ptr<Panel> make_memory_panel();
std::unique_ptr<Panel> make_bandwidth_panel();
std::unique_ptr<Panel> make_kernels_panel();
std::unique_ptr<Panel> make_sql_panel();

}  // namespace kvlapse::gui
