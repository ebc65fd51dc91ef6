// Bandwidth: bytes of K and V that attention must read at each step, and the rate that this implies. Measured
// DRAM traffic is drawn beside it when it was recorded; when it was not, the panel says why.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gui/draw/line_pyramid.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/kernel_view.h"

namespace kvlapse::gui {
namespace {

constexpr int kDrawnPixels = 1200;

struct BandwidthModel final : DrawModel {
  std::shared_ptr<const Timeline> timeline;
  std::array<DrawnLine, 2> lines;  // MiB a step, GiB/s
  std::array<float, 2> highest{};
  std::string counters;  // why none
};

class BandwidthPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const auto trace = ui.trace;
    const int sequence = ui.selection.sequence;
    return {mix_key({reinterpret_cast<uintptr_t>(trace.get()), trace ? trace->version() : 0,
                     static_cast<uint64_t>(sequence)}),
            [trace, sequence] {
              auto model = std::make_shared<BandwidthModel>();
              if (!trace) {
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }
              if (trace->n_steps(sequence) > 0) model->timeline = trace->timeline(sequence);
              if (!model->timeline || model->timeline->size() == 0) {
                model->absence =
                    "The trace holds no timed step yet: bandwidth is known for generated tokens.";
                return model;
              }
              const std::array<const std::vector<float>*, 2> columns = {&model->timeline->kv_read_mib,
                                                                        &model->timeline->kv_gibps};
              for (size_t i = 0; i < columns.size(); ++i) {
                const LinePyramid pyramid(*columns[i], model->timeline->first_step);
                model->lines[i] = pyramid.line(0, model->timeline->n_steps, kDrawnPixels);
                model->highest[i] = pyramid.highest();
              }
              model->counters = counters_absence(trace->reader());
              return model;
            }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const BandwidthModel&>(base);
    if (!model.counters.empty())
      cut_text(ui, "Measured DRAM bytes: none. " + model.counters + ".", ImGui::GetContentRegionAvail().x,
               true);
    const float height = (ImGui::GetContentRegionAvail().y - 2 * ImGui::GetTextLineHeightWithSpacing()) / 2;
    constexpr std::array<const char*, 2> kTitles = {"K and V bytes read by attention",
                                                    "rate while attention runs"};
    constexpr std::array<const char*, 2> kUnits = {"MiB a step", "GiB/s"};
    constexpr std::array<const char*, 2> kFrom = {
        "Tokens that attention saw x bytes of a token, whole model; not counted by hardware.",
        "The modelled bytes over the measured time of the attention phase (all sequences of the batch)."};
    for (size_t i = 0; i < kTitles.size(); ++i) {
      ImGui::PushID(static_cast<int>(i));
      ImGui::TextUnformatted(kTitles[i]);
      ImGui::SameLine();
      badge(ui, i == 0 ? Provenance::modelled : Provenance::derived, kFrom[i]);
      if (ImPlot::BeginPlot(
              "##rate", ImVec2(-1, std::max(height, ui.px(60))),
              ImPlotFlags_NoTitle | ImPlotFlags_NoFrame | ImPlotFlags_NoLegend | ImPlotFlags_NoMouseText)) {
        ImPlot::SetupAxis(ImAxis_X1, i == 1 ? "step" : nullptr, ImPlotAxisFlags_NoGridLines);
        ImPlot::SetupAxis(ImAxis_Y1, kUnits[i]);
        ImPlot::SetupAxisLimits(ImAxis_X1, 0, std::max(1, ui.n_steps), ImPlotCond_Once);
        ImPlot::SetupAxisLimits(ImAxis_Y1, 0, std::max(1e-6, 1.1 * static_cast<double>(model.highest[i])),
                                ImPlotCond_Once);
        round_ticks(ui, ImAxis_X1, 0, ui.n_steps, ImGui::GetContentRegionAvail().x - ui.px(60));
        ImPlot::SetupFinish();
        ImPlotSpec spec;
        spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[i == 0 ? 4 : 5]);
        spec.LineWeight = ui.px(1.4F);
        ImPlot::PlotLine("##line", model.lines[i].xs.data(), model.lines[i].ys.data(),
                         static_cast<int>(model.lines[i].xs.size()), spec);
        step_cursor(ui, true);
        pick_step(ui);
        ImPlot::EndPlot();
      }
      ImGui::PopID();
    }
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const BandwidthModel&>(base);
    Table table{{"step", "kv_read_mib_modelled", "kv_gibps_derived"}, {}};
    for (size_t i = 0; i < model.timeline->size(); ++i) {
      table.rows.push_back({std::to_string(model.timeline->first_step + static_cast<int>(i)),
                            fmt::format("{:.7g}", model.timeline->kv_read_mib[i]),
                            fmt::format("{:.7g}", model.timeline->kv_gibps[i])});
    }
    return table;
  }
};

}  // namespace

std::unique_ptr<Panel> make_bandwidth_panel() {
  return std::make_unique<BandwidthPanel>();
}

}  // namespace kvlapse::gui
