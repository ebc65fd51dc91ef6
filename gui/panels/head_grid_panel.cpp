// Heads: layers x kv heads at the current step, as a grid or as a sorted list.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "trace/views/outliers.h"

namespace kvlapse::gui {
namespace {

enum Metric { kHeldTokens, kEvicted, kEntropy, kRecall, kError };
constexpr std::array<const char*, 5> kMetricNames = {"held tokens", "evicted so far", "entropy (nats)",
                                                     "recall", "output error"};
constexpr std::array<const char*, 5> kMetricFrom = {
    "Tokens held after the step, per kv head (occupancy chunks of the trace).",
    "Tokens seen minus tokens held.",
    "Entropy of the head's attention at this step, mean over the group (tier sketch).",
    "Attention mass of the held tokens: recorded at this step (tier sketch), otherwise the mean over all "
    "steps of a "
    "replay (open results).",
    "Relative error of the head's output, mean over all steps and the group's query heads, of a replay (open "
    "results) "
    "under the policy chosen in Compare or What if, or the recording's own."};

struct GridModel final : DrawModel {
  HeadStates states;
  int metric = kHeldTokens;
  std::vector<float> values;  // [L][H], NaN: unknown
  std::vector<char> outlier;  // [L][H]
  std::vector<int> order;     // cells by value, largest first
  float low = 0, high = 1;
  std::string replayed;  // policy and budget of the values, when they are of a replay
};

struct GridParams {
  std::shared_ptr<TraceSource> trace;
  int sequence = 0, step = 0, metric = kHeldTokens;
  std::shared_ptr<QualitySource> quality;
  std::vector<std::filesystem::path> results;
  WhatIfChoice what_if;
};

DrawModelPtr prepare(const GridParams& params) {
  TraceSource& trace = *params.trace;
  const int sequence = params.sequence, step = params.step, metric = params.metric;
  auto model = std::make_shared<GridModel>();
  model->metric = metric;
  if (trace.n_steps(sequence) == 0) {
    model->absence =
        "The trace holds no step yet. When it is being recorded, heads appear here as steps are written.";
    return model;
  }
  model->states = read_head_states(trace.reader(), sequence, step);
  const HeadStates& states = model->states;
  const auto known = [](int32_t count) { return count < 0 ? NAN : static_cast<float>(count); };
  for (size_t i = 0; i < states.held.size(); ++i) {
    model->values.push_back(metric == kHeldTokens ? known(states.held[i])
                            : metric == kEvicted  ? known(states.evicted[i])
                            : metric == kEntropy  ? states.entropy[i]
                            : metric == kRecall   ? states.recall[i]
                                                  : NAN);
  }
  const auto unknown = [](float value) { return std::isnan(value); };
  std::string why;
  if (metric >= kRecall && std::ranges::all_of(model->values, unknown)) {
    const QualityAnswer answer = params.quality->find(trace, params.results, params.what_if);
    why = answer.why;
    if (answer.quality) {
      model->values = metric == kRecall ? answer.quality->head_recall : answer.quality->head_error;
      model->replayed = fmt::format("{} at {}, all steps", answer.quality->policy, answer.quality->budget);
    }
  }
  if (std::ranges::all_of(model->values, unknown)) {
    if (metric == kEntropy) {
      model->absence = fmt::format("No entropy at step {}: {}", step,
                                   trace.reader().header().tier == TraceTier::sketch
                                       ? "this step has no sketch (prompt tokens have none)."
                                       : "it is recorded by --tier sketch only.");
    } else {
      model->absence = fmt::format("No {} here: {}.", kMetricNames[static_cast<size_t>(metric)], why);
    }
  }
  model->outlier = find_outliers(model->values);
  model->order.resize(model->values.size());
  for (size_t i = 0; i < model->order.size(); ++i) model->order[i] = static_cast<int>(i);
  std::ranges::stable_sort(model->order, [&](int a, int b) {
    return std::isnan(model->values[static_cast<size_t>(b)]) ||
           model->values[static_cast<size_t>(a)] > model->values[static_cast<size_t>(b)];
  });
  model->low = INFINITY, model->high = -INFINITY;
  for (float value : model->values) {
    if (!std::isnan(value))
      model->low = std::min(model->low, value), model->high = std::max(model->high, value);
  }
  if (!states.lost_layers.empty())
    model->notes.push_back(
        fmt::format("{} layers cannot be read at this step: damaged chunks (first: layer {})",
                    states.lost_layers.size(), states.lost_layers.front()));
  return model;
}

class HeadGridPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<GridModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    GridParams params{.trace = ui.trace,
                      .sequence = ui.selection.sequence,
                      .step = ui.selection.step,
                      .metric = metric_,
                      .quality = ui.quality,
                      .results = ui.document.results(),
                      .what_if = ui.what_if};
    const uint64_t key = mix_key(
        {reinterpret_cast<uintptr_t>(ui.trace.get()), ui.trace->version(),
         static_cast<uint64_t>(params.sequence), static_cast<uint64_t>(params.step),
         static_cast<uint64_t>(metric_),
         metric_ >= kRecall ? mix_key({ui.results_version(),
                                       std::hash<std::string>{}(ui.what_if.policy + " " + ui.what_if.budget)})
                            : 0});
    return {key, [params] { return prepare(params); }};
  }

  void controls(Ui& ui) override {
    choose("##metric", metric_, {kMetricNames.begin(), kMetricNames.end()}, ui.px(130));
    ImGui::SameLine();
    choose("##form", form_, {"grid", "list"}, ui.px(64));
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const GridModel&>(base);
    same_line_if_fits(ui.px(70));
    badge(ui,
          model.metric == kEvicted   ? Provenance::derived
          : !model.replayed.empty()  ? Provenance::derived
          : model.metric >= kEntropy ? Provenance::sampled
                                     : Provenance::measured,
          kMetricFrom[static_cast<size_t>(model.metric)]);
    if (!model.replayed.empty()) cut_text(ui, model.replayed, ImGui::GetContentRegionAvail().x, true);
    if (form_ == 1) {
      draw_list(ui, model);
    } else {
      if (model.low >= model.high) {
        ImGui::TextDisabled("%s: %s %s", kMetricNames[static_cast<size_t>(model.metric)],
                            format_count(static_cast<double>(model.low)).c_str(),
                            model.states.lost_layers.empty() ? "everywhere" : "wherever it can be read");
      } else {
        ramp_legend(ui, *ui.theme.sequential, format_count(static_cast<double>(model.low)).c_str(),
                    format_count(static_cast<double>(model.high)).c_str(),
                    kMetricNames[static_cast<size_t>(model.metric)], ui.px(60));
      }
      draw_grid(ui, model);
    }
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const GridModel&>(base);
    Table table{{"step", "layer", "kv_head", "held_tokens", "evicted_tokens", "entropy_nats", "recall"}, {}};
    if (!model.replayed.empty())
      table.columns.emplace_back(model.metric == kError ? "output_error" : "replayed_recall");
    const HeadStates& states = model.states;
    const auto number = [](float value) {
      return std::isnan(value) ? std::string() : fmt::format("{:.7g}", value);
    };
    for (size_t i = 0; i < states.held.size(); ++i) {
      table.rows.push_back(
          {std::to_string(states.step), std::to_string(i / static_cast<size_t>(states.n_kv_heads)),
           std::to_string(i % static_cast<size_t>(states.n_kv_heads)), std::to_string(states.held[i]),
           std::to_string(states.evicted[i]), number(states.entropy[i]), number(states.recall[i])});
      if (!model.replayed.empty()) table.rows.back().push_back(number(model.values[i]));
    }
    return table;
  }

  std::string sql(const Ui& ui) const override {
    return fmt::format("SELECT layer, kv_head, held FROM kv_occupancy WHERE sequence = {} AND step = {}",
                       ui.selection.sequence, ui.selection.step);
  }
  std::string state() const override { return fmt::format("{} {}", metric_, form_); }
  void set_state(std::string_view text) override {
    std::sscanf(std::string(text).c_str(), "%d %d", &metric_, &form_);
    metric_ = std::clamp(metric_, 0, 4), form_ = std::clamp(form_, 0, 1);
  }

 private:
  static void tooltip(const GridModel& model, int layer, int head) {
    const size_t cell = static_cast<size_t>(layer) * model.states.n_kv_heads + head;
    ImGui::Text("layer %d, kv head %d, step %d", layer, head, model.states.step);
    ImGui::Text("held: %d tokens", model.states.held[cell]);
    ImGui::Text("evicted so far: %d tokens", model.states.evicted[cell]);
    if (!std::isnan(model.states.entropy[cell]))
      ImGui::Text("entropy: %.3f nats", static_cast<double>(model.states.entropy[cell]));
    if (!std::isnan(model.states.recall[cell]))
      ImGui::Text("recall: %.4f", static_cast<double>(model.states.recall[cell]));
    if (!model.replayed.empty() && !std::isnan(model.values[cell]))
      ImGui::Text("%s: %.4f (%s)", kMetricNames[static_cast<size_t>(model.metric)],
                  static_cast<double>(model.values[cell]), model.replayed.c_str());
    if (model.outlier[cell] != 0)
      ImGui::TextDisabled("outlier: more than 3.5 robust deviations from the median");
  }

  void draw_grid(Ui& ui, const GridModel& model) {
    const int rows = model.states.n_layers, columns = model.states.n_kv_heads;
    const float gutter = ImGui::CalcTextSize("layer 00").x + ui.px(6),
                header = ImGui::GetTextLineHeight() + ui.px(4);
    const ImVec2 space = ImGui::GetContentRegionAvail();
    const float cell_w =
        std::max(ui.px(8), std::min((space.x - gutter) / static_cast<float>(columns), ui.px(90)));
    const float cell_h =
        std::max(ui.px(7), std::min((space.y - header) / static_cast<float>(rows), ui.px(40)));
    ImGui::BeginChild("##grid", ImVec2(0, 0), ImGuiChildFlags_None, ImGuiWindowFlags_HorizontalScrollbar);
    const ImVec2 origin = ImGui::GetCursorScreenPos();
    ImDrawList* list = ImGui::GetWindowDrawList();
    const int every_column = std::max(1, static_cast<int>(std::ceil(ImGui::CalcTextSize("00 ").x / cell_w)));
    list->AddText(origin, ui.theme.muted, "kv head");
    for (int head = 0; head < columns; head += every_column) {
      const std::string name = std::to_string(head);
      const float x = origin.x + gutter + cell_w * (static_cast<float>(head) + 0.5F) -
                      ImGui::CalcTextSize(name.c_str()).x / 2;
      list->AddText(ImVec2(x, origin.y), ui.theme.muted, name.c_str());
    }
    const int every_row = std::max(1, static_cast<int>(std::ceil(ImGui::GetTextLineHeight() / cell_h)));
    const float range = std::max(model.high - model.low, 1e-9F), gap = std::min(ui.px(1), cell_h / 8);
    ImVec2 selected_low, selected_high;
    const bool writes = cell_h >= ImGui::GetTextLineHeight() && cell_w >= ui.px(40);
    for (int layer = 0; layer < rows; ++layer) {
      const float y = origin.y + header + cell_h * static_cast<float>(layer);
      if (layer % every_row == 0)
        list->AddText(ImVec2(origin.x, y + std::max(0.0F, (cell_h - ImGui::GetTextLineHeight()) / 2)),
                      ui.theme.muted, fmt::format("layer {}", layer).c_str());
      for (int head = 0; head < columns; ++head) {
        const size_t cell = static_cast<size_t>(layer) * columns + head;
        const ImVec2 low(origin.x + gutter + cell_w * static_cast<float>(head), y),
            high(low.x + cell_w - gap, low.y + cell_h - gap);
        const float value = model.values[cell];
        const ImU32 fill = std::isnan(value)        ? ui.theme.map_evicted
                           : model.high > model.low ? ui.theme.ramp((value - model.low) / range)
                                                    : ui.theme.ramp(0.5F);
        list->AddRectFilled(low, high, fill);
        if (writes && !std::isnan(value)) {
          const std::string text = format_count(static_cast<double>(value));
          const ImVec2 size = ImGui::CalcTextSize(text.c_str());
          if (size.x < cell_w)
            list->AddText(ImVec2((low.x + high.x - size.x) / 2, (low.y + high.y - size.y) / 2),
                          Theme::ink_on(fill), text.c_str());
        }
        if (model.outlier[cell] != 0)
          list->AddTriangleFilled(ImVec2(high.x - ui.px(7), low.y), ImVec2(high.x, low.y),
                                  ImVec2(high.x, low.y + ui.px(7)), ui.theme.bad);
        if (layer == ui.selection.layer && head == ui.selection.kv_head)
          selected_low = low, selected_high = high;
      }
    }
    outline(ui, list, selected_low, selected_high, ui.px(2));  // over its neighbours
    ImGui::SetCursorScreenPos(ImVec2(origin.x + gutter, origin.y + header));
    const ImVec2 area(cell_w * static_cast<float>(columns), cell_h * static_cast<float>(rows));
    ImGui::InvisibleButton("##cells", area);
    if (ImGui::IsItemHovered() || ImGui::IsItemActive()) {
      const ImVec2 mouse = ImGui::GetMousePos();
      const int head = static_cast<int>((mouse.x - origin.x - gutter) / cell_w),
                layer = static_cast<int>((mouse.y - origin.y - header) / cell_h);
      if (head >= 0 && head < columns && layer >= 0 && layer < rows) {
        if (ImGui::IsItemActive()) ui.select_head(layer, head);
        if (ImGui::IsItemHovered() && ImGui::BeginTooltip()) {
          tooltip(model, layer, head);
          ImGui::EndTooltip();
        }
      }
    }
    ImGui::EndChild();
  }

  void draw_list(Ui& ui, const GridModel& model) {
    if (!ImGui::BeginTable("##heads", 4,
                           ImGuiTableFlags_RowBg | ImGuiTableFlags_ScrollY | ImGuiTableFlags_BordersInnerV |
                               ImGuiTableFlags_SizingStretchProp))
      return;
    ImGui::TableSetupScrollFreeze(0, 1);
    for (const char* column : {"layer", "kv head", kMetricNames[static_cast<size_t>(model.metric)], ""})
      ImGui::TableSetupColumn(column);
    ImGui::TableHeadersRow();
    ImGuiListClipper clipper;
    clipper.Begin(static_cast<int>(model.order.size()));
    while (clipper.Step()) {
      for (int i = clipper.DisplayStart; i < clipper.DisplayEnd; ++i) {
        const int cell = model.order[static_cast<size_t>(i)], layer = cell / model.states.n_kv_heads,
                  head = cell % model.states.n_kv_heads;
        ImGui::TableNextRow();
        ImGui::TableNextColumn();
        if (ImGui::Selectable(fmt::format("{}##{}", layer, cell).c_str(),
                              layer == ui.selection.layer && head == ui.selection.kv_head,
                              ImGuiSelectableFlags_SpanAllColumns))
          ui.select_head(layer, head);
        ImGui::TableNextColumn();
        ImGui::Text("%d", head);
        ImGui::TableNextColumn();
        ImGui::TextUnformatted(
            format_count(static_cast<double>(model.values[static_cast<size_t>(cell)])).c_str());
        ImGui::TableNextColumn();
        if (model.outlier[static_cast<size_t>(cell)] != 0) ImGui::TextUnformatted("outlier");
      }
    }
    ImGui::EndTable();
  }

  int metric_ = kHeldTokens, form_ = 0;
};

}  // namespace

std::unique_ptr<Panel> make_head_grid_panel() {
  return std::make_unique<HeadGridPanel>();
}

}  // namespace kvlapse::gui
