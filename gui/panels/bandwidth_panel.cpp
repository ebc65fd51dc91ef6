// Bandwidth: bytes of K and V that attention must read at each step, and the rate that this implies, with
// measured DRAM traffic beside them when it was sampled; and the roofline. What was not recorded says why.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gui/draw/line_pyramid.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/kernel_view.h"
#include "trace/views/roofline.h"

namespace kvlapse::gui {
namespace {

constexpr int kDrawnPixels = 1200;
enum View { kOverSteps, kRoofline };

struct BandwidthLine {
  DrawnLine line;
  bool measured = false;
};
struct BandwidthModel final : DrawModel {
  std::shared_ptr<const Timeline> timeline;
  DramTimeline dram;
  std::array<std::vector<BandwidthLine>, 2> plots;  // MiB a step, GiB/s
  std::array<float, 2> highest{};
  Roofline roofline;
  int view = kOverSteps;
};

// Measured once for each number of threads.
struct MachineCache {
  std::mutex mutex;
  std::map<int, MachineCeilings> by_threads;
};

// A recording of the CPU holds no ceilings: those of this machine, which may be another one.
void add_machine(Roofline& roofline, const std::function<MachineCeilings(int)>& measure,
                 MachineCache& cache) {
  const int threads = roofline.cpu_threads;
  if (threads == 0) return;
  const std::scoped_lock lock(cache.mutex);
  auto found = cache.by_threads.find(threads);
  if (found == cache.by_threads.end()) found = cache.by_threads.emplace(threads, measure(threads)).first;
  const std::string from =
      fmt::format("Measured just now with {} {} on this machine, which need not be the one that recorded",
                  threads, threads == 1 ? "thread" : "threads");
  roofline.memory_gbps = {found->second.read_gbps, Ceiling::Origin::measured_now,
                          from + ": reading memory beyond the caches."};
  roofline.compute_gflops = {found->second.fp32_gflops, Ceiling::Origin::measured_now,
                             from + ": fused multiply-adds in registers."};
}

class BandwidthPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const auto trace = ui.trace;
    const int sequence = ui.selection.sequence;
    return {mix_key({reinterpret_cast<uintptr_t>(trace.get()), trace ? trace->version() : 0,
                     static_cast<uint64_t>(sequence), static_cast<uint64_t>(view_)}),
            [trace, sequence, view = view_, measure = ui.measure_machine, machine = machine_] {
              auto model = std::make_shared<BandwidthModel>();
              model->view = view;
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
              const Timeline& timeline = *model->timeline;
              model->dram = read_dram(trace->reader(), sequence);
              const auto add = [&](size_t plot, const std::vector<float>& values, bool measured) {
                if (values.empty()) return;
                const LinePyramid pyramid(values, timeline.first_step);
                model->plots[plot].push_back({pyramid.line(0, timeline.n_steps, kDrawnPixels), measured});
                model->highest[plot] = std::max(model->highest[plot], pyramid.highest());
              };
              add(0, timeline.kv_read_mib, false), add(0, model->dram.mib, true);
              add(1, timeline.kv_gibps, false), add(1, model->dram.gibps, true);
              if (view == kRoofline) {
                model->roofline = read_roofline(trace->reader(), sequence);
                if (measure) add_machine(model->roofline, measure, *machine);
              }
              return model;
            }};
  }

  void controls(Ui& ui) override { choose("##view", view_, {"over steps", "roofline"}, ui.px(110)); }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const BandwidthModel&>(base);
    if (model.view != view_) return draw_absence(ui, "Bandwidth", "Preparing ...");
    if (view_ == kRoofline) return draw_roofline(ui, model.roofline);
    if (!model.dram.absence.empty()) {
      same_line_if_fits(ui.px(300));
      ImGui::AlignTextToFramePadding();
      cut_text(ui, "No measured DRAM bytes: " + model.dram.absence + ".", ImGui::GetContentRegionAvail().x,
               true);
    }
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
      const bool both = model.plots[i].size() > 1;
      if (both) {
        ImGui::SameLine();
        ImGui::TextUnformatted(i == 0 ? "and DRAM bytes of the step" : "and DRAM rate over the whole step");
        ImGui::SameLine();
        badge(ui, Provenance::sampled,
              "Hardware samples of the memory's counters, shared out by overlap in time.");
      }
      if (ImPlot::BeginPlot("##rate", ImVec2(-1, std::max(height, ui.px(60))),
                            ImPlotFlags_NoTitle | ImPlotFlags_NoFrame | ImPlotFlags_NoMouseText |
                                (both ? ImPlotFlags_None : ImPlotFlags_NoLegend))) {
        ImPlot::SetupAxis(ImAxis_X1, i == 1 ? "step" : nullptr, ImPlotAxisFlags_NoGridLines);
        ImPlot::SetupAxis(ImAxis_Y1, kUnits[i]);
        ImPlot::SetupAxisLimits(ImAxis_X1, 0, std::max(1, ui.n_steps), ImPlotCond_Once);
        ImPlot::SetupAxisLimits(ImAxis_Y1, 0, std::max(1e-6, 1.1 * static_cast<double>(model.highest[i])),
                                ImPlotCond_Once);
        round_ticks(ui, ImAxis_X1, 0, ui.n_steps, ImGui::GetContentRegionAvail().x - ui.px(60));
        ImPlot::SetupFinish();
        for (const BandwidthLine& line : model.plots[i]) {
          ImPlotSpec spec;
          spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[line.measured ? 1
                                                                          : i == 0      ? 4
                                                                                        : 5]);
          spec.LineWeight = ui.px(1.4F);
          ImPlot::PlotLine(line.measured ? "DRAM, sampled"
                           : i == 0      ? "K and V, modelled"
                                         : "K and V, derived",
                           line.line.xs.data(), line.line.ys.data(), static_cast<int>(line.line.xs.size()),
                           spec);
        }
        step_cursor(ui, true);
        pick_step(ui);
        ImPlot::EndPlot();
      }
      ImGui::PopID();
    }
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const BandwidthModel&>(base);
    Table table{
        {"step", "kv_read_mib_modelled", "kv_gibps_derived", "dram_mib_sampled", "dram_gibps_sampled"}, {}};
    for (size_t i = 0; i < model.timeline->size(); ++i) {
      const bool sampled = i < model.dram.mib.size();
      table.rows.push_back({std::to_string(model.timeline->first_step + static_cast<int>(i)),
                            fmt::format("{:.7g}", model.timeline->kv_read_mib[i]),
                            fmt::format("{:.7g}", model.timeline->kv_gibps[i]),
                            sampled ? fmt::format("{:.7g}", model.dram.mib[i]) : "",
                            sampled ? fmt::format("{:.7g}", model.dram.gibps[i]) : ""});
    }
    return table;
  }
  std::string state() const override { return std::to_string(view_); }
  void set_state(std::string_view text) override { view_ = text == "1" ? kRoofline : kOverSteps; }

 private:
  // `unit`: G... , or T... from a thousand on.
  static void describe(const Ui& ui, const char* name, const Ceiling& ceiling, const char* unit) {
    same_line_if_fits(ui.px(200));
    ImGui::AlignTextToFramePadding();
    if (!ceiling.known()) {
      cut_text(ui, fmt::format("{}: {}", name, ceiling.from), ImGui::GetContentRegionAvail().x, true);
      return;
    }
    const bool tera = ceiling.value >= 1000;
    ImGui::TextDisabled("%s: %s %c%s", name, format_value(ceiling.value * (tera ? 1e-3 : 1)).c_str(),
                        tera ? 'T' : 'G', unit);
    ImGui::SameLine(0, ui.px(4));
    const bool measured =
        ceiling.origin == Ceiling::Origin::counted || ceiling.origin == Ceiling::Origin::measured_now;
    badge(ui,
          measured                                        ? Provenance::measured
          : ceiling.origin == Ceiling::Origin::data_sheet ? Provenance::modelled
                                                          : Provenance::derived,
          ceiling.from.c_str());
  }

  static void draw_roofline(Ui& ui, const Roofline& roofline) {
    if (!roofline.absence.empty()) return draw_absence(ui, "Roofline", "No point: " + roofline.absence + ".");
    same_line_if_fits(ui.px(110));
    ImGui::TextDisabled("points");
    ImGui::SameLine(0, ui.px(4));
    badge(ui, Provenance::derived,
          "Operations: 4 x head_dim a token and query head (modelled), over the measured time of attention. "
          "Bytes: counted where the point says so, otherwise K and V once; K and V that fit into a cache may "
          "lie above the memory's ceiling.");
    describe(ui, "memory", roofline.memory_gbps, "B/s");
    describe(ui, "fp32", roofline.compute_gflops, "FLOP/s");
    double left = 1e30, right = 0, low = 1e30, high = 0;
    for (const RooflinePoint& point : roofline.points) {
      left = std::min(left, point.flop_per_byte), right = std::max(right, point.flop_per_byte);
      low = std::min(low, point.gflops), high = std::max(high, point.gflops);
    }
    const bool memory = roofline.memory_gbps.known(), compute = roofline.compute_gflops.known();
    const double peak = roofline.compute_gflops.value;
    const double ridge = memory && compute ? peak / roofline.memory_gbps.value : NAN;
    left /= 4, right *= 4;
    if (memory && compute) right = std::max(right, 3 * ridge);
    if (memory) high = std::max(high, std::min(right, compute ? ridge : right) * roofline.memory_gbps.value);
    if (compute) high = std::max(high, peak);
    if (!ImPlot::BeginPlot("##roofline", ImVec2(-1, -1), ImPlotFlags_NoTitle | ImPlotFlags_NoFrame)) return;
    ImPlot::SetupAxes("operations a byte of K and V", "GFLOP/s of attention");
    ImPlot::SetupAxisScale(ImAxis_X1, ImPlotScale_Log10);
    ImPlot::SetupAxisScale(ImAxis_Y1, ImPlotScale_Log10);
    ImPlot::SetupAxisLimits(ImAxis_X1, left, right, ImPlotCond_Once);
    ImPlot::SetupAxisLimits(ImAxis_Y1, low / 3, high * 2, ImPlotCond_Once);
    ImPlot::SetupLegend(ImPlotLocation_SouthEast);
    ImPlot::SetupFinish();
    const auto draw_ceiling = [&](const char* name, ImU32 colour, std::array<double, 2> xs,
                                  std::array<double, 2> ys) {
      ImPlotSpec spec;
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(colour);
      spec.LineWeight = ui.px(1.8F);
      ImPlot::PlotLine(name, xs.data(), ys.data(), 2, spec);
    };
    const double first = left / 1e3, last = right * 1e3;  // beyond what zooming out shows
    if (memory) {
      const double end = compute ? ridge : last;
      draw_ceiling("memory's ceiling", ui.theme.muted, {first, end},
                   {first * roofline.memory_gbps.value, end * roofline.memory_gbps.value});
    }
    if (compute) draw_ceiling("fp32 ceiling", ui.theme.text, {memory ? ridge : first, last}, {peak, peak});
    for (size_t i = 0; i < roofline.points.size(); ++i) {
      const RooflinePoint& point = roofline.points[i];
      ImPlotSpec spec;
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[i % ui.theme.series.size()]);
      spec.Marker = static_cast<ImPlotMarker>(ImPlotMarker_Circle + static_cast<int>(i % 6));
      spec.MarkerSize = ui.px(5);
      spec.MarkerFillColor = spec.MarkerLineColor = spec.LineColor;
      const std::string name = point.name + (point.counted ? " (counted bytes)" : " (modelled bytes)");
      ImPlot::PlotScatter(name.c_str(), &point.flop_per_byte, &point.gflops, 1, spec);
    }
    ImPlot::EndPlot();
  }

  int view_ = kOverSteps;
  std::shared_ptr<MachineCache> machine_ = std::make_shared<MachineCache>();
};

}  // namespace

std::unique_ptr<Panel> make_bandwidth_panel() {
  return std::make_unique<BandwidthPanel>();
}

}  // namespace kvlapse::gui
