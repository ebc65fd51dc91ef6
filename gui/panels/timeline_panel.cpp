// Timeline: the whole generation as lanes over the step, with the transport that plays it.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <mutex>
#include <utility>

#include "gui/draw/line_pyramid.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/falls.h"
#include "trace/views/kernel_view.h"
#include "trace/views/lane_top.h"

namespace kvlapse::gui {
namespace {

struct LaneKind {
  const char* name;
  const char* unit;
  Provenance provenance;
  const char* from;
  std::vector<float> Timeline::*column;  // null: filled in otherwise
};
enum Lane { kHeld, kEvicted, kRecall, kStepTime, kAttention, kRead, kRate, kDram, kLanes };
const std::array<LaneKind, kLanes>& lane_kinds() {
  static const std::array<LaneKind, kLanes> kinds = {{
      {"held", "tokens / kv head", Provenance::measured,
       "Tokens held after each step, mean over layers and kv heads (KV_STEP.held_tokens).",
       &Timeline::held_tokens},
      {"evicted", "tokens / step", Provenance::measured,
       "Tokens evicted by each step, all layers and kv heads (KV_STEP.evicted_tokens).",
       &Timeline::evicted_tokens},
      {"recall", "of attention mass", Provenance::derived,
       "Attention mass of the held tokens over that of all: from a replay of this trace (open results), mean "
       "over "
       "layers and query heads; or recorded for the selected layer (tier sketch).",
       nullptr},
      {"step time", "ms", Provenance::measured, "Wall time of the whole batch's step (KV_STEP.total_ns).",
       &Timeline::step_ms},
      {"attention", "share of step", Provenance::measured,
       "Time of the attention phase over the step's time.", &Timeline::attention_share},
      {"K, V read", "MiB / step", Provenance::modelled,
       "Bytes of K and V that attention must read: tokens seen x bytes of a token; not counted by hardware.",
       &Timeline::kv_read_mib},
      {"K, V rate", "GiB / s", Provenance::derived, "Modelled bytes over the measured attention time.",
       &Timeline::kv_gibps},
      {"DRAM", "MiB / step", Provenance::sampled,
       "Bytes read from and written to the GPU's memory, from hardware samples, by the time of each step.",
       nullptr},
  }};
  return kinds;
}

struct LaneData {
  std::vector<float> values;
  LinePyramid pyramid;
  std::string absence;  // why there is no line
  float top = 1;        // of the lane; rare peaks above it are cut, the highest value is written beside
  Provenance provenance = Provenance::measured;
  void set(std::vector<float> line, int first_step) {
    values = std::move(line);
    pyramid = LinePyramid(values, first_step);
    top = lane_top(values);
  }
  bool cuts() const { return pyramid.highest() > top; }
};
// Of one version of a trace's timeline.
struct Lanes {
  std::shared_ptr<const Timeline> timeline;
  std::array<LaneData, kLanes> lanes;  // kRecall is empty
  std::vector<int> counted;            // steps whose kernels were counted
};
struct RecallLane {
  LaneData lane;
  std::vector<int> falls;  // steps
};

struct TimelineModel final : DrawModel {
  std::shared_ptr<const Lanes> lanes;
  std::shared_ptr<const RecallLane> recall;  // null: still being read
  double x_min = 0, x_max = 1;
  std::array<DrawnLine, kLanes> lines;
  const LaneData& lane(int index) const {
    static const LaneData reading{.values = {}, .pyramid = {}, .absence = "reading ..."};
    if (index != kRecall) return lanes->lanes[static_cast<size_t>(index)];
    return recall ? recall->lane : reading;
  }
};

struct LanesCache {
  std::mutex mutex;
  uint64_t key = 0, recall_key = 0, recall_asked = 0;
  std::shared_ptr<const Lanes> lanes;
  std::shared_ptr<const RecallLane> recall;
};

struct TimelineParams {
  std::shared_ptr<TraceSource> trace;
  int sequence = 0, layer = 0, width = 0;
  double x_min = 0, x_max = 1;
  uint64_t version_key = 0, recall_key = 0;
  std::shared_ptr<QualitySource> quality;
  std::vector<std::filesystem::path> results;
  WhatIfChoice what_if;
};

std::shared_ptr<const Lanes> read_lanes(TraceSource& trace, int sequence) {
  auto lanes = std::make_shared<Lanes>();
  lanes->timeline = trace.timeline(sequence);
  const Timeline& timeline = *lanes->timeline;
  const std::map<std::string, std::string> meta = trace.reader().meta();
  const auto from = meta.find("imported_file");
  for (size_t i = 0; i < kLanes; ++i) {
    LaneData& lane = lanes->lanes[i];
    lane.provenance = lane_kinds()[i].provenance;
    if (lane_kinds()[i].column == nullptr) continue;
    lane.set(timeline.*lane_kinds()[i].column, timeline.first_step);
    if (lane.values.empty())
      lane.absence = from == meta.end() ? "no step is recorded yet"
                                        : fmt::format("imported from {}, which knows no steps", from->second);
  }
  DramTimeline dram = read_dram(trace.reader(), sequence);
  lanes->lanes[kDram].absence = dram.absence;
  if (dram.absence.empty()) lanes->lanes[kDram].set(std::move(dram.mib), timeline.first_step);
  lanes->counted = counted_steps(trace.reader(), sequence);
  return lanes;
}

// Recorded recall of one layer, mean over its kv heads; empty where the trace does not know it.
std::vector<float> recorded_recall(const TraceSource& trace, const Timeline& timeline, int sequence,
                                   int layer) {
  const TraceReader& reader = trace.reader();
  if (!reader.header().has_sketch(layer)) return {};
  const int n_heads = reader.header().geometry.n_kv_heads;
  std::vector<float> means(timeline.size(), NAN);
  bool known = false;
  for (int begin = timeline.first_step; begin < timeline.n_steps; begin += 8 * kChunkSteps) {
    int first = 0;
    const std::vector<SketchRow> rows =
        reader.sketches(sequence, layer, begin, begin + 8 * kChunkSteps, &first);
    for (size_t i = 0; i + static_cast<size_t>(n_heads) <= rows.size(); i += static_cast<size_t>(n_heads)) {
      float sum = 0;
      for (int head = 0; head < n_heads; ++head) sum += rows[i + static_cast<size_t>(head)].recall;
      const size_t at = static_cast<size_t>(first - timeline.first_step) + i / static_cast<size_t>(n_heads);
      if (at < means.size()) means[at] = sum / static_cast<float>(n_heads);
      known |= !std::isnan(sum);
    }
  }
  return known ? means : std::vector<float>{};
}

std::shared_ptr<const RecallLane> read_recall(const TimelineParams& params, const Timeline& timeline) {
  auto recall = std::make_shared<RecallLane>();
  LaneData& lane = recall->lane;
  std::vector<float> values;
  if (params.what_if.policy.empty())
    values = recorded_recall(*params.trace, timeline, params.sequence, params.layer);
  lane.provenance = values.empty() ? Provenance::derived : Provenance::sampled;
  if (values.empty()) {
    const QualityAnswer answer = params.quality->find(*params.trace, params.results, params.what_if);
    lane.absence = answer.why;
    if (answer.quality && !answer.quality->recall.empty()) {
      const std::vector<float>& bins = answer.quality->recall;
      for (size_t i = 0; i < timeline.size(); ++i) {
        const size_t step = static_cast<size_t>(timeline.first_step) + i;
        values.push_back(
            bins[std::min(step * bins.size() / static_cast<size_t>(timeline.n_steps), bins.size() - 1)]);
      }
    }
  }
  if (values.empty()) return recall;
  lane.set(std::move(values), timeline.first_step);
  const int window = std::max(8, static_cast<int>(timeline.size()) / 100);
  for (const Fall& fall : find_falls(lane.values, window, 8))
    recall->falls.push_back(timeline.first_step + fall.index);
  return recall;
}

DrawModelPtr prepare(const TimelineParams& params, LanesCache& cache) {
  auto model = std::make_shared<TimelineModel>();
  if (params.trace->n_steps(params.sequence) == 0) {
    model->absence =
        "The trace holds no step yet. When it is being recorded, steps appear here as they are written.";
    return model;
  }
  bool recall_asked = false;
  {
    const std::scoped_lock lock(cache.mutex);
    if (cache.key == params.version_key) model->lanes = cache.lanes;
    if (cache.recall_key == params.recall_key) model->recall = cache.recall;
    recall_asked = std::exchange(cache.recall_asked, params.recall_key) == params.recall_key;
  }
  if (!model->lanes) {
    model->lanes = read_lanes(*params.trace, params.sequence);
    const std::scoped_lock lock(cache.mutex);
    cache.key = params.version_key;
    cache.lanes = model->lanes;
  }
  // Recall may take long to read: the other lanes are shown first.
  if (!model->recall && recall_asked) {
    model->recall = read_recall(params, *model->lanes->timeline);
    const std::scoped_lock lock(cache.mutex);
    cache.recall_key = params.recall_key;
    cache.recall = model->recall;
  }
  model->partial = !model->recall;
  model->x_min = params.x_min, model->x_max = params.x_max;
  for (int i = 0; i < kLanes; ++i)
    model->lines[static_cast<size_t>(i)] =
        model->lane(i).pyramid.line(params.x_min, params.x_max, params.width);
  return model;
}

class TimelinePanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<TimelineModel>();
                model->absence =
                    "No trace is open. Open a .kvl file with Ctrl+O, drop one here, or record one: kvlapse "
                    "record -o run.kvl";
                return model;
              }};
    }
    if (trace_ != ui.trace.get()) {
      trace_ = ui.trace.get();
      whole_ = true;
    }
    if (whole_) x_min_ = 0, x_max_ = std::max(1, ui.n_steps);
    TimelineParams params{.trace = ui.trace,
                          .sequence = ui.selection.sequence,
                          .layer = ui.selection.layer,
                          .width = width_,
                          .x_min = x_min_,
                          .x_max = x_max_,
                          .quality = ui.quality,
                          .results = ui.document.results(),
                          .what_if = ui.what_if};
    params.version_key = mix_key({reinterpret_cast<uintptr_t>(trace_), ui.trace->version(),
                                  static_cast<uint64_t>(ui.selection.sequence)});
    const TraceHeader& header = ui.trace->reader().header();
    params.recall_key =
        mix_key({params.version_key, ui.results_version(),
                 std::hash<std::string>{}(ui.what_if.policy + " " + ui.what_if.budget),
                 header.has_sketch(ui.selection.layer) ? static_cast<uint64_t>(ui.selection.layer) + 1 : 0});
    const uint64_t key = mix_key({params.version_key, params.recall_key, std::bit_cast<uint64_t>(x_min_),
                                  std::bit_cast<uint64_t>(x_max_), static_cast<uint64_t>(width_)});
    return {key, [params, cache = cache_] { return prepare(params, *cache); }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const TimelineModel&>(base);
    draw_transport(ui, model);
    const float gutter = ui.px(176), strip = ui.px(20), axis = ImGui::GetTextLineHeight() + ui.px(12);
    const float space = ImGui::GetContentRegionAvail().y;
    // As many lanes as are legible; the rest by scrolling.
    const float least = ui.px(34);
    const int n_lanes = static_cast<int>(lane_kinds().size());
    const int fitting = std::clamp(static_cast<int>((space - strip - axis - ui.px(8)) / least), 1, n_lanes);
    const float lane_height =
        std::max(least, (space - strip - axis - ui.px(8)) / static_cast<float>(fitting));
    draw_strip(ui, model, gutter, strip);
    ImGui::PushStyleVar(ImGuiStyleVar_ItemSpacing, ImVec2(0, ui.px(1)));
    if (ImGui::BeginChild("##lanes", ImVec2(0, 0), ImGuiChildFlags_None,
                          ImGuiWindowFlags_AlwaysVerticalScrollbar)) {
      for (int i = 0; i < n_lanes; ++i)
        draw_lane(ui, model, i, gutter, lane_height + (i == fitting - 1 ? axis : 0), i == fitting - 1);
    }
    ImGui::EndChild();
    ImGui::PopStyleVar();
  }

  Table table(const DrawModel& base) const override {
    const Timeline& timeline = *static_cast<const TimelineModel&>(base).lanes->timeline;
    const auto& model = static_cast<const TimelineModel&>(base);
    Table table{{"step"}, {}};
    for (const LaneKind& kind : lane_kinds())
      table.columns.push_back(fmt::format("{} ({})", kind.name, kind.unit));
    for (size_t i = 0; i < timeline.size(); ++i) {
      std::vector<std::string> row{std::to_string(timeline.first_step + static_cast<int>(i))};
      for (int lane = 0; lane < kLanes; ++lane) {
        const std::vector<float>& values = model.lane(lane).values;
        row.push_back(i < values.size() && !std::isnan(values[i]) ? fmt::format("{:.7g}", values[i]) : "");
      }
      table.rows.push_back(std::move(row));
    }
    return table;
  }

  std::optional<Figure> figure(const Ui& ui, const DrawModel& base) const override {
    const auto& model = static_cast<const TimelineModel&>(base);
    const LinePyramid& held = model.lane(kHeld).pyramid;
    Figure figure{.title = "Tokens held",
                  .x_label = "step",
                  .y_label = "tokens a kv head",
                  .x_min = model.x_min,
                  .x_max = model.x_max,
                  .y_min = 0,
                  .y_max = std::max(1.0, 1.05 * static_cast<double>(held.highest())),
                  .y_down = false,
                  .images = {},
                  .series = {}};
    FigureSeries series{.name = ui.trace ? ui.trace->reader().header().policy.spec : "",
                        .xs = {},
                        .ys = {},
                        .colour = make_theme(ThemeKind::light).series[0],
                        .line = true};
    series.xs.assign(model.lines[0].xs.begin(), model.lines[0].xs.end());
    series.ys.assign(model.lines[0].ys.begin(), model.lines[0].ys.end());
    figure.series.push_back(std::move(series));
    return figure;
  }

  std::string sql(const Ui& ui) const override {
    return fmt::format(
        "SELECT step, held_tokens, evicted_tokens, total_ns, attention_ns, evict_ns FROM KV_STEP WHERE "
        "sequence = {} ORDER BY step",
        ui.selection.sequence);
  }

 private:
  void draw_transport(Ui& ui, const TimelineModel& model) {
    Playback& play = ui.playback;
    const auto jump = [&](const char* label, int by, const char* tip) {
      if (ImGui::Button(label)) play.playing = false, ui.select_step(ui.selection.step + by);
      ImGui::SetItemTooltip("%s", tip);
      ImGui::SameLine(0, ui.px(3));
    };
    if (ImGui::Button(play.playing ? "Pause" : "Play", ImVec2(ui.px(58), 0))) {
      play.playing = !play.playing;
      if (play.playing && ui.selection.step >= ui.n_steps - 1) ui.select_step(0);
    }
    ImGui::SetItemTooltip("Space");
    ImGui::SameLine(0, ui.px(3));
    jump("-100", -100, "Ctrl+Left"), jump("-10", -10, "Shift+Left"), jump("-1", -1, "Left"),
        jump("+1", 1, "Right"), jump("+10", 10, "Shift+Right"), jump("+100", 100, "Ctrl+Right");
    int step = ui.selection.step;
    ImGui::SetNextItemWidth(ui.px(84));
    if (ImGui::InputInt("##step", &step, 0)) ui.select_step(step);
    ImGui::SetItemTooltip("Step: position of the newest token");
    ImGui::SameLine();
    ImGui::Text("of %d", ui.n_steps - 1);
    same_line_if_fits(ui.px(150));
    float speed = static_cast<float>(play.steps_per_second);
    ImGui::SetNextItemWidth(ui.px(90));
    if (ImGui::SliderFloat("##speed", &speed, 1, 4000, "", ImGuiSliderFlags_Logarithmic))
      play.steps_per_second = static_cast<double>(speed);
    ImGui::SetItemTooltip("Play speed (+ and -)");
    ImGui::SameLine(0, ui.px(4));
    ImGui::Text("%.0f steps/s", play.steps_per_second);
    same_line_if_fits(ui.px(120));
    ImGui::BeginDisabled(!ui.selection.has_range());
    ImGui::Checkbox("loop range", &play.loop);
    ImGui::EndDisabled();
    ImGui::SetItemTooltip("L; shift+drag over a lane selects the range");
    same_line_if_fits(ui.px(90));
    if (ImGui::Button("All steps")) whole_ = true;
    ImGui::SetItemTooltip("Double click on a lane does the same");
    same_line_if_fits(ui.px(260));
    for (const PhaseRange& phase : model.lanes->timeline->phases) {
      if (ui.selection.step >= phase.begin && ui.selection.step < phase.end)
        ImGui::TextDisabled("phase: %s", std::string(generation_phase_name(phase.phase)).c_str());
    }
    if (const Note* note = ui.document.notes().at(ui.selection.step)) {
      ImGui::SameLine();
      cut_text(ui, note->text, std::max(ui.px(40), ImGui::GetContentRegionAvail().x));
    }
  }

  void setup_axes(Ui& ui, bool labels, double y_low, double y_high) {
    const ImPlotAxisFlags x_flags =
        ImPlotAxisFlags_NoGridLines | (labels ? ImPlotAxisFlags_None : ImPlotAxisFlags_NoDecorations);
    ImPlot::SetupAxis(ImAxis_X1, nullptr, x_flags | ImPlotAxisFlags_NoHighlight);
    ImPlot::SetupAxis(ImAxis_Y1, nullptr,
                      ImPlotAxisFlags_NoDecorations | ImPlotAxisFlags_Lock | ImPlotAxisFlags_NoHighlight);
    ImPlot::SetupAxisFormat(ImAxis_X1, "%.0f");
    ImPlot::SetupAxisLimits(ImAxis_Y1, y_low, y_high, ImPlotCond_Always);
    ImPlot::SetupAxisLimitsConstraints(ImAxis_X1, 0, std::max(1, ui.n_steps));
    ImPlot::SetupAxisZoomConstraints(ImAxis_X1, 4, 1e9);
    if (labels) round_ticks(ui, ImAxis_X1, x_min_, x_max_, static_cast<float>(width_));
    ImPlot::SetupAxisLinks(ImAxis_X1, &x_min_, &x_max_);
  }

  // Phases, compactions, counted steps, falls of recall and notes.
  void draw_strip(Ui& ui, const TimelineModel& model, float gutter, float height) {
    const Timeline& timeline = *model.lanes->timeline;
    ImGui::SetCursorPosX(ImGui::GetCursorPosX());
    ImGui::BeginGroup();
    ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.muted);
    ImGui::TextUnformatted("phase");
    ImGui::PopStyleColor();
    ImGui::EndGroup();
    ImGui::SameLine(gutter);
    ImPlot::PushStyleVar(ImPlotStyleVar_PlotPadding, ImVec2(ui.px(16), 0));
    if (ImPlot::BeginPlot("##phases", ImVec2(-ImGui::GetStyle().ScrollbarSize, height),
                          ImPlotFlags_CanvasOnly | ImPlotFlags_NoFrame)) {
      setup_axes(ui, false, 0, 1);
      ImPlot::SetupFinish();
      ImDrawList* list = ImPlot::GetPlotDrawList();
      ImPlot::PushPlotClipRect();
      for (const PhaseRange& phase : timeline.phases) {
        const ImU32 colour =
            Theme::blend(ui.theme.surface, ui.theme.series[static_cast<size_t>(phase.phase)], 0.55F);
        const ImVec2 low = ImPlot::PlotToPixels(phase.begin, 1.0),
                     high = ImPlot::PlotToPixels(phase.end, 0.0);
        list->AddRectFilled(low, high, colour);
        const std::string name(generation_phase_name(phase.phase));
        const ImVec2 text = ImGui::CalcTextSize(name.c_str());
        const float left = std::max(low.x, ImPlot::GetPlotPos().x) + ui.px(4);
        if (text.x + ui.px(8) < high.x - low.x)
          list->AddText(ImVec2(left, (low.y + high.y - text.y) / 2), Theme::ink_on(colour), name.c_str());
      }
      const auto near = [&](float x) {
        return ImPlot::IsPlotHovered() && std::abs(ImGui::GetMousePos().x - x) < ui.px(5);
      };
      for (int step : timeline.compactions) {
        const ImVec2 at = ImPlot::PlotToPixels(step, 0.0);
        list->AddLine(at, ImVec2(at.x, at.y - height), Theme::with_alpha(ui.theme.text, 0.6F), ui.px(1));
        if (near(at.x))
          ImGui::SetTooltip(
              "step %d: compaction, %.0f tokens evicted", step,
              static_cast<double>(timeline.evicted_tokens[static_cast<size_t>(step - timeline.first_step)]));
      }
      for (int step : model.lanes->counted) {
        const ImVec2 at = ImPlot::PlotToPixels(step, 0.0);
        list->AddLine(at, ImVec2(at.x, at.y - height * 0.5F), ui.theme.accent, ui.px(2));
        if (near(at.x))
          ImGui::SetTooltip("step %d: its kernels were counted one by one; no timing figure", step);
      }
      for (int step : model.recall ? model.recall->falls : std::vector<int>{}) {
        const ImVec2 at = ImPlot::PlotToPixels(step, 0.0);
        const float side = ui.px(5);
        list->AddTriangleFilled(ImVec2(at.x - side, at.y - 2 * side), ImVec2(at.x + side, at.y - 2 * side),
                                at, ui.theme.bad);
        if (near(at.x)) ImGui::SetTooltip("step %d: recall falls here", step);
      }
      for (const Note& note : ui.document.notes().all()) {
        const ImVec2 at = ImPlot::PlotToPixels(note.step, 1.0);
        const float side = ui.px(5);
        list->AddTriangleFilled(ImVec2(at.x - side, at.y), ImVec2(at.x + side, at.y),
                                ImVec2(at.x, at.y + 2 * side), ui.theme.selection);
        if (ImPlot::IsPlotHovered() && std::abs(ImGui::GetMousePos().x - at.x) < side)
          ImGui::SetTooltip("step %d: %s", note.step, note.text.c_str());
      }
      ImPlot::PopPlotClipRect();
      step_cursor(ui, true);
      drag_range(ui);
      ImPlot::EndPlot();
    }
    ImPlot::PopStyleVar();
  }

  void draw_lane(Ui& ui, const TimelineModel& model, int index, float gutter, float height, bool labels) {
    const LaneKind& kind = lane_kinds()[static_cast<size_t>(index)];
    const Timeline& timeline = *model.lanes->timeline;
    const LaneData& data = model.lane(index);
    const LinePyramid& pyramid = data.pyramid;
    const std::vector<float>& column = data.values;
    ImGui::PushID(index);
    const ImVec2 start = ImGui::GetCursorPos();
    ImGui::TextUnformatted(kind.name);
    ImGui::SameLine(0, ui.px(6));
    badge(ui, data.provenance, kind.from);
    const int at = ui.selection.step - timeline.first_step;
    const bool known =
        at >= 0 && static_cast<size_t>(at) < column.size() && !std::isnan(column[static_cast<size_t>(at)]);
    const std::string value =
        known ? fmt::format("{} {}", format_count(static_cast<double>(column[static_cast<size_t>(at)])),
                            kind.unit)
        : column.empty() ? "not known"
                         : "not timed";
    ImGui::SetCursorPos(ImVec2(start.x, start.y + ImGui::GetTextLineHeight() + ui.px(1)));
    cut_text(ui, value, gutter - ui.px(10), true);
    ImGui::SetCursorPos(ImVec2(start.x + gutter - ImGui::GetStyle().WindowPadding.x, start.y));
    ImPlot::PushStyleVar(ImPlotStyleVar_PlotPadding, ImVec2(ui.px(16), ui.px(1)));
    if (ImPlot::BeginPlot("##lane", ImVec2(-1, height), ImPlotFlags_CanvasOnly | ImPlotFlags_NoFrame)) {
      setup_axes(ui, labels, 0, static_cast<double>(std::max(data.top, 1e-9F)) * 1.1);
      ImPlot::SetupFinish();
      if (index == 0) width_ = std::clamp(static_cast<int>(ImPlot::GetPlotSize().x), 16, 16384);
      const DrawnLine& line = model.lines[static_cast<size_t>(index)];
      ImPlotSpec spec;
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(
          ui.theme.series[static_cast<size_t>(index) % ui.theme.series.size()]);
      spec.LineWeight = ui.px(1.2F);
      ImPlot::PlotLine("##line", line.xs.data(), line.ys.data(), static_cast<int>(line.xs.size()), spec);
      if (column.empty() && ImPlot::IsPlotHovered())
        ImGui::SetTooltip("%s: %s", kind.name, data.absence.c_str());
      step_cursor(ui, true);
      drag_range(ui);
      const ImVec2 corner = ImPlot::GetPlotPos();
      const std::string highest = format_count(static_cast<double>(pyramid.highest()));
      ImPlot::PushPlotClipRect();
      label(ui, ImPlot::GetPlotDrawList(), ImVec2(corner.x + ui.px(4), corner.y + ui.px(1)),
            column.empty() ? "none: " + data.absence
            : data.cuts()
                ? fmt::format("up to {}, drawn to {}", highest, format_count(static_cast<double>(data.top)))
                : highest);
      ImPlot::PopPlotClipRect();
      if (!column.empty() && ImPlot::IsPlotHovered() && ImGui::BeginTooltip()) {
        const int step = static_cast<int>(std::lround(ImPlot::GetPlotMousePos().x));
        const int row = step - timeline.first_step;
        ImGui::Text("step %d", step);
        if (row >= 0 && static_cast<size_t>(row) < column.size()) {
          ImGui::Text("%s: %s %s", kind.name,
                      format_value(static_cast<double>(column[static_cast<size_t>(row)])).c_str(), kind.unit);
        } else {
          ImGui::TextDisabled("not timed: a prompt token");
        }
        ImGui::EndTooltip();
      }
      ImPlot::EndPlot();
    }
    ImPlot::PopStyleVar();
    ImGui::PopID();
  }

  // Click sets the step, shift+drag the range, double click shows everything; plain drag pans.
  void drag_range(Ui& ui) {
    if (!ImPlot::IsPlotHovered()) return;
    if (ImGui::IsMouseDoubleClicked(ImGuiMouseButton_Left)) {
      whole_ = true;
      return;
    }
    const ImGuiIO& io = ImGui::GetIO();
    const int step = static_cast<int>(std::lround(ImPlot::GetPlotMousePos().x));
    if (io.KeyShift && ImGui::IsMouseClicked(ImGuiMouseButton_Left)) drag_from_ = step;
    if (io.KeyShift && drag_from_ >= 0 && ImGui::IsMouseDown(ImGuiMouseButton_Left)) {
      ui.selection.token_begin = std::clamp(std::min(drag_from_, step), 0, ui.n_steps);
      ui.selection.token_end = std::clamp(std::max(drag_from_, step), 0, ui.n_steps);
    }
    const bool click = ImGui::IsMouseReleased(ImGuiMouseButton_Left) &&
                       ImGui::GetMouseDragDelta(ImGuiMouseButton_Left, 0).x == 0 && drag_from_ < 0;
    if (!ImGui::IsMouseDown(ImGuiMouseButton_Left)) drag_from_ = -1;
    if (click) ui.select_step(step);
    if (ImGui::IsMouseDragging(ImGuiMouseButton_Left) || ImGui::IsMouseDown(ImGuiMouseButton_Right) ||
        io.MouseWheel != 0)
      whole_ = false;
  }

  const TraceSource* trace_ = nullptr;
  double x_min_ = 0, x_max_ = 1;
  int width_ = 1000, drag_from_ = -1;
  bool whole_ = true;
  std::shared_ptr<LanesCache> cache_ = std::make_shared<LanesCache>();
};

}  // namespace

std::unique_ptr<Panel> make_timeline_panel() {
  return std::make_unique<TimelinePanel>();
}

}  // namespace kvlapse::gui
