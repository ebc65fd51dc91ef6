// Kernels: what ran on the GPU, by name with statistics over the selected steps, and launch by launch as
// lanes of the current step, when activity was recorded.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/kernel_view.h"

namespace kvlapse::gui {
namespace {

constexpr int kMostLaunches = 4000;  // drawn
enum Range { kAllSteps, kSelectedRange, kThisStep };

struct KernelsModel final : DrawModel {
  KernelSummary summary;
  KernelLaunches launches;   // of the current step
  TimeSpan span;             // of the current step
  std::vector<int> streams;  // lanes
  int step = 0;
  std::string range;  // of the summary
};

DrawModelPtr prepare(const TraceSource& trace, const Selection& selection, int range) {
  auto model = std::make_shared<KernelsModel>();
  TimeSpan span;
  model->range = "all steps";
  if (range == kThisStep) {
    span = step_span(trace.reader(), selection.sequence, selection.step, selection.step + 1);
    model->range = fmt::format("step {}", selection.step);
  } else if (range == kSelectedRange && selection.has_range()) {
    span = step_span(trace.reader(), selection.sequence, selection.token_begin, selection.token_end);
    model->range = fmt::format("steps {} to {}", selection.token_begin, selection.token_end - 1);
  }
  model->summary = read_kernels(trace.reader(), span);
  model->absence = model->summary.rows.empty() && range == kAllSteps ? model->summary.absence : "";
  model->step = selection.step;
  model->span = step_span(trace.reader(), selection.sequence, selection.step, selection.step + 1);
  model->launches = read_launches(trace.reader(), model->span, kMostLaunches);
  for (const KernelLaunch& launch : model->launches.launches) {
    if (std::ranges::find(model->streams, launch.stream) == model->streams.end())
      model->streams.push_back(launch.stream);
  }
  std::ranges::sort(model->streams);
  return model;
}

class KernelsPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const auto trace = ui.trace;
    if (!trace) {
      return {1, [] {
                auto model = std::make_shared<KernelsModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    const Selection& selection = ui.selection;
    return {
        mix_key({reinterpret_cast<uintptr_t>(trace.get()), trace->version(), static_cast<uint64_t>(range_),
                 static_cast<uint64_t>(selection.sequence), static_cast<uint64_t>(selection.step),
                 static_cast<uint64_t>(selection.token_begin), static_cast<uint64_t>(selection.token_end)}),
        [trace, selection, range = range_] { return prepare(*trace, selection, range); }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const KernelsModel&>(base);
    choose("##range", range_, {"all steps", "selected range", "this step"}, ui.px(130));
    ImGui::SetItemTooltip("Which steps the table counts; shift+drag over the timeline selects a range");
    ImGui::SameLine();
    ImGui::SetNextItemWidth(ui.px(180));
    ImGui::InputTextWithHint("##find", "find a kernel", find_.data(), find_.size());
    ImGui::SameLine();
    badge(ui, Provenance::measured, "CUPTI activity records: start and end of each kernel on the device.");
    ImGui::SameLine();
    ImGui::TextDisabled("%s", model.range.c_str());
    // The table takes what its rows need, the lanes the rest, each at least a share.
    const float space = ImGui::GetContentRegionAvail().y;
    const float rows =
        ImGui::GetTextLineHeightWithSpacing() * (static_cast<float>(model.summary.rows.size()) + 1.6F) +
        ImGui::GetStyle().ScrollbarSize;
    const float most_lanes =
        ui.px(50) + ui.px(70) * static_cast<float>(std::max<size_t>(1, model.streams.size()));
    const float lanes = std::min(most_lanes, std::max(space * 0.4F, space - rows - ui.px(8)));
    draw_table(ui, model, std::max(ui.px(80), std::min(rows, space - lanes - ui.px(8))));
    draw_lanes(ui, model, lanes);
  }

  Table table(const DrawModel& base) const override {
    Table table{{"kernel", "launches", "total_ms", "mean_us", "min_us", "max_us", "modelled_bytes",
                 "dram_bytes", "bytes_ratio", "warps_percent"},
                {}};
    const auto known = [](double value) {
      return std::isnan(value) ? std::string() : fmt::format("{:.6g}", value);
    };
    for (const KernelRow& row : static_cast<const KernelsModel&>(base).summary.rows) {
      table.rows.push_back({row.name, std::to_string(row.launches), fmt::format("{:.6g}", row.total_ms),
                            fmt::format("{:.6g}", row.mean_us), fmt::format("{:.6g}", row.min_us),
                            fmt::format("{:.6g}", row.max_us), known(row.modelled_bytes),
                            known(row.dram_bytes), known(row.bytes_ratio), known(row.warps_percent)});
    }
    return table;
  }
  std::string sql(const Ui&) const override {
    return "SELECT s.value AS kernel, count(*) AS launches, sum(k.end - k.start) AS total_ns FROM "
           "CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName GROUP BY 1 ORDER BY 3 DESC";
  }

 private:
  bool shows(const std::string& name) const {
    return find_[0] == 0 || name.find(find_.data()) != std::string::npos;
  }

  // Of a kernel's launches in the lanes, and beside its name.
  static ImU32 colour_of(const Theme& theme, int name) {
    return theme.series[static_cast<size_t>(name) % theme.series.size()];
  }

  void draw_table(const Ui& ui, const KernelsModel& model, float height) {
    constexpr std::array<const char*, 9> kColumns = {"kernel",    "launches", "total, ms",
                                                     "mean, us",  "max, us",  "modelled each",
                                                     "DRAM each", "ratio",    "active warps"};
    constexpr std::array<const char*, 9> kTips = {
        "Short name of the kernel",
        "In the chosen steps",
        "Measured: sum of end - start",
        "Measured",
        "Measured",
        "Modelled: bytes that a launch should move through the GPU's memory",
        "Measured: DRAM bytes read and written by the launches that were counted (--counters kernels)",
        "DRAM bytes over modelled bytes of the same launches",
        "Measured: share of the peak, of the launches that were counted"};
    if (!ImGui::BeginTable("##kernels", static_cast<int>(kColumns.size()),
                           ImGuiTableFlags_RowBg | ImGuiTableFlags_ScrollY | ImGuiTableFlags_ScrollX |
                               ImGuiTableFlags_Resizable | ImGuiTableFlags_BordersInnerV |
                               ImGuiTableFlags_SizingFixedFit,
                           ImVec2(0, height)))
      return;
    ImGui::TableSetupScrollFreeze(1, 1);
    for (const char* column : kColumns) ImGui::TableSetupColumn(column);
    ImGui::TableNextRow(ImGuiTableRowFlags_Headers);
    for (size_t i = 0; i < kColumns.size(); ++i) {
      ImGui::TableSetColumnIndex(static_cast<int>(i));
      ImGui::TableHeader(kColumns[i]);
      ImGui::SetItemTooltip("%s", kTips[i]);
    }
    const auto bytes = [](double value) {
      return std::isnan(value) ? std::string("-") : format_bytes(value);
    };
    for (const KernelRow& row : model.summary.rows) {
      if (!shows(row.name)) continue;
      ImGui::TableNextRow();
      ImGui::TableNextColumn();
      const auto& names = model.launches.names;
      const float side = ImGui::GetTextLineHeight() * 0.7F;
      if (const auto found = std::ranges::find(names, row.name); found != names.end()) {
        const ImVec2 at = ImGui::GetCursorScreenPos();
        const float top = at.y + ImGui::GetTextLineHeight() * 0.15F;
        ImGui::GetWindowDrawList()->AddRectFilled(
            ImVec2(at.x, top), ImVec2(at.x + side, top + side),
            colour_of(ui.theme, static_cast<int>(found - names.begin())));
      }
      ImGui::Dummy(ImVec2(side, 1));  // none ran in this step: no colour
      ImGui::SameLine(0, ui.px(5));
      ImGui::TextUnformatted(row.name.c_str());
      for (const std::string& field :
           {std::to_string(row.launches), fmt::format("{:.3f}", row.total_ms),
            fmt::format("{:.2f}", row.mean_us), fmt::format("{:.2f}", row.max_us), bytes(row.modelled_bytes),
            bytes(row.dram_bytes), std::isnan(row.bytes_ratio) ? "-" : fmt::format("{:.3f}", row.bytes_ratio),
            std::isnan(row.warps_percent) ? "-" : fmt::format("{:.0f} %", row.warps_percent)}) {
        ImGui::TableNextColumn();
        ImGui::TextUnformatted(field.c_str());
      }
    }
    ImGui::EndTable();
    if (model.summary.rows.empty()) ImGui::TextDisabled("%s", model.summary.absence.c_str());
  }

  // Launches of the current step over time, a lane a stream.
  void draw_lanes(Ui& ui, const KernelsModel& model, float height) {
    if (model.launches.launches.empty()) {
      ImGui::TextDisabled("no kernel ran within step %d", model.step);
      return;
    }
    const double length_us = static_cast<double>(model.span.end_ns - model.span.begin_ns) * 1e-3;
    if (!ImPlot::BeginPlot(
            "##launches", ImVec2(-1, height),
            ImPlotFlags_NoTitle | ImPlotFlags_NoFrame | ImPlotFlags_NoLegend | ImPlotFlags_NoMouseText))
      return;
    const double n = static_cast<double>(model.streams.size());
    ImPlot::SetupAxis(ImAxis_X1, fmt::format("us since step {} began{}", model.step,
                                             model.launches.cut ? " (the first 4000 launches)" : "")
                                     .c_str());
    ImPlot::SetupAxis(ImAxis_Y1, "stream",
                      ImPlotAxisFlags_NoTickMarks | ImPlotAxisFlags_NoGridLines | ImPlotAxisFlags_Lock);
    std::vector<double> middles;
    std::vector<std::string> names;
    std::vector<const char*> labels;
    for (size_t i = 0; i < model.streams.size(); ++i) {
      middles.push_back(n - static_cast<double>(i) - 0.5);
      names.push_back(std::to_string(model.streams[i]));
    }
    for (const std::string& name : names) labels.push_back(name.c_str());
    ImPlot::SetupAxisTicks(ImAxis_Y1, middles.data(), static_cast<int>(middles.size()), labels.data());
    ImPlot::SetupAxisLimits(ImAxis_X1, 0, length_us,
                            shown_step_ == model.step ? ImPlotCond_Once : ImPlotCond_Always);
    ImPlot::SetupAxisLimits(ImAxis_Y1, 0, n, ImPlotCond_Always);
    shown_step_ = model.step;
    ImPlot::SetupFinish();
    ImDrawList* list = ImPlot::GetPlotDrawList();
    ImPlot::PushPlotClipRect();
    const ImVec2 mouse = ImGui::GetMousePos();
    float drawn_to = -1e9F;  // launches narrower than three pixels fold into one bar
    for (const KernelLaunch& launch : model.launches.launches) {
      const std::string& name = model.launches.names[static_cast<size_t>(launch.name)];
      if (!shows(name)) continue;
      const double lane =
          static_cast<double>(std::ranges::find(model.streams, launch.stream) - model.streams.begin());
      const double begin = static_cast<double>(launch.start_ns - model.span.begin_ns) * 1e-3,
                   end = static_cast<double>(launch.end_ns - model.span.begin_ns) * 1e-3;
      ImVec2 low = ImPlot::PlotToPixels(begin, n - lane - 0.1),
             high = ImPlot::PlotToPixels(end, n - lane - 0.9);
      if (high.x - low.x < ui.px(3)) {
        if (low.x < drawn_to && model.streams.size() == 1) continue;
        high.x = low.x + ui.px(3);
        drawn_to = high.x;
      }
      const ImU32 fill = colour_of(ui.theme, launch.name);
      list->AddRectFilled(low, high, fill);
      if (ImGui::CalcTextSize(name.c_str()).x + ui.px(6) < high.x - low.x)
        list->AddText(ImVec2(low.x + ui.px(3), (low.y + high.y - ImGui::GetTextLineHeight()) / 2),
                      Theme::ink_on(fill), name.c_str());
      if (ImPlot::IsPlotHovered() && mouse.x >= low.x && mouse.x < high.x && mouse.y >= low.y &&
          mouse.y < high.y && ImGui::BeginTooltip()) {
        ImGui::TextUnformatted(name.c_str());
        ImGui::Text("%.2f us, from %.2f us on", end - begin, begin);
        if (launch.layer >= 0) ImGui::Text("layer %d", launch.layer);
        ImGui::Text("stream %d", launch.stream);
        if (!std::isnan(launch.modelled_bytes))
          ImGui::Text("%s modelled, %.0f GB/s", format_bytes(launch.modelled_bytes).c_str(),
                      launch.modelled_bytes / std::max(1e-3, end - begin) * 1e-3);
        ImGui::EndTooltip();
      }
    }
    ImPlot::PopPlotClipRect();
    ImPlot::EndPlot();
  }

  std::array<char, 128> find_{};
  int range_ = kAllSteps, shown_step_ = -1;
};

}  // namespace

std::unique_ptr<Panel> make_kernels_panel() {
  return std::make_unique<KernelsPanel>();
}

}  // namespace kvlapse::gui
