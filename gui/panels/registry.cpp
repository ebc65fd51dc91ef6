#include "gui/panels/panels.h"

namespace kvlapse::gui {

const std::vector<PanelInfo>& panel_registry() {
  static const std::vector<PanelInfo> panels = {
      {"timeline", "Timeline", DockPlace::top, true,
       "The whole generation: phases, tokens held, evictions, step time and bandwidth; play, scrub, loop, "
       "notes.",
       make_timeline_panel},
      {"head-grid", "Heads", DockPlace::left, true,
       "Every layer and kv head at the current step; click selects one.", make_head_grid_panel},
      {"life-map", "Token lives", DockPlace::centre, true,
       "When each token was held and when it was evicted; slots; attention that it received or missed.",
       make_life_map_panel},
      {"text", "Text", DockPlace::right, true,
       "The generation as text, each token coloured by who still holds it, its lifetime, regret or "
       "attention.",
       make_text_panel},
      {"compare", "Compare", DockPlace::centre, false,
       "Policies and budgets from open results: quality against footprint, open and closed loop apart.",
       make_compare_panel},
      {"recordings", "Recordings", DockPlace::centre, false,
       "Two recordings aligned by token: the first divergence, what each held, both texts.",
       make_recordings_panel},
      {"what-if", "What if", DockPlace::left, false,
       "Another policy and budget over the recorded q, k and v, replayed in the background.",
       make_what_if_panel},
      {"memory", "Memory", DockPlace::centre, false,
       "Bytes held, pages that eviction frees or leaves half empty, and the pages of the selected head.",
       make_memory_panel},
      {"bandwidth", "Bandwidth", DockPlace::centre, false,
       "Bytes that attention must read at each step, the rate that this implies, and measured DRAM traffic.",
       make_bandwidth_panel},
      {"kernels", "Kernels", DockPlace::centre, false, "GPU kernels by name: launches and times.",
       make_kernels_panel},
      {"sql", "SQL", DockPlace::right, false, "Read-only queries over the trace, with a plot of two columns.",
       make_sql_panel},
      {"info", "Trace info", DockPlace::right, false,
       "What was recorded, how, and what is wrong with the file, if anything.", make_trace_info_panel},
  };
  return panels;
}

}  // namespace kvlapse::gui
