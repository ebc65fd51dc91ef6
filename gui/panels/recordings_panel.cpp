// Two recordings beside each other, aligned by token: the first divergence, tokens held over the common axis,
// how much the keep sets of the selected kv head have in common, and both texts in step.
#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "gui/draw/line_pyramid.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/recording_pair.h"

namespace kvlapse::gui {
namespace {

constexpr int kOverlapPoints = 200;
constexpr int kDrawnPixels = 1200;

struct RecordingsModel final : DrawModel {
  std::string name_a, name_b, policy_a, policy_b;
  TokenAlignment alignment;
  std::shared_ptr<const std::vector<std::string>> texts_a, texts_b;
  DrawnLine held_a, held_b;
  float most_held = 1;
  double letters = 1;                          // of a token, mean
  std::vector<double> overlap_steps, overlap;  // Jaccard of the selected head's keep sets
  KeepDifference kept;                         // at the current step
  int step = 0, layer = 0, kv_head = 0;
  bool heads_fit = true;  // both recordings have the selected head
};

DrawModelPtr prepare(const std::vector<std::shared_ptr<TraceSource>>& traces, size_t primary, int other,
                     const Selection& selection) {
  auto model = std::make_shared<RecordingsModel>();
  if (traces.size() < 2) {
    model->absence =
        "One recording is open. Open a second one (Ctrl+O, or drop it here), best of the same prompt: "
        "kvlapse record "
        "--teacher FIRST.kvl records the same tokens under another policy.";
    return model;
  }
  TraceSource& a = *traces[primary];
  TraceSource& b = *traces[static_cast<size_t>(other)];
  model->name_a = a.name(), model->name_b = b.name();
  model->policy_a = a.reader().header().policy.spec, model->policy_b = b.reader().header().policy.spec;
  const int sequence = selection.sequence;
  if (a.n_steps(sequence) == 0 || b.n_steps(sequence) == 0) {
    model->absence = "One of the two recordings holds no step yet.";
    return model;
  }
  const auto tokens_a = a.sequence(sequence), tokens_b = b.sequence(sequence);
  model->alignment = align_tokens(tokens_a->tokens, tokens_b->tokens);
  model->texts_a = a.token_texts(sequence), model->texts_b = b.token_texts(sequence);
  const auto held = [&](TraceSource& trace) {
    const auto timeline = trace.timeline(sequence);
    const LinePyramid pyramid(timeline->held_tokens, timeline->first_step);
    model->most_held = std::max(model->most_held, pyramid.highest());
    return pyramid.line(0, std::max(model->alignment.n_a, model->alignment.n_b), kDrawnPixels);
  };
  size_t letters = 0;
  for (const std::string& text : *model->texts_a) letters += visible_token(text).size();
  model->letters = std::max(
      1.0, static_cast<double>(letters) / static_cast<double>(std::max<size_t>(1, model->texts_a->size())));
  model->held_a = held(a), model->held_b = held(b);
  model->step = selection.step, model->layer = selection.layer, model->kv_head = selection.kv_head;
  const CacheGeometry& geometry_b = b.reader().header().geometry;
  model->heads_fit = selection.layer < geometry_b.n_layers && selection.kv_head < geometry_b.n_kv_heads;
  if (model->heads_fit) {
    const auto life_a = a.layer_life(sequence, selection.layer),
               life_b = b.layer_life(sequence, selection.layer);
    const auto kept_a = life_a->evicted(selection.kv_head), kept_b = life_b->evicted(selection.kv_head);
    const int common = std::min({model->alignment.n_common, life_a->n_steps, life_b->n_steps});
    model->kept = compare_kept(kept_a, kept_b, common, std::min(selection.step, common - 1));
    const int every = std::max(1, common / kOverlapPoints);
    for (int step = every - 1; step < common; step += every) {
      model->overlap_steps.push_back(step);
      model->overlap.push_back(compare_kept(kept_a, kept_b, common, step).jaccard());
    }
  }
  return model;
}

class RecordingsPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const std::vector<std::shared_ptr<TraceSource>> traces = ui.document.traces();
    const size_t primary = ui.document.primary();
    if (other_ < 0 || other_ >= static_cast<int>(traces.size()) || other_ == static_cast<int>(primary))
      other_ = primary == 0 ? 1 : 0;
    const Selection& selection = ui.selection;
    return {
        mix_key({ui.document.version(), traces.size(), primary, static_cast<uint64_t>(other_),
                 static_cast<uint64_t>(selection.sequence), static_cast<uint64_t>(selection.step),
                 static_cast<uint64_t>(selection.layer), static_cast<uint64_t>(selection.kv_head)}),
        [traces, primary, other = other_, selection] { return prepare(traces, primary, other, selection); }};
  }

  void controls(Ui& ui) override {
    const auto& traces = ui.document.traces();
    if (traces.size() < 3) return;
    std::vector<std::string> names;
    std::vector<const char*> labels;
    for (const auto& trace : traces) names.push_back(trace->name());
    for (const std::string& name : names) labels.push_back(name.c_str());
    choose("beside the first", other_, labels, ui.px(200));
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const RecordingsModel&>(base);
    const TokenAlignment& alignment = model.alignment;
    key(ui, 0, fmt::format("{} ({})", model.name_a, model.policy_a));
    key(ui, 1, fmt::format("{} ({})", model.name_b, model.policy_b));
    if (alignment.first_divergence >= 0) {
      ImGui::AlignTextToFramePadding();
      ImGui::Text("The first %d tokens are the same; token %d differs.", alignment.n_common,
                  alignment.first_divergence);
      ImGui::SameLine();
      if (ImGui::Button("Go there")) ui.select_step(alignment.first_divergence);
    } else {
      ImGui::Text(alignment.n_a == alignment.n_b
                      ? "All %d tokens are the same."
                      : "The %d common tokens are the same; one recording is longer.",
                  alignment.n_common);
    }
    draw_plot(ui, model, "tokens a kv head", true);
    if (model.heads_fit) {
      ImGui::Text("Keep sets of layer %d, kv head %d after step %d: both %d, first only %d, second only %d",
                  model.layer, model.kv_head, std::min(model.step, alignment.n_common - 1), model.kept.both,
                  model.kept.only_a, model.kept.only_b);
      ImGui::SameLine();
      badge(ui, Provenance::derived, "From the eviction records of both, over the common tokens.");
      draw_plot(ui, model, "share in common", false);
    } else {
      ImGui::TextDisabled("The second recording has no layer %d, kv head %d: another model.", model.layer,
                          model.kv_head);
    }
    draw_texts(ui, model);
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const RecordingsModel&>(base);
    Table table{{"step", "keep_sets_in_common_jaccard"}, {}};
    for (size_t i = 0; i < model.overlap.size(); ++i)
      table.rows.push_back(
          {fmt::format("{:.0f}", model.overlap_steps[i]), fmt::format("{:.6f}", model.overlap[i])});
    return table;
  }

 private:
  static void key(const Ui& ui, size_t series, const std::string& text) {
    const ImVec2 at = ImGui::GetCursorScreenPos();
    const float side = ImGui::GetTextLineHeight() * 0.7F, top = at.y + ImGui::GetTextLineHeight() * 0.15F;
    ImGui::GetWindowDrawList()->AddRectFilled(ImVec2(at.x, top), ImVec2(at.x + side, top + side),
                                              ui.theme.series[series]);
    ImGui::Dummy(ImVec2(side, ImGui::GetTextLineHeight()));
    ImGui::SameLine();
    cut_text(ui, text, ImGui::GetContentRegionAvail().x);
  }

  void draw_plot(Ui& ui, const RecordingsModel& model, const char* unit, bool held) {
    const float height = std::max(ui.px(80), ImGui::GetContentRegionAvail().y * (held ? 0.27F : 0.32F));
    ImGui::PushID(unit);
    if (ImPlot::BeginPlot(
            "##plot", ImVec2(-1, height),
            ImPlotFlags_NoTitle | ImPlotFlags_NoFrame | ImPlotFlags_NoLegend | ImPlotFlags_NoMouseText)) {
      const int n = std::max(model.alignment.n_a, model.alignment.n_b);
      ImPlot::SetupAxis(ImAxis_X1, held ? nullptr : "step", ImPlotAxisFlags_NoGridLines);
      ImPlot::SetupAxis(ImAxis_Y1, unit, ImPlotAxisFlags_None);
      ImPlot::SetupAxisLimits(ImAxis_X1, 0, n, ImPlotCond_Once);
      ImPlot::SetupAxisLimits(ImAxis_Y1, 0, held ? 1.08 * static_cast<double>(model.most_held) : 1.05,
                              ImPlotCond_Always);
      round_ticks(ui, ImAxis_X1, 0, n, ImGui::GetContentRegionAvail().x - ui.px(60));
      ImPlot::SetupFinish();
      const auto line = [&](const char* name, size_t series, const auto& xs, const auto& ys) {
        ImPlotSpec spec;
        spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[series]);
        spec.LineWeight = ui.px(1.6F);
        ImPlot::PlotLine(name, xs.data(), ys.data(), static_cast<int>(xs.size()), spec);
      };
      if (held) {
        line("first", 0, model.held_a.xs, model.held_a.ys);
        line("second", 1, model.held_b.xs, model.held_b.ys);
      } else {
        line("overlap", 2, model.overlap_steps, model.overlap);
      }
      if (model.alignment.first_divergence >= 0) {
        const ImVec2 low = ImPlot::PlotToPixels(model.alignment.first_divergence, 0.0);
        const ImVec2 area = ImPlot::GetPlotPos(), size = ImPlot::GetPlotSize();
        ImPlot::PushPlotClipRect();
        ImPlot::GetPlotDrawList()->AddLine(ImVec2(low.x, area.y), ImVec2(low.x, area.y + size.y),
                                           ui.theme.bad, ui.px(1.5F));
        if (held)
          ImPlot::GetPlotDrawList()->AddText(ImVec2(low.x + ui.px(4), area.y + ui.px(2)), ui.theme.bad,
                                             "first divergence");
        ImPlot::PopPlotClipRect();
      }
      step_cursor(ui, false);
      pick_step(ui);
      ImPlot::EndPlot();
    }
    ImGui::PopID();
  }

  // Lines of the same positions beside each other; what differs is underlined in the warning colour.
  void draw_texts(Ui& ui, const RecordingsModel& model) {
    if (!ImGui::BeginTable("##texts", 3,
                           ImGuiTableFlags_ScrollY | ImGuiTableFlags_RowBg | ImGuiTableFlags_BordersInnerV))
      return;
    ImGui::TableSetupScrollFreeze(0, 1);
    ImGui::TableSetupColumn("position", ImGuiTableColumnFlags_WidthFixed, ImGui::CalcTextSize("position ").x);
    ImGui::TableSetupColumn(model.name_a.c_str(), ImGuiTableColumnFlags_WidthStretch);
    ImGui::TableSetupColumn(model.name_b.c_str(), ImGuiTableColumnFlags_WidthStretch);
    ImGui::TableHeadersRow();
    const int n = std::max(model.alignment.n_a, model.alignment.n_b);
    ImGui::PushFont(ui.fonts.mono, 0);
    const double column = static_cast<double>(ImGui::GetContentRegionAvail().x),  // of the last column
        letter = static_cast<double>(ImGui::CalcTextSize("M").x);
    ImGui::PopFont();
    // Lines of equally many tokens, so that both sides stay in step; a tenth of room for longer ones.
    const int per_line = std::clamp(static_cast<int>(0.9 * column / (model.letters * letter)), 4, 512);
    ImGuiListClipper clipper;
    clipper.Begin((n + per_line - 1) / per_line);
    while (clipper.Step()) {
      for (int line = clipper.DisplayStart; line < clipper.DisplayEnd; ++line) {
        ImGui::TableNextRow();
        ImGui::TableNextColumn();
        ImGui::TextDisabled("%d", line * per_line);
        for (const auto* texts : {model.texts_a.get(), model.texts_b.get()}) {
          ImGui::TableNextColumn();
          draw_tokens(ui, model, *texts, line * per_line, per_line);
        }
      }
    }
    const float visible = ImGui::GetWindowHeight();
    if (clipper.ItemsHeight > 0 && (scrolled_to_ != model.step || scrolled_in_ != visible)) {
      scrolled_to_ = model.step, scrolled_in_ = visible;
      ImGui::SetScrollY(
          std::max(0.0F, static_cast<float>(model.step / per_line) * clipper.ItemsHeight - visible / 2));
    }
    ImGui::EndTable();
  }

  static void draw_tokens(Ui& ui, const RecordingsModel& model, const std::vector<std::string>& texts,
                          int first, int count) {
    ImGui::PushFont(ui.fonts.mono, 0);
    ImDrawList* list = ImGui::GetWindowDrawList();
    ImVec2 at = ImGui::GetCursorScreenPos(), selected_low, selected_high;
    const float height = ImGui::GetTextLineHeight();
    for (int pos = first; pos < first + count && pos < static_cast<int>(texts.size()); ++pos) {
      const std::string text = visible_token(texts[static_cast<size_t>(pos)]);
      const ImVec2 size = ImGui::CalcTextSize(text.c_str());
      const bool differs = pos >= model.alignment.n_common;
      if (pos == model.step) selected_low = at, selected_high = ImVec2(at.x + size.x, at.y + height);
      list->AddText(at, differs ? ui.theme.warning : ui.theme.text, text.c_str());
      if (pos == model.alignment.first_divergence)
        list->AddRectFilled(ImVec2(at.x, at.y + height - ui.px(2)), ImVec2(at.x + size.x, at.y + height),
                            ui.theme.bad);
      at.x += size.x;
    }
    if (selected_high.x > 0) outline(ui, list, selected_low, selected_high, ui.px(1.5F));
    ImGui::Dummy(ImVec2(1, height));
    ImGui::PopFont();
  }

  int other_ = -1, scrolled_to_ = -1;
  float scrolled_in_ = 0;
};

}  // namespace

std::unique_ptr<Panel> make_recordings_panel() {
  return std::make_unique<RecordingsPanel>();
}

}  // namespace kvlapse::gui
