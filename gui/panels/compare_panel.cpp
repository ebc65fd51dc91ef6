// Compare: policy x budget from open results files, open loop and closed loop apart, as a table and as a
// trade-off plot.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <map>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "replay/comparison.h"
#include "replay/knee.h"

namespace kvlapse::gui {
namespace {

enum Quality { kRecall, kError, kTopK, kAccuracy };
constexpr std::array<const char*, 4> kQualityNames = {"recall", "output error", "top-10 recall",
                                                      "accuracy (closed loop)"};

struct PolicyLine {
  std::string policy;
  bool bound = false;  // random with the prompt, or an oracle
  std::vector<double> xs, recall, error, topk;
  std::array<int, 3> knee = {-1, -1, -1};  // of recall, error, topk
};
struct Front {
  std::vector<double> xs, ys;
};
struct CompareModel final : DrawModel {
  std::vector<ComparedRow> rows;  // open loop
  std::vector<EvalRow> evals;     // closed loop
  std::vector<PolicyLine> lines;
  std::map<std::string, std::pair<std::vector<double>, std::vector<std::array<double, 3>>>>
      accuracy;                 // mean, low, high
  std::array<Front, 3> fronts;  // of recall, error, topk; bounds do not count
  double most_mib = 0;
  std::string missing;    // bounds that no row is of, as a list of policies; "": both are there
  std::string budgets;    // of the rows, as a list
  bool of_trace = false;  // rows are of the shown trace, and it holds what a replay needs
};

constexpr const char* kLowerBound = "random:pin_prompt=1";
constexpr const char* kUpperBound = "oracle_mass";

// The null model that an informed policy must beat, and the best that eviction could do.
void find_bounds(const Results& results, TraceSource* trace, CompareModel& model) {
  const auto has = [&](std::string_view prefix) {
    return std::ranges::any_of(model.lines,
                               [&](const PolicyLine& line) { return line.policy.starts_with(prefix); });
  };
  for (const auto& [policy, prefix] : {std::pair{kLowerBound, kLowerBound}, {kUpperBound, "oracle_"}}) {
    if (!model.rows.empty() && !has(prefix))
      model.missing += fmt::format("{}{}", model.missing.empty() ? "" : ",", policy);
  }
  if (model.missing.empty()) return;
  for (const ComparedRow& row : model.rows) {
    if (row.policy != "full" && ("," + model.budgets + ",").find("," + row.budget + ",") == std::string::npos)
      model.budgets += fmt::format("{}{}", model.budgets.empty() ? "" : ",", row.budget);
  }
  if (trace == nullptr || trace->reader().header().tier != TraceTier::qkv || model.budgets.empty()) return;
  const std::string hash = trace->reader().content_hash();
  model.of_trace =
      std::ranges::all_of(results.traces, [&](const ResultTrace& of) { return of.hash == hash; });
}

DrawModelPtr prepare(const std::vector<std::filesystem::path>& files,
                     const std::shared_ptr<TraceSource>& trace) {
  auto model = std::make_shared<CompareModel>();
  if (files.empty()) {
    model->absence =
        "No results are open. Open a .kvr file, run a What if, or make one: kvlapse replay run.kvl --policy "
        "longflow,rkv,random:pin_prompt=1,oracle_topb --budget 10%,25%,50% -o run.kvr";
    return model;
  }
  Results all;  // of every file: equal cells count once
  for (const auto& file : files) {
    Results results = read_results(file);
    if (!results.complete)
      model->notes.push_back(fmt::format("{}: not finished yet", file.filename().string()));
    for (ResultTrace& of : results.traces) {
      if (std::ranges::find(all.traces, of.hash, &ResultTrace::hash) == all.traces.end())
        all.traces.push_back(std::move(of));
    }
    for (ResultCell& cell : results.cells) {
      if (std::ranges::find(all.cells, cell.id, &ResultCell::id) == all.cells.end())
        all.cells.push_back(std::move(cell));
    }
    model->evals.insert(model->evals.end(), results.evals.begin(), results.evals.end());
  }
  model->rows = compare(all);
  if (all.traces.size() > 1) model->notes.push_back(fmt::format("means over {} traces", all.traces.size()));
  if (model->rows.empty() && model->evals.empty()) model->absence = "The open results hold no row yet.";
  std::map<std::string, std::vector<const ComparedRow*>> by_policy;
  for (const ComparedRow& row : model->rows) by_policy[row.policy].push_back(&row);
  std::array<Front, 3> points;
  for (auto& [policy, rows] : by_policy) {
    PolicyLine line{.policy = policy,
                    .bound = policy.starts_with("oracle") || policy.starts_with("random"),
                    .xs = {},
                    .recall = {},
                    .error = {},
                    .topk = {}};
    std::ranges::stable_sort(rows, {},
                             [](const ComparedRow* row) { return value_of(row->means, "kv_bytes_peak"); });
    for (const ComparedRow* row : rows) {
      line.xs.push_back(value_of(row->means, "kv_bytes_peak") / (1 << 20));
      line.recall.push_back(row->recall.value.mean);
      line.error.push_back(row->output_error.value.mean);
      line.topk.push_back(value_of(row->means, "topk_recall"));
      model->most_mib = std::max(model->most_mib, line.xs.back());
    }
    line.knee = {find_knee(line.xs, line.recall, true), find_knee(line.xs, line.error, false),
                 find_knee(line.xs, line.topk, true)};
    for (size_t i = 0; i < points.size() && !line.bound; ++i) {
      const std::vector<double>& ys = i == 0 ? line.recall : i == 1 ? line.error : line.topk;
      points[i].xs.insert(points[i].xs.end(), line.xs.begin(), line.xs.end());
      points[i].ys.insert(points[i].ys.end(), ys.begin(), ys.end());
    }
    model->lines.push_back(std::move(line));
  }
  for (size_t i = 0; i < points.size(); ++i) {
    for (const int at : find_front(points[i].xs, points[i].ys, i != 1)) {
      model->fronts[i].xs.push_back(points[i].xs[static_cast<size_t>(at)]);
      model->fronts[i].ys.push_back(points[i].ys[static_cast<size_t>(at)]);
    }
  }
  for (const EvalRow& row : model->evals) {
    auto& [xs, ys] = model->accuracy[row.policy];
    xs.push_back(row.budget_slots);
    ys.push_back({row.accuracy, row.ci95_low, row.ci95_high});
  }
  find_bounds(all, trace.get(), *model);
  return model;
}

class ComparePanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const std::vector<std::filesystem::path> files = ui.document.results();
    return {
        mix_key({ui.document.version(), files.size(), static_cast<uint64_t>(ui.what_if_runner.finished())}),
        [files, trace = ui.trace] { return prepare(files, trace); }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const CompareModel&>(base);
    choose("##quality", quality_, {kQualityNames.begin(), kQualityNames.end()}, ui.px(180));
    ImGui::SameLine();
    badge(ui, Provenance::derived,
          quality_ == kAccuracy
              ? "Closed loop: the policy really evicted while generating; share of right answers with a 95 % "
                "interval."
              : "Open loop: replayed over the recorded q, k and v; mean over steps and query heads.");
    same_line_if_fits(ui.px(300));
    ImGui::AlignTextToFramePadding();
    cut_text(
        ui,
        quality_ == kAccuracy
            ? "closed loop: evicted while generating; bars: 95 %"
            : "open loop: recorded q, k, v; ring: knee (of three budgets or more); broad line: Pareto front",
        ImGui::GetContentRegionAvail().x, true);
    if (quality_ != kAccuracy && !model.missing.empty()) draw_missing_bounds(ui, model);
    if (draw_plot(ui, model)) draw_rows(ui, model);
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const CompareModel&>(base);
    Table table{{"loop", "policy", "budget", "budget_tokens", "samples", "recall", "output_error",
                 "kv_bytes_peak", "accuracy", "ci95_low", "ci95_high"},
                {}};
    for (const ComparedRow& row : model.rows) {
      table.rows.push_back({"open", row.policy, row.budget, std::to_string(row.budget_slots),
                            std::to_string(row.n_samples), fmt::format("{:.7g}", row.recall.value.mean),
                            fmt::format("{:.7g}", row.output_error.value.mean),
                            fmt::format("{:.0f}", value_of(row.means, "kv_bytes_peak")), "", "", ""});
    }
    for (const EvalRow& row : model.evals) {
      table.rows.push_back({"closed", row.policy, row.budget, std::to_string(row.budget_slots),
                            std::to_string(row.n), "", "", "", fmt::format("{:.7g}", row.accuracy),
                            fmt::format("{:.7g}", row.ci95_low), fmt::format("{:.7g}", row.ci95_high)});
    }
    return table;
  }

  std::string state() const override { return std::to_string(quality_); }
  void set_state(std::string_view text) override {
    quality_ =
        std::clamp(std::atoi(std::string(text).c_str()), 0, static_cast<int>(kQualityNames.size()) - 1);
  }

  std::optional<Figure> figure(const Ui&, const DrawModel& base) const override {
    const auto& model = static_cast<const CompareModel&>(base);
    const Theme light = make_theme(ThemeKind::light);
    Figure figure{.title = fmt::format("{} against footprint (open loop)",
                                       kQualityNames[static_cast<size_t>(std::min(quality_, 2))]),
                  .x_label = "peak K and V, MiB",
                  .y_label = kQualityNames[static_cast<size_t>(std::min(quality_, 2))],
                  .x_min = 0,
                  .x_max = model.most_mib * 1.05,
                  .y_min = 0,
                  .y_max = 1.02,
                  .y_down = false,
                  .images = {},
                  .series = {}};
    size_t colour = 0;
    for (const PolicyLine& line : model.lines) {
      figure.series.push_back(
          {line.policy, line.xs, values(line), light.series[colour % light.series.size()], true});
      figure.series.push_back(
          {line.policy, line.xs, values(line), light.series[colour++ % light.series.size()], false});
    }
    return figure;
  }

 private:
  const std::vector<double>& values(const PolicyLine& line) const {
    return quality_ == kError ? line.error : quality_ == kTopK ? line.topk : line.recall;
  }

  // Random with the prompt pinned and an oracle stand in every comparison; one click adds what is missing.
  static void draw_missing_bounds(Ui& ui, const CompareModel& model) {
    WhatIf& runner = ui.what_if_runner;
    if (model.of_trace && runner.running()) {
      ImGui::ProgressBar(static_cast<float>(runner.progress()), ImVec2(ui.px(160), 0),
                         fmt::format("{:.0f} %", runner.progress() * 100).c_str());
      ImGui::SameLine();
      if (ImGui::Button("Cancel")) runner.cancel();
    } else if (model.of_trace && ImGui::Button("Add the missing bounds")) {
      runner.start(ui.trace->file(), {model.missing, model.budgets}, false);
    }
    if (model.of_trace) ImGui::SameLine();
    ImGui::AlignTextToFramePadding();
    cut_text(
        ui,
        fmt::format("missing: {}; or kvlapse replay {} --policy {} --budget {} -o bounds.kvr", model.missing,
                    model.of_trace ? ui.trace->name() : "TRACE.kvl", model.missing, model.budgets),
        ImGui::GetContentRegionAvail().x, true);
  }

  // False where there is nothing to list either.
  bool draw_plot(Ui& ui, const CompareModel& model) {
    const bool closed = quality_ == kAccuracy;
    if (closed ? model.evals.empty() : model.rows.empty()) {
      draw_absence(
          ui, closed ? "No closed-loop rows are open" : "No open-loop rows are open",
          closed
              ? "Accuracy needs runs that really evict while they generate: kvlapse eval --task sort --n 32 "
                "--policy longflow,rkv --budget 256,512 -o evals.kvr, then open evals.kvr here."
              : "Recall and output error need a replay of a recording: kvlapse replay run.kvl --policy "
                "longflow,rkv --budget 10%,25% -o run.kvr, then open run.kvr here.");
      return false;
    }
    const float height = std::max(ui.px(150), ImGui::GetContentRegionAvail().y * 0.55F);
    // Room around the outermost points, so that their markers are drawn whole.
    ImPlot::PushStyleVar(ImPlotStyleVar_FitPadding, ImVec2(0.03F, 0.06F));
    if (!ImPlot::BeginPlot("##tradeoff", ImVec2(-1, height), ImPlotFlags_NoTitle | ImPlotFlags_NoFrame)) {
      ImPlot::PopStyleVar();
      return true;
    }
    ImPlot::SetupAxes(closed ? "budget, tokens a kv head" : "peak K and V, MiB",
                      kQualityNames[static_cast<size_t>(quality_)],
                      ImPlotAxisFlags_AutoFit | ImPlotAxisFlags_NoGridLines, ImPlotAxisFlags_AutoFit);
    if (quality_ != kError) ImPlot::SetupAxisLimitsConstraints(ImAxis_Y1, -0.02, 1.04);
    // Where curves of this kind leave room; intervals leave none.
    ImPlot::SetupLegend(closed               ? ImPlotLocation_East
                        : quality_ == kError ? ImPlotLocation_NorthEast
                                             : ImPlotLocation_SouthEast,
                        closed ? ImPlotLegendFlags_Outside : ImPlotLegendFlags_None);
    ImPlot::SetupFinish();
    size_t index = 0;
    // Bounds are grey, so that the policies keep the colours.
    const auto style = [&](bool bound, bool upper) {
      ImPlotSpec spec;
      const ImU32 colour = upper   ? ui.theme.text
                           : bound ? ui.theme.muted
                                   : ui.theme.series[index % (ui.theme.series.size() - 1)];
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(colour);
      spec.LineWeight = ui.px(bound ? 1.2F : 1.8F);
      spec.Marker = static_cast<ImPlotMarker>(ImPlotMarker_Circle + static_cast<int>(index % 6));
      spec.MarkerSize = ui.px(4);
      spec.MarkerFillColor = spec.MarkerLineColor = spec.LineColor;
      if (!bound) ++index;
      return spec;
    };
    if (closed) {
      double widest = 1;
      for (const auto& [policy, points] : model.accuracy)
        for (const double x : points.first) widest = std::max(widest, x);
      // Equal budgets stand a little apart, so that no interval hides another one.
      double apart = 0;
      for (const auto& [policy, points] : model.accuracy) {
        std::vector<double> xs, mean, low, high;
        for (const double x : points.first) xs.push_back(x + apart);
        for (const auto& [m, l, h] : points.second)
          mean.push_back(m), low.push_back(m - l), high.push_back(h - m);
        const bool bound = policy.starts_with("random");
        if (policy == "full") {  // has no budget
          ImPlotSpec spec;
          spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.text);
          spec.LineWeight = ui.px(1.2F);
          spec.Flags = ImPlotInfLinesFlags_Horizontal;
          ImPlot::PlotInfLines("bound: full, nothing evicted", mean.data(), static_cast<int>(mean.size()),
                               spec);
          continue;
        }
        const ImPlotSpec spec = style(bound, false);
        const std::string name = (bound ? "bound: " : "") + policy;
        ImPlot::PlotErrorBars(name.c_str(), xs.data(), mean.data(), low.data(), high.data(),
                              static_cast<int>(mean.size()), spec);
        ImPlot::PlotLine(name.c_str(), xs.data(), mean.data(), static_cast<int>(mean.size()), spec);
        apart += widest * 0.008;
      }
    } else {
      if (const Front& front = model.fronts[static_cast<size_t>(quality_)]; front.xs.size() > 1) {
        ImPlotSpec spec;
        spec.LineColor = ImGui::ColorConvertU32ToFloat4(Theme::with_alpha(ui.theme.text, 0.18F));
        spec.LineWeight = ui.px(7);
        ImPlot::PlotLine("Pareto front", front.xs.data(), front.ys.data(), static_cast<int>(front.xs.size()),
                         spec);
      }
      for (const PolicyLine& line : model.lines) {
        const bool upper = line.policy.starts_with("oracle");
        ImPlotSpec spec = style(line.bound, upper);
        if (line.bound) spec.Marker = upper ? ImPlotMarker_Up : ImPlotMarker_Down;
        const std::string name = (line.bound ? "bound: " : "") + line.policy;
        ImPlot::PlotLine(name.c_str(), line.xs.data(), values(line).data(), static_cast<int>(line.xs.size()),
                         spec);
        if (const int knee = line.knee[static_cast<size_t>(quality_)]; knee >= 0 && !line.bound) {
          const ImVec2 at = ImPlot::PlotToPixels(line.xs[static_cast<size_t>(knee)],
                                                 values(line)[static_cast<size_t>(knee)]);
          ImPlot::GetPlotDrawList()->AddCircle(at, ui.px(8), ui.theme.text, 0, ui.px(1.5F));
        }
      }
    }
    ImPlot::EndPlot();
    ImPlot::PopStyleVar();
    return true;
  }

  void draw_rows(Ui& ui, const CompareModel& model) {
    const bool closed = quality_ == kAccuracy;
    const std::vector<const char*> columns =
        closed ? std::vector<const char*>{"policy",   "task",          "budget",      "right",
                                          "accuracy", "95 % interval", "tokens, mean"}
               : std::vector<const char*>{"policy",       "budget",    "tokens",   "recall",
                                          "output error", "peak K, V", "evictions"};
    if (!ImGui::BeginTable("##rows", static_cast<int>(columns.size()),
                           ImGuiTableFlags_RowBg | ImGuiTableFlags_ScrollY | ImGuiTableFlags_Resizable |
                               ImGuiTableFlags_BordersInnerV | ImGuiTableFlags_SizingStretchProp))
      return;
    ImGui::TableSetupScrollFreeze(0, 1);
    for (const char* column : columns) ImGui::TableSetupColumn(column);
    ImGui::TableHeadersRow();
    const auto cell = [](const std::string& text) {
      ImGui::TableNextColumn();
      ImGui::TextUnformatted(text.c_str());
    };
    if (closed) {
      for (const EvalRow& row : model.evals) {
        ImGui::TableNextRow();
        cell(row.policy), cell(row.task), cell(row.budget), cell(fmt::format("{} of {}", row.correct, row.n)),
            cell(fmt::format("{:.3f}", row.accuracy));
        cell(fmt::format("{:.3f} to {:.3f}", row.ci95_low, row.ci95_high)),
            cell(format_count(row.tokens_mean));
      }
    } else {
      for (const ComparedRow& row : model.rows) {
        ImGui::TableNextRow();
        ImGui::TableNextColumn();
        const std::string label = fmt::format("{}##{}", row.policy, row.budget);
        const bool chosen = ui.what_if.policy == row.policy && ui.what_if.budget == row.budget;
        if (ImGui::Selectable(label.c_str(), chosen, ImGuiSelectableFlags_SpanAllColumns))
          ui.what_if = {row.policy, row.budget};
        ImGui::SetItemTooltip("Show this one in Token lives");
        cell(row.budget), cell(std::to_string(row.budget_slots));
        cell(fmt::format("{:.4f}{}", row.recall.value.mean,
                         row.recall.best       ? "  best"
                         : row.recall.in_noise ? "  ~"
                                               : ""));
        cell(fmt::format("{:.4f}{}", row.output_error.value.mean,
                         row.output_error.best       ? "  best"
                         : row.output_error.in_noise ? "  ~"
                                                     : ""));
        cell(format_bytes(value_of(row.means, "kv_bytes_peak"))),
            cell(format_count(value_of(row.means, "evictions")));
      }
    }
    ImGui::EndTable();
  }

  int quality_ = kRecall;
};

}  // namespace

std::unique_ptr<Panel> make_compare_panel() {
  return std::make_unique<ComparePanel>();
}

}  // namespace kvlapse::gui
