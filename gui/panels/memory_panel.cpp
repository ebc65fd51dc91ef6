// Memory: what eviction gives back. Bytes over the steps, and the pages of the selected kv head now.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <mutex>

#include "gui/draw/line_pyramid.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/views/page_view.h"

namespace kvlapse::gui {
namespace {

constexpr std::array<const char*, 4> kLineNames = {"full cache", "pages, table per layer",
                                                   "pages, table per head", "tokens held"};

struct MemoryLines {
  PageTimeline pages;
  std::array<LinePyramid, 4> pyramids;  // MiB
};
struct MemoryModel final : DrawModel {
  std::shared_ptr<const MemoryLines> lines;
  std::array<DrawnLine, 4> drawn;
  std::vector<int> fill;
  int step = 0, block = 16, layer = 0, kv_head = 0;
};
struct MemoryCache {
  std::mutex mutex;
  uint64_t key = 0;
  std::shared_ptr<const MemoryLines> lines;
};
constexpr int kDrawnPixels = 900;

DrawModelPtr prepare(TraceSource& trace, const Selection& selection, int block, MemoryCache& cache,
                     uint64_t lines_key) {
  auto model = std::make_shared<MemoryModel>();
  const int n = trace.n_steps(selection.sequence);
  if (n == 0) {
    model->absence = "The trace holds no step yet.";
    return model;
  }
  const CacheGeometry& geometry = trace.reader().header().geometry;
  {
    const std::scoped_lock lock(cache.mutex);
    if (cache.key == lines_key) model->lines = cache.lines;
  }
  if (!model->lines) {
    auto lines = std::make_shared<MemoryLines>();
    lines->pages = empty_page_timeline(n, block);
    for (int layer = 0; layer < geometry.n_layers; ++layer) {
      const auto evicted = trace.evicted_at(selection.sequence, layer);
      if (evicted->size() == static_cast<size_t>(n) * geometry.n_kv_heads)
        add_layer_pages(lines->pages, *evicted, geometry);
    }
    const std::array<const std::vector<double>*, 4> columns = {
        &lines->pages.full_bytes, &lines->pages.layer_page_bytes, &lines->pages.head_page_bytes,
        &lines->pages.logical_bytes};
    for (size_t i = 0; i < columns.size(); ++i) {
      std::vector<float> mib(columns[i]->size());
      std::ranges::transform(*columns[i], mib.begin(),
                             [](double bytes) { return static_cast<float>(bytes / (1 << 20)); });
      lines->pyramids[i] = LinePyramid(mib, 0);
    }
    model->lines = lines;
    const std::scoped_lock lock(cache.mutex);
    cache.key = lines_key;
    cache.lines = lines;
  }
  for (size_t i = 0; i < model->drawn.size(); ++i)
    model->drawn[i] = model->lines->pyramids[i].line(0, n, kDrawnPixels);
  const auto evicted = trace.evicted_at(selection.sequence, selection.layer);
  model->fill =
      page_fill({evicted->data() + static_cast<size_t>(selection.kv_head) * n, static_cast<size_t>(n)},
                selection.step, block);
  model->step = selection.step, model->block = block, model->layer = selection.layer,
  model->kv_head = selection.kv_head;
  return model;
}

class MemoryPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<MemoryModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    const int block = kBlocks[static_cast<size_t>(block_)];
    const uint64_t lines =
        mix_key({reinterpret_cast<uintptr_t>(ui.trace.get()), ui.trace->version(),
                 static_cast<uint64_t>(ui.selection.sequence), static_cast<uint64_t>(block)});
    const uint64_t key =
        mix_key({lines, static_cast<uint64_t>(ui.selection.step), static_cast<uint64_t>(ui.selection.layer),
                 static_cast<uint64_t>(ui.selection.kv_head)});
    return {key, [trace = ui.trace, selection = ui.selection, block, cache = cache_, lines] {
              return prepare(*trace, selection, block, *cache, lines);
            }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const MemoryModel&>(base);
    choose("##block", block_, {"8 tokens a page", "16 tokens a page", "32 tokens a page", "64 tokens a page"},
           ui.px(150));
    ImGui::SameLine();
    badge(ui, Provenance::modelled,
          "Bytes from the eviction records and the cache's geometry; rows stay where they were appended, a "
          "page is free when its last token is gone.");
    const float height = std::max(ui.px(120), ImGui::GetContentRegionAvail().y * 0.52F);
    if (ImPlot::BeginPlot("##bytes", ImVec2(-1, height),
                          ImPlotFlags_NoTitle | ImPlotFlags_NoFrame | ImPlotFlags_NoMouseText)) {
      ImPlot::SetupAxis(ImAxis_X1, "step", ImPlotAxisFlags_NoGridLines);
      ImPlot::SetupAxis(ImAxis_Y1, "MiB, whole model");
      ImPlot::SetupAxisLimits(ImAxis_X1, 0, std::max(1, ui.n_steps), ImPlotCond_Once);
      ImPlot::SetupAxisLimits(ImAxis_Y1, 0,
                              std::max(1e-3, 1.08 * static_cast<double>(model.lines->pyramids[0].highest())),
                              ImPlotCond_Once);
      ImPlot::SetupLegend(ImPlotLocation_NorthWest);
      round_ticks(ui, ImAxis_X1, 0, ui.n_steps, ImGui::GetContentRegionAvail().x - ui.px(60));
      ImPlot::SetupFinish();
      // Page tables per layer often agree with the others: drawn first and broader, so that all are seen.
      for (const size_t i : {size_t{1}, size_t{0}, size_t{2}, size_t{3}}) {
        ImPlotSpec spec;
        constexpr std::array<size_t, 4> kSeries = {6, 2, 1, 0};
        spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[kSeries[i]]);
        spec.LineWeight = ui.px(i == 1 ? 4.5F : 1.5F);
        ImPlot::PlotLine(kLineNames[i], model.drawn[i].xs.data(), model.drawn[i].ys.data(),
                         static_cast<int>(model.drawn[i].xs.size()), spec);
      }
      step_cursor(ui, true);
      pick_step(ui);
      ImPlot::EndPlot();
    }
    const size_t at = static_cast<size_t>(
        std::clamp(model.step, 0, static_cast<int>(model.lines->pages.logical_bytes.size()) - 1));
    const PageTimeline& pages = model.lines->pages;
    ImGui::TextDisabled(
        "step %d: held %s, pages per head %s, per layer %s, without eviction %s", model.step,
        format_bytes(pages.logical_bytes[at]).c_str(), format_bytes(pages.head_page_bytes[at]).c_str(),
        format_bytes(pages.layer_page_bytes[at]).c_str(), format_bytes(pages.full_bytes[at]).c_str());
    draw_blocks(ui, model);
  }

  Table table(const DrawModel& base) const override {
    const PageTimeline& pages = static_cast<const MemoryModel&>(base).lines->pages;
    Table table{{"step", "held_bytes", "pages_per_head_bytes", "pages_per_layer_bytes", "full_bytes"}, {}};
    for (size_t i = 0; i < pages.logical_bytes.size(); ++i) {
      table.rows.push_back({std::to_string(i), fmt::format("{:.0f}", pages.logical_bytes[i]),
                            fmt::format("{:.0f}", pages.head_page_bytes[i]),
                            fmt::format("{:.0f}", pages.layer_page_bytes[i]),
                            fmt::format("{:.0f}", pages.full_bytes[i])});
    }
    return table;
  }

 private:
  static constexpr std::array<int, 4> kBlocks = {8, 16, 32, 64};

  void draw_blocks(Ui& ui, const MemoryModel& model) {
    ImGui::Text("pages of layer %d, kv head %d", model.layer, model.kv_head);
    same_line_if_fits(ui.px(220));
    ramp_legend(ui, *ui.theme.sequential, "1", std::to_string(model.block).c_str(), "live tokens", ui.px(60));
    ImGui::BeginChild("##blocks", ImVec2(0, 0));
    const ImVec2 origin = ImGui::GetCursorScreenPos(), space = ImGui::GetContentRegionAvail();
    const int n = static_cast<int>(model.fill.size());
    // The largest square that shows all pages.
    float side =
        std::floor(std::sqrt(space.x * std::max(space.y, 1.0F) / static_cast<float>(std::max(n, 1))));
    side = std::clamp(side, ui.px(4), ui.px(18));
    const int columns = std::max(1, static_cast<int>(space.x / side));
    ImDrawList* list = ImGui::GetWindowDrawList();
    for (int page = 0; page < n; ++page) {
      const ImVec2 low(origin.x + side * static_cast<float>(page % columns),
                       origin.y + side * static_cast<float>(page / columns));
      const ImVec2 high(low.x + side - 1, low.y + side - 1);
      const int live = model.fill[static_cast<size_t>(page)];
      if (live == 0) {
        list->AddRect(low, high, ui.theme.grid);
      } else {
        list->AddRectFilled(low, high,
                            ui.theme.ramp(static_cast<float>(live) / static_cast<float>(model.block)));
      }
      if (ImGui::IsWindowHovered() && ImGui::IsMouseHoveringRect(low, high)) {
        ImGui::SetTooltip("page %d: positions %d to %d, %d live tokens%s", page, page * model.block,
                          (page + 1) * model.block - 1, live, live == 0 ? ": free" : "");
      }
    }
    ImGui::Dummy(ImVec2(1, side * static_cast<float>((n + columns - 1) / columns)));
    ImGui::EndChild();
  }

  int block_ = 1;
  std::shared_ptr<MemoryCache> cache_ = std::make_shared<MemoryCache>();
};

}  // namespace

std::unique_ptr<Panel> make_memory_panel() {
  return std::make_unique<MemoryPanel>();
}

}  // namespace kvlapse::gui
