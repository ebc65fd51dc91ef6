// Token lives: x = step, y = token position (or slot). The picture that tells which tokens a head keeps.
#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <mutex>

#include "gui/draw/life_raster.h"
#include "gui/draw/map_texture.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "replay/views/replayed_life.h"
#include "trace/views/recording_pair.h"

namespace kvlapse::gui {
namespace {

enum Scope { kHead, kLayer, kAllHeads };
enum Rows { kPositions, kSlots };
enum Colour { kHeld, kAttention };
enum Source { kRecorded, kWhatIf, kDifference, kOther };  // kOther: difference to the next open trace

constexpr float kAttentionFloor = 1e-3F;  // weights below are not drawn

struct LifeParams {
  std::shared_ptr<TraceSource> trace;
  int sequence = 0, layer = 0, kv_head = 0;
  int scope = kHead, rows = kPositions, colour = kHeld, source = kRecorded;
  WhatIfChoice what_if;
  std::shared_ptr<TraceSource> other;
  RasterView view;
  Theme theme;
};

struct LifeModel final : DrawModel {
  RasterView view;
  int rows = kPositions, scope = kHead, colour = kHeld, source = kRecorded;
  int n_rows = 0;  // positions or slots
  int n_steps = 0, n_prompt = 0, layer = 0, kv_head = 0;
  bool exact_order = true, from_sketch = false, has_regret = false;
  std::shared_ptr<const LayerLife> life;      // of the selected layer, recorded or replayed
  std::shared_ptr<const LayerLife> replayed;  // with a difference: the other side
  int n_compared = 0;                         // positions that both sides have
  std::string other_name;
  std::shared_ptr<const SlotHistory> slots;
  std::shared_ptr<const HeadAttention> attention;
  std::shared_ptr<const std::vector<std::string>> texts;
  std::vector<std::string> part_names;
  std::vector<uint32_t> pixels;
  uint64_t picture = 0;
  LifetimeSummary summary;
};

// Attention and slot histories of the heads looked at last: they do not depend on the view.
struct HeadCache {
  std::mutex mutex;
  uint64_t attention_key = 0, slots_key = 0, replayed_key = 0;
  std::shared_ptr<const HeadAttention> attention;
  std::shared_ptr<const SlotHistory> slots;
  std::shared_ptr<const LayerLife> replayed;
};

template <typename Value, typename Make>
std::shared_ptr<const Value> keep(HeadCache& cache, uint64_t& slot_key, std::shared_ptr<const Value>& slot,
                                  uint64_t key, Make make) {
  {
    const std::scoped_lock lock(cache.mutex);
    if (slot_key == key && slot) return slot;
  }
  auto value = std::make_shared<const Value>(make());
  const std::scoped_lock lock(cache.mutex);
  slot_key = key;
  slot = value;
  return value;
}

uint32_t attention_colour(const Theme& theme, float weight) {
  const float at = std::clamp(1 + std::log10(std::max(weight, kAttentionFloor)) / 3, 0.0F, 1.0F);
  return theme.heat_at(0.25F + 0.75F * at);
}

// Of what both sides hold, so that the differences stand out.
uint32_t both_colour(const Theme& theme) {
  return Theme::blend(theme.map_evicted, theme.map_alive, 0.45F);
}

void paint_positions(const LifeParams& params, LifeModel& model) {
  LifeRasterizer rasterizer(params.view);
  const CacheGeometry& geometry = params.trace->reader().header().geometry;
  if (params.scope == kAllHeads && params.source == kRecorded) {
    for (int layer = 0; layer < geometry.n_layers; ++layer) {
      const auto evicted = params.trace->evicted_at(params.sequence, layer);
      const size_t n = evicted->size() / geometry.n_kv_heads;
      for (int head = 0; head < geometry.n_kv_heads; ++head)
        rasterizer.add({evicted->data() + n * head, n}, static_cast<int>(n));
    }
  } else {
    for (int head = 0; head < geometry.n_kv_heads; ++head) {
      if (params.scope != kHead || head == params.kv_head)
        rasterizer.add(model.life->evicted(head), model.life->n_steps);
    }
  }
  const LifeRaster raster = rasterizer.finish();
  const bool attention = params.colour == kAttention && model.attention && model.attention->absence.empty();
  std::vector<float> held, missed;
  if (attention) {
    held =
        rasterize_attention(params.view, model.attention->points, model.life->evicted(params.kv_head), true);
    missed =
        rasterize_attention(params.view, model.attention->points, model.life->evicted(params.kv_head), false);
  }
  const Theme& theme = params.theme;
  const uint32_t alive =
      attention ? Theme::blend(theme.map_evicted, theme.map_alive, 0.35F) : theme.map_alive;
  for (size_t i = 0; i < model.pixels.size(); ++i) {
    const float born = raster.born[i];
    if (born <= 0) {
      model.pixels[i] = theme.map_unborn;
      continue;
    }
    const float share = std::min(raster.alive[i] / born, 1.0F);
    uint32_t colour = Theme::blend(theme.map_evicted, alive, share);
    if (born < 1) colour = Theme::blend(theme.map_unborn, colour, born);
    if (attention && held[i] >= kAttentionFloor) colour = attention_colour(theme, held[i]);
    if (attention && missed[i] >= kAttentionFloor) {
      const float at = std::clamp(1 + std::log10(missed[i]) / 3, 0.0F, 1.0F);
      colour = Theme::blend(theme.map_evicted, theme.missed, 0.35F + 0.65F * at);
    }
    model.pixels[i] = colour;
  }
}

// Held by both, by the recording alone, by the replay alone; means of exact sets over the pixel.
void paint_difference(const LifeParams& params, LifeModel& model) {
  LifeRasterizer recorded(params.view), replayed(params.view), both(params.view);
  const int n = model.n_compared;
  std::vector<int32_t> shared(static_cast<size_t>(n));
  for (int head = 0; head < model.life->n_kv_heads; ++head) {
    if (params.scope == kHead && head != params.kv_head) continue;
    const auto a = model.life->evicted(head), b = model.replayed->evicted(head);
    for (int pos = 0; pos < n; ++pos) shared[pos] = std::min(a[pos], b[pos]);
    recorded.add(a, n), replayed.add(b, n), both.add(shared, n);
  }
  const LifeRaster a = recorded.finish(), b = replayed.finish(), c = both.finish();
  const Theme& theme = params.theme;
  for (size_t i = 0; i < model.pixels.size(); ++i) {
    const float born = a.born[i];
    if (born <= 0) {
      model.pixels[i] = theme.map_unborn;
      continue;
    }
    uint32_t colour = Theme::blend(theme.map_evicted, both_colour(theme), std::min(c.alive[i] / born, 1.0F));
    colour = Theme::blend(colour, theme.series[1], std::clamp((a.alive[i] - c.alive[i]) / born, 0.0F, 1.0F));
    colour = Theme::blend(colour, theme.series[3], std::clamp((b.alive[i] - c.alive[i]) / born, 0.0F, 1.0F));
    model.pixels[i] = born < 1 ? Theme::blend(theme.map_unborn, colour, born) : colour;
  }
}

void paint_slots(const LifeParams& params, LifeModel& model) {
  const std::vector<float> age = rasterize_slot_age(params.view, *model.slots);
  const float most = std::log2(1.0F + static_cast<float>(model.n_steps));
  for (size_t i = 0; i < age.size(); ++i) {
    model.pixels[i] = age[i] < 0 ? params.theme.map_unborn : params.theme.ramp(std::log2(1 + age[i]) / most);
  }
}

DrawModelPtr prepare(const LifeParams& params, HeadCache& cache) {
  auto model = std::make_shared<LifeModel>();
  const TraceReader& reader = params.trace->reader();
  const TraceHeader& header = reader.header();
  model->view = params.view;
  model->rows = params.rows, model->scope = params.scope, model->colour = params.colour,
  model->source = params.source;
  model->layer = params.layer, model->kv_head = params.kv_head;
  if (params.trace->n_steps(params.sequence) == 0) {
    model->absence =
        "The trace holds no step yet. When it is being recorded, steps appear here as they are written.";
    return model;
  }
  model->life = params.trace->layer_life(params.sequence, params.layer);
  model->n_steps = model->life->n_steps, model->n_prompt = model->life->n_prompt;
  if (params.source == kOther) {
    model->other_name = params.other->name();
    const CacheGeometry &mine = header.geometry, &theirs = params.other->reader().header().geometry;
    if (mine.n_layers != theirs.n_layers || mine.n_kv_heads != theirs.n_kv_heads) {
      model->absence =
          fmt::format("{} is of another model: {} layers x {} kv heads, here {} x {}.", model->other_name,
                      theirs.n_layers, theirs.n_kv_heads, mine.n_layers, mine.n_kv_heads);
      return model;
    }
    model->replayed = params.other->layer_life(params.sequence, params.layer);
    const TokenAlignment alignment = align_tokens(params.trace->sequence(params.sequence)->tokens,
                                                  params.other->sequence(params.sequence)->tokens);
    model->n_compared = std::min({alignment.n_common, model->n_steps, model->replayed->n_steps});
    model->notes.push_back(fmt::format("the {} tokens that both recordings share; other: {}",
                                       model->n_compared, model->other_name));
  } else if (params.source != kRecorded) {
    const uint64_t replay_key =
        mix_key({params.trace->version(), reinterpret_cast<uintptr_t>(params.trace.get()),
                 static_cast<uint64_t>(params.sequence), static_cast<uint64_t>(params.layer),
                 std::hash<std::string>{}(params.what_if.policy + " " + params.what_if.budget)});
    const auto replayed = keep(cache, cache.replayed_key, cache.replayed, replay_key, [&] {
      return replay_layer_life(reader, params.sequence, params.layer, params.what_if.policy,
                               params.what_if.budget);
    });
    if (params.source == kWhatIf) {
      model->life = replayed;
    } else {
      model->replayed = replayed;
      model->n_compared = model->n_steps;
    }
    model->notes.push_back(fmt::format("open loop: {} at {}{}", params.what_if.policy, params.what_if.budget,
                                       params.scope == kAllHeads ? "; this layer" : ""));
  }
  model->texts = params.trace->token_texts(params.sequence);
  model->part_names = header.policy.score_parts;
  const uint64_t head_key = mix_key(
      {params.trace->version(), static_cast<uint64_t>(reinterpret_cast<uintptr_t>(params.trace.get())),
       static_cast<uint64_t>(params.sequence), static_cast<uint64_t>(params.layer),
       static_cast<uint64_t>(params.kv_head), static_cast<uint64_t>(params.source == kWhatIf),
       std::hash<std::string>{}(params.source == kWhatIf ? params.what_if.policy + params.what_if.budget
                                                         : "")});
  model->pixels.assign(static_cast<size_t>(params.view.width) * params.view.height, 0);
  model->summary = summarize_lifetimes(*model->life, params.kv_head, 0, model->n_steps);
  if (params.rows == kSlots) {
    model->slots = keep(cache, cache.slots_key, cache.slots, head_key, [&] {
      return slot_history(*model->life, params.kv_head, header.policy.rule.reclaim);
    });
    model->n_rows = model->slots->n_slots;
    model->exact_order = model->slots->exact_order;
    if (!model->exact_order)
      model->notes.push_back(
          "The order of the survivors after a compaction is not recorded; they are drawn in order of "
          "position.");
    paint_slots(params, *model);
  } else {
    model->n_rows = model->n_steps;
    if (params.colour == kAttention && params.scope == kHead && params.source < kDifference) {
      model->attention = keep(cache, cache.attention_key, cache.attention, head_key,
                              [&] { return read_head_attention(reader, *model->life, params.kv_head); });
      if (!model->attention->absence.empty()) model->notes.push_back(model->attention->absence);
      model->from_sketch = model->attention->from_sketch;
      model->has_regret = !model->attention->missed.empty();
    }
    if (params.source >= kDifference) {
      paint_difference(params, *model);
    } else {
      paint_positions(params, *model);
    }
  }
  static std::atomic<uint64_t> pictures{0};
  model->picture = ++pictures;
  return model;
}

class LifeMapPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<LifeModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    if (trace_ != ui.trace.get()) {
      trace_ = ui.trace.get();
      fit_ = true;
    }
    if (fit_) {
      x_min_ = 0, x_max_ = std::max(1, ui.n_steps);
      y_min_ = 0, y_max_ = std::max(1, rows_ == kSlots && n_slots_ > 0 ? n_slots_ : ui.n_steps);
    }
    LifeParams params{.trace = ui.trace,
                      .sequence = ui.selection.sequence,
                      .layer = ui.selection.layer,
                      .kv_head = ui.selection.kv_head,
                      .scope = scope_,
                      .rows = rows_,
                      .colour = colour_,
                      .source = source_of(ui),
                      .what_if = ui.what_if,
                      .other = other_trace(ui),
                      .view = {x_min_, x_max_, y_min_, y_max_, width_, height_},
                      .theme = ui.theme};
    const uint64_t key = mix_key(
        {reinterpret_cast<uintptr_t>(trace_), ui.trace->version(), static_cast<uint64_t>(params.sequence),
         static_cast<uint64_t>(params.layer), static_cast<uint64_t>(params.kv_head),
         static_cast<uint64_t>(scope_ * 100 + rows_ * 10 + colour_), static_cast<uint64_t>(params.source),
         std::hash<std::string>{}(ui.what_if.policy + " " + ui.what_if.budget),
         reinterpret_cast<uintptr_t>(params.other.get()), static_cast<uint64_t>(ui.theme.kind),
         static_cast<uint64_t>(width_), static_cast<uint64_t>(height_), std::bit_cast<uint64_t>(x_min_),
         std::bit_cast<uint64_t>(x_max_), std::bit_cast<uint64_t>(y_min_), std::bit_cast<uint64_t>(y_max_)});
    return {key, [params, cache = cache_] { return prepare(params, *cache); }};
  }

  void controls(Ui& ui) override {
    bool changed = choose("##scope", scope_, {"this kv head", "this layer", "all heads"}, ui.px(112));
    ImGui::SetItemTooltip(
        "Whose tokens: the selected kv head, the mean over the layer's kv heads, or over all of them");
    ImGui::SameLine();
    changed |= choose("##rows", rows_, {"positions", "slots"}, ui.px(92));
    ImGui::SetItemTooltip(
        "positions: one row a token. slots: one row a cache slot, coloured by the age of what is in it");
    if (rows_ == kPositions) {
      ImGui::SameLine();
      choose("##colour", colour_, {"held", "attention"}, ui.px(96));
      ImGui::SetItemTooltip(
          "attention: what each token received, and what evicted tokens would have received "
          "(regret)");
    }
    // Only sources that are there can be chosen.
    std::vector<const char*> names = {"recorded"};
    std::vector<int> sources = {kRecorded};
    if (!ui.what_if.policy.empty()) {
      names.insert(names.end(), {"what if", "difference"});
      sources.insert(sources.end(), {kWhatIf, kDifference});
    }
    const auto other = other_trace(ui);
    const std::string against = other ? fmt::format("against {}", other->name()) : std::string();
    if (other) names.push_back(against.c_str()), sources.push_back(kOther);
    if (sources.size() > 1) {
      int chosen = static_cast<int>(std::ranges::find(sources, source_of(ui)) - sources.begin());
      const float width = std::clamp(ImGui::CalcTextSize(names[static_cast<size_t>(chosen)]).x + ui.px(44),
                                     ui.px(130), ui.px(260));
      same_line_if_fits(width);
      if (choose("##source", chosen, names, width)) source_ = sources[static_cast<size_t>(chosen)];
      if (!ui.what_if.policy.empty())
        ImGui::SetItemTooltip("what if: %s at %s, replayed over the recorded q, k, v",
                              ui.what_if.policy.c_str(), ui.what_if.budget.c_str());
    }
    ImGui::SameLine();
    if (ImGui::Button("Fit")) changed = true;
    if (changed) fit_ = true;
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const LifeModel&>(base);
    draw_controls(ui, model);
    n_slots_ = model.rows == kSlots ? model.n_rows : n_slots_;
    if (!ImPlot::BeginPlot("##lives", ImVec2(-1, -1),
                           ImPlotFlags_NoTitle | ImPlotFlags_NoLegend | ImPlotFlags_NoFrame |
                               ImPlotFlags_NoMouseText | ImPlotFlags_Crosshairs))
      return;
    ImPlot::SetupAxis(ImAxis_X1, "step", ImPlotAxisFlags_NoGridLines);
    ImPlot::SetupAxis(ImAxis_Y1, model.rows == kSlots ? "slot" : "token position",
                      ImPlotAxisFlags_NoGridLines | ImPlotAxisFlags_Invert);
    ImPlot::SetupAxisFormat(ImAxis_X1, "%.0f");
    ImPlot::SetupAxisFormat(ImAxis_Y1, "%.0f");
    ImPlot::SetupAxisLimitsConstraints(ImAxis_X1, 0, std::max(1, model.n_steps));
    ImPlot::SetupAxisLimitsConstraints(ImAxis_Y1, 0, std::max(1, model.n_rows));
    ImPlot::SetupAxisZoomConstraints(ImAxis_X1, 4, 1e9);
    ImPlot::SetupAxisZoomConstraints(ImAxis_Y1, 4, 1e9);
    ImPlot::SetupAxisLimits(ImAxis_X1, x_min_, x_max_, fit_ ? ImPlotCond_Always : ImPlotCond_Once);
    ImPlot::SetupAxisLimits(ImAxis_Y1, y_min_, y_max_, fit_ ? ImPlotCond_Always : ImPlotCond_Once);
    round_ticks(ui, ImAxis_X1, x_min_, x_max_, static_cast<float>(width_));
    round_ticks(ui, ImAxis_Y1, y_min_, y_max_, static_cast<float>(height_));
    ImPlot::SetupFinish();
    const ImVec2 size = ImPlot::GetPlotSize();
    width_ = std::clamp(static_cast<int>(size.x), 16, 8192);
    height_ = std::clamp(static_cast<int>(size.y), 16, 8192);
    const ImPlotRect limits = ImPlot::GetPlotLimits();
    x_min_ = limits.X.Min, x_max_ = limits.X.Max, y_min_ = limits.Y.Min, y_max_ = limits.Y.Max;
    texture_.show(model.picture, model.view.width, model.view.height, model.pixels);
    const ImVec2 uv = texture_.uv_max();
    // Row 0 is the lowest position; with the inverted axis it lies on top.
    ImPlot::PlotImage("##map", texture_.texture(), ImPlotPoint(model.view.x_min, model.view.y_min),
                      ImPlotPoint(model.view.x_max, model.view.y_max), ImVec2(0, uv.y), ImVec2(uv.x, 0));
    draw_marks(ui, model, limits);
    interact(ui, model);
    ImPlot::EndPlot();
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const LifeModel&>(base);
    Table table{
        {"pos", "text", "birth_step", "evicted_after_step", "lifetime_steps", "slot", "score", "threshold"},
        {}};
    for (int pos = 0; pos < model.n_steps && model.life; ++pos) {
      const TraceEviction* drop = model.life->drop(model.kv_head, pos);
      std::vector<std::string> row{std::to_string(pos), visible_token(text_of(model, pos)),
                                   std::to_string(pos)};
      if (drop != nullptr) {
        for (const std::string& field :
             {std::to_string(drop->step), std::to_string(drop->step - pos), std::to_string(drop->slot),
              fmt::format("{:.9g}", drop->score), fmt::format("{:.9g}", drop->threshold)})
          row.push_back(field);
      } else {
        row.resize(8);
      }
      table.rows.push_back(std::move(row));
    }
    return table;
  }

  std::optional<Figure> figure(const Ui& ui, const DrawModel& base) const override {
    const auto& model = static_cast<const LifeModel&>(base);
    Figure figure{.title = fmt::format("Layer {}, kv head {}: {}", model.layer, model.kv_head,
                                       ui.trace ? ui.trace->reader().header().policy.spec : ""),
                  .x_label = "step",
                  .y_label = model.rows == kSlots ? "slot" : "token position",
                  .x_min = model.view.x_min,
                  .x_max = model.view.x_max,
                  .y_min = model.view.y_min,
                  .y_max = model.view.y_max,
                  .y_down = true,
                  .images = {},
                  .series = {}};
    figure.images.push_back({model.view.width, model.view.height, model.pixels, model.view.x_min,
                             model.view.x_max, model.view.y_min, model.view.y_max});
    return figure;
  }

  std::string sql(const Ui& ui) const override {
    return fmt::format(
        "SELECT step, position, slot, score, threshold, reason FROM kv_eviction WHERE sequence = {} AND "
        "layer = {} AND (kv_head = {} OR kv_head = -1) ORDER BY step",
        ui.selection.sequence, ui.selection.layer, ui.selection.kv_head);
  }

  std::string state() const override { return fmt::format("{} {} {} {}", scope_, rows_, colour_, source_); }
  void set_state(std::string_view text) override {
    std::sscanf(std::string(text).c_str(), "%d %d %d %d", &scope_, &rows_, &colour_, &source_);
    scope_ = std::clamp(scope_, 0, 2), rows_ = std::clamp(rows_, 0, 1), colour_ = std::clamp(colour_, 0, 1),
    source_ = std::clamp(source_, 0, 3);
    fit_ = true;
  }

 private:
  // The open trace behind the shown one; null: there is one only.
  static std::shared_ptr<TraceSource> other_trace(const Ui& ui) {
    const auto& traces = ui.document.traces();
    return traces.size() < 2 ? nullptr : traces[(ui.document.primary() + 1) % traces.size()];
  }
  int source_of(const Ui& ui) const {
    const bool there = source_ == kOther ? ui.document.traces().size() > 1 : !ui.what_if.policy.empty();
    return there ? source_ : static_cast<int>(kRecorded);
  }

  static std::string text_of(const LifeModel& model, int pos) {
    return model.texts && static_cast<size_t>(pos) < model.texts->size()
               ? (*model.texts)[static_cast<size_t>(pos)]
               : std::string();
  }

  void draw_controls(Ui& ui, const LifeModel& model) {
    if (rows_ == kSlots) {
      same_line_if_fits(ui.px(230));
      ramp_legend(ui, *ui.theme.sequential, "0", fmt::format("{}", model.n_steps).c_str(), "age, steps (log)",
                  ui.px(70));
    } else if (model.attention && model.attention->absence.empty()) {
      same_line_if_fits(ui.px(230));
      Ramp ramp;
      for (size_t i = 0; i < ramp.size(); ++i)
        ramp[i] = attention_colour(
            ui.theme, kAttentionFloor * std::pow(1 / kAttentionFloor, static_cast<float>(i) / 255.0F));
      ramp_legend(ui, ramp, "0.001", "1", "attention (log)", ui.px(70));
      if (model.has_regret) {
        ImGui::SameLine();
        swatch(ui, ui.theme.missed, "missed");
      }
    } else if (model.source >= kDifference) {
      same_line_if_fits(ui.px(280));
      swatch(ui, both_colour(ui.theme), "both");
      ImGui::SameLine();
      swatch(ui, ui.theme.series[1], model.source == kOther ? "this only" : "recorded only");
      ImGui::SameLine();
      swatch(ui, ui.theme.series[3], model.source == kOther ? "other only" : "what if only");
    } else {
      same_line_if_fits(ui.px(150));
      swatch(ui, ui.theme.map_alive, "held");
      ImGui::SameLine();
      swatch(ui, ui.theme.map_evicted, "evicted");
    }
    same_line_if_fits(ui.px(70));
    if (model.rows == kPositions && model.colour == kAttention) {
      badge(ui, model.from_sketch ? Provenance::sampled : Provenance::derived,
            model.from_sketch ? "The heaviest 32 attention weights of each step, recorded (tier sketch)."
                              : "Computed from the recorded q and k over all recorded tokens; mean over the "
                                "group's query heads.");
    } else if (model.source == kOther) {
      badge(ui, Provenance::derived, "Difference of the eviction records of both recordings.");
    } else if (model.source != kRecorded) {
      badge(ui, Provenance::derived, "Replayed over the recorded q, k and v (open loop).");
    } else {
      badge(ui, Provenance::measured,
            "Eviction records of the trace: every victim, with step, slot and score.");
    }
    if (model.scope == kHead && model.summary.evictions > 0) {
      const std::string text = fmt::format(
          "layer {}, kv head {}: {} evictions, median lifetime {} steps", model.layer, model.kv_head,
          format_count(static_cast<double>(model.summary.evictions)), model.summary.median_lifetime_steps);
      same_line_if_fits(ImGui::CalcTextSize(text.c_str()).x);
      ImGui::TextDisabled("%s", text.c_str());
    }
  }

  static void swatch(const Ui& ui, ImU32 colour, const char* name) {
    ImGui::AlignTextToFramePadding();
    const ImVec2 at = ImGui::GetCursorScreenPos();
    const float side = ui.px(11), top = at.y + (ImGui::GetFrameHeight() - side) / 2;
    ImGui::GetWindowDrawList()->AddRectFilled(ImVec2(at.x, top), ImVec2(at.x + side, top + side), colour);
    ImGui::GetWindowDrawList()->AddRect(ImVec2(at.x, top), ImVec2(at.x + side, top + side), ui.theme.grid);
    ImGui::Dummy(ImVec2(side, ImGui::GetFrameHeight()));
    ImGui::SameLine(0, ui.px(4));
    ImGui::AlignTextToFramePadding();
    ImGui::TextUnformatted(name);
  }

  void draw_marks(Ui& ui, const LifeModel& model, const ImPlotRect& limits) {
    ImDrawList* list = ImPlot::GetPlotDrawList();
    ImPlot::PushPlotClipRect();
    const auto horizontal = [&](double y, ImU32 colour) {
      list->AddLine(ImPlot::PlotToPixels(limits.X.Min, y), ImPlot::PlotToPixels(limits.X.Max, y), colour,
                    ui.px(1));
    };
    if (model.rows == kPositions) {
      if (model.n_prompt > 0) horizontal(model.n_prompt, Theme::with_alpha(ui.theme.muted, 0.9F));
      if (ui.selection.has_range()) {
        list->AddRectFilled(ImPlot::PlotToPixels(limits.X.Min, ui.selection.token_begin),
                            ImPlot::PlotToPixels(limits.X.Max, ui.selection.token_end),
                            Theme::with_alpha(ui.theme.selection, 0.12F));
      }
      if (ui.selection.pinned_token >= 0) horizontal(ui.selection.pinned_token + 0.5, ui.theme.selection);
      if (model.n_prompt > 0) {
        const ImVec2 at = ImPlot::PlotToPixels(limits.X.Min, static_cast<double>(model.n_prompt));
        const ImVec2 text = ImGui::CalcTextSize("prompt above");
        const float right = ImPlot::GetPlotPos().x + ImPlot::GetPlotSize().x - text.x - ui.px(6);
        const ImVec2 low(right, std::max(at.y - text.y - ui.px(2), ImPlot::GetPlotPos().y + ui.px(2)));
        list->AddRectFilled(ImVec2(low.x - ui.px(4), low.y),
                            ImVec2(low.x + text.x + ui.px(4), low.y + text.y),
                            Theme::with_alpha(ui.theme.background, 0.8F), ui.px(3));
        list->AddText(low, ui.theme.text, "prompt above");
      }
    }
    ImPlot::PopPlotClipRect();
    step_cursor(ui, false);
  }

  void interact(Ui& ui, const LifeModel& model) {
    if (ImGui::IsMouseDoubleClicked(ImGuiMouseButton_Left) && ImPlot::IsPlotHovered()) {
      fit_ = true;
      return;
    }
    if (model.rows == rows_) fit_ = false;  // a model of the other kind has other limits
    if (!ImPlot::IsPlotHovered()) return;
    const ImPlotPoint mouse = ImPlot::GetPlotMousePos();
    const int step = static_cast<int>(std::floor(mouse.x)), row = static_cast<int>(std::floor(mouse.y));
    if (step < 0 || step >= model.n_steps || row < 0 || row >= model.n_rows) return;
    int pos = row;
    if (model.rows == kSlots) {
      pos = -1;
      for (const SlotStay& stay : model.slots->stays) {
        if (stay.slot == row && stay.begin <= step && step < stay.end) pos = stay.pos;
      }
    }
    if (ImGui::IsMouseReleased(ImGuiMouseButton_Left) &&
        ImGui::GetMouseDragDelta(ImGuiMouseButton_Left, 0).x == 0) {
      if (ImGui::GetIO().KeyCtrl) {
        ui.selection.pinned_token = pos;
      } else {
        ui.select_step(step);
      }
    }
    if (ImGui::BeginTooltip()) {
      if (pos < 0) {
        ImGui::Text("step %d, slot %d: empty", step, row);
      } else {
        tooltip(ui, model, step, pos, row);
      }
      ImGui::EndTooltip();
    }
  }

  static void tooltip(Ui& ui, const LifeModel& model, int step, int pos, int row) {
    const std::string text = visible_token(text_of(model, pos));
    ImGui::PushFont(ui.fonts.mono, 0);
    ImGui::Text("%s", text.empty() ? "(text not recorded)" : fmt::format("\"{}\"", text).c_str());
    ImGui::PopFont();
    ImGui::Text("token %d%s%s", pos, pos < model.n_prompt ? ", prompt" : "",
                model.rows == kSlots ? fmt::format(", slot {}", row).c_str() : "");
    if (pos > step) {
      ImGui::TextDisabled("born at step %d", pos);
      return;
    }
    const TraceEviction* drop = model.life->drop(model.kv_head, pos);
    if (drop == nullptr) {
      ImGui::Text("born at step %d, held to the end", pos);
    } else {
      ImGui::Text("born at step %d, evicted after step %d (age %d)", pos, drop->step, drop->step - pos);
      ImGui::Text("slot %d, reason: %s", drop->slot,
                  drop->reason == EvictionReason::over_budget ? "over budget" : "prompt over budget");
      if (std::isinf(drop->threshold)) {
        ImGui::Text("score %s; nothing else was left to keep", format_value(drop->score).c_str());
      } else if (std::isnan(drop->threshold)) {
        ImGui::Text("score %s; the device kept the others' to itself", format_value(drop->score).c_str());
      } else {
        ImGui::Text("score %s, lowest kept %s", format_value(drop->score).c_str(),
                    format_value(drop->threshold).c_str());
      }
      for (size_t i = 0; i < model.part_names.size() && i < drop->parts.size(); ++i)
        ImGui::Text("  %s %s", model.part_names[i].c_str(), format_value(drop->parts[i]).c_str());
    }
    if (model.attention && static_cast<size_t>(pos) < model.attention->received.size()) {
      ImGui::Text("attention received while held: %s",
                  format_value(model.attention->received[static_cast<size_t>(pos)]).c_str());
      if (!model.attention->missed.empty())
        ImGui::Text("attention missed after eviction: %s",
                    format_value(model.attention->missed[static_cast<size_t>(pos)]).c_str());
    }
    if (model.scope != kHead)
      ImGui::TextDisabled("of layer %d, kv head %d; colours: mean over heads", model.layer, model.kv_head);
  }

  int scope_ = kHead, rows_ = kPositions, colour_ = kHeld, source_ = kRecorded;
  const TraceSource* trace_ = nullptr;
  double x_min_ = 0, x_max_ = 1, y_min_ = 0, y_max_ = 1;
  int width_ = 640, height_ = 400, n_slots_ = 0;
  bool fit_ = true;
  MapTexture texture_;
  std::shared_ptr<HeadCache> cache_ = std::make_shared<HeadCache>();
};

}  // namespace

std::unique_ptr<Panel> make_life_map_panel() {
  return std::make_unique<LifeMapPanel>();
}

}  // namespace kvlapse::gui
