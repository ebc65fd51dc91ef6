// Kernels: what ran on the GPU, by name, when activity was recorded.
#include <fmt/format.h>

#include <array>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "trace/views/kernel_view.h"

namespace kvlapse::gui {
namespace {

struct KernelsModel final : DrawModel {
  KernelSummary summary;
};

class KernelsPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const auto trace = ui.trace;
    return {mix_key({reinterpret_cast<uintptr_t>(trace.get()), trace ? trace->version() : 0}), [trace] {
              auto model = std::make_shared<KernelsModel>();
              if (!trace) {
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }
              model->summary = read_kernels(trace->reader());
              model->absence = model->summary.absence;
              return model;
            }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const KernelsModel&>(base);
    ImGui::SetNextItemWidth(ui.px(180));
    ImGui::InputTextWithHint("##find", "find a kernel", find_.data(), find_.size());
    ImGui::SameLine();
    badge(ui, Provenance::measured, "CUPTI activity records: start and end of each kernel on the device.");
    constexpr int kColumns = 6;
    if (!ImGui::BeginTable("##kernels", kColumns,
                           ImGuiTableFlags_RowBg | ImGuiTableFlags_ScrollY | ImGuiTableFlags_Resizable |
                               ImGuiTableFlags_BordersInnerV))
      return;
    ImGui::TableSetupScrollFreeze(0, 1);
    for (const char* column : {"kernel", "launches", "total, ms", "mean, us", "min, us", "max, us"})
      ImGui::TableSetupColumn(column);
    ImGui::TableHeadersRow();
    for (const KernelRow& row : model.summary.rows) {
      if (find_[0] != 0 && row.name.find(find_.data()) == std::string::npos) continue;
      ImGui::TableNextRow();
      for (const std::string& field :
           {row.name, std::to_string(row.launches), fmt::format("{:.3f}", row.total_ms),
            fmt::format("{:.2f}", row.mean_us), fmt::format("{:.2f}", row.min_us),
            fmt::format("{:.2f}", row.max_us)}) {
        ImGui::TableNextColumn();
        ImGui::TextUnformatted(field.c_str());
      }
    }
    ImGui::EndTable();
  }

  Table table(const DrawModel& base) const override {
    Table table{{"kernel", "launches", "total_ms", "mean_us", "min_us", "max_us"}, {}};
    for (const KernelRow& row : static_cast<const KernelsModel&>(base).summary.rows) {
      table.rows.push_back({row.name, std::to_string(row.launches), fmt::format("{:.6g}", row.total_ms),
                            fmt::format("{:.6g}", row.mean_us), fmt::format("{:.6g}", row.min_us),
                            fmt::format("{:.6g}", row.max_us)});
    }
    return table;
  }
  std::string sql(const Ui&) const override {
    return "SELECT s.value AS kernel, count(*) AS launches, sum(k.end - k.start) AS total_ns FROM "
           "CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName GROUP BY 1 ORDER BY 3 DESC";
  }

 private:
  std::array<char, 128> find_{};
};

}  // namespace

std::unique_ptr<Panel> make_kernels_panel() {
  return std::make_unique<KernelsPanel>();
}

}  // namespace kvlapse::gui
