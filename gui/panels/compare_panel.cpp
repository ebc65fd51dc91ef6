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
struct CompareModel final : DrawModel {
  std::vector<ComparedRow> rows;  // open loop
  std::vector<EvalRow> evals;     // closed loop
  std::vector<PolicyLine> lines;
  std::map<std::string, std::pair<std::vector<double>, std::vector<std::array<double, 3>>>>
      accuracy;  // mean, low, high
  double most_mib = 0;
};

DrawModelPtr prepare(const std::vector<std::filesystem::path>& files) {
  auto model = std::make_shared<CompareModel>();
  if (files.empty()) {
    model->absence =
        "No results are open. Open a .kvr file, run a What if, or make one: kvlapse replay run.kvl --policy "
        "longflow,rkv,random:pin_prompt=1,oracle_topb --budget 10%,25%,50% -o run.kvr";
    return model;
  }
  for (const auto& file : files) {
    const Results results = read_results(file);
    const std::vector<ComparedRow> rows = compare(results);
    model->rows.insert(model->rows.end(), rows.begin(), rows.end());
    model->evals.insert(model->evals.end(), results.evals.begin(), results.evals.end());
    if (!results.complete)
      model->notes.push_back(fmt::format("{}: not finished yet", file.filename().string()));
  }
  if (model->rows.empty() && model->evals.empty()) model->absence = "The open results hold no row yet.";
  std::map<std::string, PolicyLine> lines;
  for (const ComparedRow& row : model->rows) {
    PolicyLine& line = lines[row.policy];
    line.policy = row.policy;
    line.bound = row.policy.starts_with("oracle") || row.policy.starts_with("random");
    line.xs.push_back(value_of(row.means, "kv_bytes_peak") / (1 << 20));
    line.recall.push_back(row.recall.value.mean);
    line.error.push_back(row.output_error.value.mean);
    line.topk.push_back(value_of(row.means, "topk_recall"));
    model->most_mib = std::max(model->most_mib, line.xs.back());
  }
  for (auto& [name, line] : lines) {
    line.knee = {find_knee(line.xs, line.recall, true), find_knee(line.xs, line.error, false),
                 find_knee(line.xs, line.topk, true)};
    model->lines.push_back(line);
  }
  for (const EvalRow& row : model->evals) {
    auto& [xs, ys] = model->accuracy[row.policy];
    xs.push_back(row.budget_slots);
    ys.push_back({row.accuracy, row.ci95_low, row.ci95_high});
  }
  const auto has = [&](const char* prefix) {
    return std::ranges::any_of(model->lines,
                               [&](const PolicyLine& line) { return line.policy.starts_with(prefix); });
  };
  // The null model that an informed policy must beat, and the best that eviction could do.
  for (const auto& [policy, bound] : {std::pair{"random:pin_prompt=1", "lower"}, {"oracle_", "upper"}}) {
    if (model->rows.empty() || has(policy)) continue;
    model->notes.push_back(fmt::format("The {} bound is missing: add {} to the sweep.", bound,
                                       bound[0] == 'u' ? "oracle_mass" : policy));
  }
  return model;
}

class ComparePanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const std::vector<std::filesystem::path> files = ui.document.results();
    return {
        mix_key({ui.document.version(), files.size(), static_cast<uint64_t>(ui.what_if_runner.finished())}),
        [files] { return prepare(files); }};
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
    ImGui::TextDisabled(quality_ == kAccuracy
                            ? "closed loop: evicted while generating"
                            : "open loop: recorded q, k, v; a ring marks each policy's knee");
    draw_plot(ui, model);
    draw_rows(ui, model);
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

  void draw_plot(Ui& ui, const CompareModel& model) {
    const bool closed = quality_ == kAccuracy;
    if (closed ? model.evals.empty() : model.rows.empty()) {
      ImGui::TextDisabled(
          closed ? "No closed-loop rows are open: kvlapse eval --task ... -o evals.kvr makes them."
                 : "No open-loop rows are open.");
      return;
    }
    const float height = std::max(ui.px(150), ImGui::GetContentRegionAvail().y * 0.55F);
    // Room around the outermost points, so that their markers are drawn whole.
    ImPlot::PushStyleVar(ImPlotStyleVar_FitPadding, ImVec2(0.03F, 0.06F));
    if (!ImPlot::BeginPlot("##tradeoff", ImVec2(-1, height), ImPlotFlags_NoTitle | ImPlotFlags_NoFrame)) {
      ImPlot::PopStyleVar();
      return;
    }
    ImPlot::SetupAxes(closed ? "budget, tokens a kv head" : "peak K and V, MiB",
                      kQualityNames[static_cast<size_t>(quality_)],
                      ImPlotAxisFlags_AutoFit | ImPlotAxisFlags_NoGridLines, ImPlotAxisFlags_AutoFit);
    ImPlot::SetupLegend(ImPlotLocation_SouthEast);
    ImPlot::SetupFinish();
    size_t index = 0;
    const auto style = [&](bool bound) {
      ImPlotSpec spec;
      const ImU32 colour = bound ? ui.theme.muted : ui.theme.series[index % ui.theme.series.size()];
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(colour);
      spec.LineWeight = ui.px(bound ? 1.2F : 1.8F);
      spec.Marker = static_cast<ImPlotMarker>(ImPlotMarker_Circle + static_cast<int>(index % 6));
      spec.MarkerSize = ui.px(4);
      spec.MarkerFillColor = spec.MarkerLineColor = spec.LineColor;
      ++index;
      return spec;
    };
    if (closed) {
      for (const auto& [policy, points] : model.accuracy) {
        std::vector<double> mean, low, high;
        for (const auto& [m, l, h] : points.second)
          mean.push_back(m), low.push_back(m - l), high.push_back(h - m);
        const ImPlotSpec spec = style(policy.starts_with("random"));
        ImPlot::PlotErrorBars(policy.c_str(), points.first.data(), mean.data(), low.data(), high.data(),
                              static_cast<int>(mean.size()), spec);
        ImPlot::PlotLine(policy.c_str(), points.first.data(), mean.data(), static_cast<int>(mean.size()),
                         spec);
      }
    } else {
      for (const PolicyLine& line : model.lines) {
        const ImPlotSpec spec = style(line.bound);
        ImPlot::PlotLine(line.policy.c_str(), line.xs.data(), values(line).data(),
                         static_cast<int>(line.xs.size()), spec);
        if (const int knee = line.knee[static_cast<size_t>(quality_)]; knee >= 0 && !line.bound) {
          const ImVec2 at = ImPlot::PlotToPixels(line.xs[static_cast<size_t>(knee)],
                                                 values(line)[static_cast<size_t>(knee)]);
          ImPlot::GetPlotDrawList()->AddCircle(at, ui.px(8), ui.theme.text, 0, ui.px(1.5F));
        }
      }
    }
    ImPlot::EndPlot();
    ImPlot::PopStyleVar();
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
