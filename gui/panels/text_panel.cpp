// Text: the generation as it reads, each token coloured by what became of it.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <mutex>
#include <utility>

#include "core/model/text_search.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "trace/views/head_attention.h"
#include "trace/views/token_values.h"

namespace kvlapse::gui {
namespace {

enum Mode { kHolders, kLifetime, kAttention, kRegret };
constexpr std::array<const char*, 4> kModeNames = {"held by heads", "lifetime", "attention", "regret"};
constexpr std::array<const char*, 4> kModeFrom = {
    "Share of all kv heads of the model that hold the token after the current step; from the eviction "
    "records.",
    "Steps between birth and eviction in the selected kv head; tokens held to the end count to the end.",
    "Attention of the current step in the selected kv head, mean over its query heads.",
    "Attention that the token would have received after its eviction in the selected kv head, summed; from "
    "recorded q and k."};

constexpr std::chrono::milliseconds kReadSlice{80};  // of a worker, before the picture is shown again

struct TextLine {
  int first = 0, count = 0;  // tokens
};

// Line breaks for a width in letters; independent of colours.
struct TextLayout {
  std::vector<std::string> pieces;  // visible text of each token
  std::vector<int> columns;         // letters of each piece
  std::vector<TextLine> lines;
};

struct TextModel final : DrawModel {
  std::shared_ptr<const TextLayout> layout;
  std::vector<float> values;  // 0..1 for the ramp, negative: not there yet
  std::vector<float> raw;     // what the tooltip says
  std::vector<int> matches;   // tokens
  std::vector<char> is_match;
  int mode = kHolders, step = 0, n_prompt = 0, n_heads = 0;  // kHolders: of the layers read so far
  float most = 1;
  std::string search_problem;
  bool texts_known = true;
};

struct TextParams {
  std::shared_ptr<TraceSource> trace;
  Selection selection;
  int mode = kHolders, columns = 60;
  std::string search;
  bool regex = false;
};

struct TextCache {
  std::mutex mutex;
  uint64_t layout_key = 0, regret_key = 0, holders_key = 0;
  std::shared_ptr<const TextLayout> layout;
  std::shared_ptr<const HeadAttention> attention;
};

int letters(const std::string& text) {
  return static_cast<int>(
      std::ranges::count_if(text, [](char c) { return (static_cast<unsigned char>(c) & 0xc0) != 0x80; }));
}

TextLayout make_layout(const std::vector<std::string>& texts, const std::vector<int32_t>& ids, int n,
                       int columns) {
  TextLayout layout;
  TextLine line;
  int used = 0;
  for (int i = 0; i < n; ++i) {
    const std::string& text =
        static_cast<size_t>(i) < texts.size() ? texts[static_cast<size_t>(i)] : std::string();
    std::string piece = text.empty() ? fmt::format("<{}>", ids[static_cast<size_t>(i)]) : visible_token(text);
    const int width = letters(piece);
    if (used > 0 && used + width > columns) {
      layout.lines.push_back(line);
      line = {i, 0};
      used = 0;
    }
    ++line.count;
    used += width;
    layout.pieces.push_back(std::move(piece));
    layout.columns.push_back(width);
    if (text.ends_with('\n')) {
      layout.lines.push_back(line);
      line = {i + 1, 0};
      used = 0;
    }
  }
  if (line.count > 0) layout.lines.push_back(line);
  return layout;
}

// The text first, then layer after layer, a few at a time: all heads of a long trace take seconds to read.
void read_holders(const TextParams& params, TextCache& cache, TextModel& model) {
  const auto until = std::chrono::steady_clock::now() + kReadSlice;
  const CacheGeometry& geometry = params.trace->reader().header().geometry;
  const uint64_t key = reinterpret_cast<uintptr_t>(params.trace.get());
  bool read = false;  // this trace's text was shown already
  {
    const std::scoped_lock lock(cache.mutex);
    read = std::exchange(cache.holders_key, key) == key;
  }
  std::vector<int32_t> holders(model.raw.size(), 0);
  int n_layers = 0;
  for (int layer = 0; layer < geometry.n_layers; ++layer) {
    auto evicted = params.trace->evicted_at_if_read(params.selection.sequence, layer);
    if (!evicted && read && std::chrono::steady_clock::now() < until)
      evicted = params.trace->evicted_at(params.selection.sequence, layer);
    if (!evicted) continue;
    count_holders(*evicted, geometry.n_kv_heads, params.selection.step, holders);
    ++n_layers;
  }
  model.partial = n_layers < geometry.n_layers;
  model.n_heads = n_layers * geometry.n_kv_heads;
  model.most = static_cast<float>(std::max(1, model.n_heads));
  if (model.partial)
    model.notes.push_back(fmt::format("{} of {} layers read so far", n_layers, geometry.n_layers));
  std::ranges::copy(holders, model.raw.begin());
}

DrawModelPtr prepare(const TextParams& params, TextCache& cache) {
  auto model = std::make_shared<TextModel>();
  const TraceReader& reader = params.trace->reader();
  const Selection& selection = params.selection;
  const int n = params.trace->n_steps(selection.sequence);
  if (n == 0) {
    model->absence = "The trace holds no token yet. When it is being recorded, the text grows here.";
    return model;
  }
  const auto facts = params.trace->sequence(selection.sequence);
  const auto texts = params.trace->token_texts(selection.sequence);
  model->mode = params.mode, model->step = selection.step, model->n_prompt = facts->n_prompt;
  model->texts_known = std::ranges::any_of(*texts, [](const std::string& text) { return !text.empty(); });
  if (!model->texts_known)
    model->notes.push_back("The trace names token ids without their text; ids are shown in <>.");
  const uint64_t trace_key = mix_key({reinterpret_cast<uintptr_t>(params.trace.get()),
                                      params.trace->version(), static_cast<uint64_t>(selection.sequence)});
  const uint64_t layout_key = mix_key({trace_key, static_cast<uint64_t>(params.columns)});
  {
    const std::scoped_lock lock(cache.mutex);
    if (cache.layout_key == layout_key) model->layout = cache.layout;
  }
  if (!model->layout) {
    model->layout = std::make_shared<const TextLayout>(make_layout(*texts, facts->tokens, n, params.columns));
    const std::scoped_lock lock(cache.mutex);
    cache.layout_key = layout_key;
    cache.layout = model->layout;
  }
  model->raw.assign(n, 0);
  const auto life = params.mode == kLifetime || params.mode == kRegret
                        ? params.trace->layer_life(selection.sequence, selection.layer)
                        : nullptr;
  switch (params.mode) {
    case kHolders: {
      read_holders(params, cache, *model);
      break;
    }
    case kLifetime: {
      model->raw = token_lifetimes(*life, selection.kv_head);
      model->most = std::max(1.0F, *std::ranges::max_element(model->raw));
      break;
    }
    case kAttention: {
      std::vector<float> row =
          read_attention_row(reader, selection.sequence, selection.layer, selection.kv_head, selection.step);
      if (row.empty()) {
        model->absence = fmt::format(
            "No attention of layer {} at step {}: record with --tier sketch (generated tokens) or --tier "
            "qkv.",
            selection.layer, selection.step);
        return model;
      }
      row.resize(n, 0);
      model->raw = std::move(row);
      model->most = std::max(1e-6F, *std::ranges::max_element(model->raw));
      break;
    }
    default: {
      const uint64_t key = mix_key(
          {trace_key, static_cast<uint64_t>(selection.layer), static_cast<uint64_t>(selection.kv_head)});
      std::shared_ptr<const HeadAttention> attention;
      {
        const std::scoped_lock lock(cache.mutex);
        if (cache.regret_key == key) attention = cache.attention;
      }
      if (!attention) {
        attention =
            std::make_shared<const HeadAttention>(read_head_attention(reader, *life, selection.kv_head));
        const std::scoped_lock lock(cache.mutex);
        cache.regret_key = key;
        cache.attention = attention;
      }
      if (attention->missed.empty()) {
        model->absence = attention->absence.empty()
                             ? "Regret needs the recorded q and k of the layer: record with --tier qkv."
                             : attention->absence;
        return model;
      }
      model->raw = attention->missed;
      model->raw.resize(n, 0);
      if (std::ranges::all_of(model->raw, [](float missed) { return missed == 0; })) {
        model->absence = fmt::format(
            "No regret: layer {}, kv head {} evicted no token that later steps would have attended to{}.",
            selection.layer, selection.kv_head,
            reader.header().policy.evicts ? "" : " (this recording evicts nothing)");
        return model;
      }
      model->most = std::max(1e-6F, *std::ranges::max_element(model->raw));
    }
  }
  model->values.resize(n);
  const bool root = params.mode == kAttention || params.mode == kRegret;  // long tails
  for (int i = 0; i < n; ++i) {
    const float share = model->raw[i] / model->most;
    model->values[i] = i > selection.step && params.mode != kLifetime ? -1 : root ? std::sqrt(share) : share;
  }
  if (!params.search.empty()) {
    std::string text;
    std::vector<size_t> starts;
    for (int i = 0; i < n; ++i) {
      starts.push_back(text.size());
      text += static_cast<size_t>(i) < texts->size() ? (*texts)[static_cast<size_t>(i)] : std::string();
    }
    model->is_match.assign(n, 0);
    try {
      for (const TextMatch& match : find_text(text, params.search, params.regex)) {
        const auto first = std::ranges::upper_bound(starts, match.begin) - starts.begin() - 1;
        model->matches.push_back(static_cast<int>(first));
        for (auto i = first; i < n && starts[static_cast<size_t>(i)] < match.end; ++i)
          model->is_match[static_cast<size_t>(i)] = 1;
      }
    } catch (const std::exception& error) {
      model->search_problem = error.what();
    }
  }
  return model;
}

class TextPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<TextModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    TextParams params{.trace = ui.trace,
                      .selection = ui.selection,
                      .mode = mode_,
                      .columns = columns_,
                      .search = search_,
                      .regex = regex_};
    const uint64_t key =
        mix_key({reinterpret_cast<uintptr_t>(ui.trace.get()), ui.trace->version(),
                 static_cast<uint64_t>(ui.selection.sequence), static_cast<uint64_t>(ui.selection.step),
                 mode_ == kHolders ? 0 : static_cast<uint64_t>(ui.selection.layer),
                 mode_ == kHolders ? 0 : static_cast<uint64_t>(ui.selection.kv_head),
                 static_cast<uint64_t>(mode_), static_cast<uint64_t>(columns_),
                 std::hash<std::string>{}(params.search), static_cast<uint64_t>(regex_)});
    return {key, [params, cache = cache_] { return prepare(params, *cache); }};
  }

  void controls(Ui& ui) override {
    choose("##mode", mode_, {kModeNames.begin(), kModeNames.end()}, ui.px(120));
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const TextModel&>(base);
    draw_controls(ui, model);
    if (!model.search_problem.empty())
      cut_text(ui, model.search_problem, ImGui::GetContentRegionAvail().x, true);
    ImGui::BeginChild("##text", ImVec2(0, 0), ImGuiChildFlags_None, ImGuiWindowFlags_None);
    ImGui::PushFont(ui.fonts.mono, 0);
    draw_lines(ui, model);
    ImGui::PopFont();
    ImGui::EndChild();
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const TextModel&>(base);
    Table table{{"pos", "text", kModeNames[static_cast<size_t>(model.mode)]}, {}};
    for (size_t i = 0; i < model.raw.size(); ++i)
      table.rows.push_back({std::to_string(i), model.layout->pieces[i], fmt::format("{:.7g}", model.raw[i])});
    return table;
  }
  std::string sql(const Ui& ui) const override {
    return fmt::format(
        "SELECT step, token, text FROM kv_token LEFT JOIN KV_TOKEN_TEXT USING(token) WHERE sequence = {} "
        "ORDER BY step",
        ui.selection.sequence);
  }
  std::string state() const override { return std::to_string(mode_); }
  void set_state(std::string_view text) override {
    mode_ = std::clamp(std::atoi(std::string(text).c_str()), 0, 3);
  }

 private:
  // Of a token whose value is this share of the most; heat fades into the ground, so that little looks like
  // little.
  static ImU32 fill_of(const Theme& theme, bool heat, float value) {
    return heat ? Theme::blend(theme.surface, theme.heat_at(0.15F + 0.85F * value), std::min(1.0F, value * 4))
                : theme.ramp(value);
  }

  void draw_controls(Ui& ui, const TextModel& model) {
    same_line_if_fits(ui.px(70));
    badge(ui, Provenance::derived, kModeFrom[static_cast<size_t>(model.mode)]);
    const std::string most = model.mode == kHolders ? std::to_string(model.n_heads)
                                                    : format_count(static_cast<double>(model.most));
    constexpr std::array<const char*, 4> kLegends = {"kv heads", "steps", "weight", "attention missed"};
    same_line_if_fits(ui.px(230));
    const bool heat = model.mode == kAttention || model.mode == kRegret;
    Ramp ramp;
    for (size_t i = 0; i < ramp.size(); ++i) {
      const float share = static_cast<float>(i) / 255.0F;
      ramp[i] = fill_of(ui.theme, heat, heat ? std::sqrt(share) : share);
    }
    ramp_legend(ui, ramp, "0", most.c_str(), kLegends[static_cast<size_t>(model.mode)], ui.px(60));
    ImGui::SetNextItemWidth(ui.px(110));
    const bool entered = ImGui::InputTextWithHint("##search", "find", text_.data(), text_.size(),
                                                  ImGuiInputTextFlags_EnterReturnsTrue);
    search_ = text_.data();
    ImGui::SameLine();
    ImGui::Checkbox("regex", &regex_);
    ImGui::SetItemTooltip("Perl-compatible regular expression");
    ImGui::SameLine();
    const bool next = ImGui::Button("Next") || entered;
    ImGui::SameLine();
    if (!search_.empty()) {
      ImGui::TextDisabled("%zu found", model.matches.size());
    } else {
      ImGui::Checkbox("follow", &follow_);
      ImGui::SetItemTooltip("Keep the current step's token in view");
    }
    if (next && !model.matches.empty()) {
      const int after = ui.selection.pinned_token;
      const auto found = std::ranges::upper_bound(model.matches, after);
      const int token = found == model.matches.end() ? model.matches.front() : *found;
      ui.selection.pinned_token = token;
      scroll_to_ = token;
    }
  }

  void draw_lines(Ui& ui, const TextModel& model) {
    const float advance = ImGui::CalcTextSize("MMMMMMMMMMMMMMMM").x / 16,
                height = ImGui::GetTextLineHeight() + ui.px(3);
    const float number_width = advance * 6.5F;
    columns_ = std::max(
        12, static_cast<int>((ImGui::GetContentRegionAvail().x - number_width - ui.px(4)) / advance));
    const TextLayout& layout = *model.layout;
    const int n_lines = static_cast<int>(layout.lines.size());
    const auto line_of = [&](int token) {
      const auto found = std::ranges::upper_bound(layout.lines, token, {}, &TextLine::first);
      return static_cast<int>(found - layout.lines.begin()) - 1;
    };
    if (follow_ && (ui.selection.step != followed_step_ || followed_layout_ != model.layout.get())) {
      followed_step_ = ui.selection.step;
      followed_layout_ = model.layout.get();
      scroll_to_ = ui.selection.step;
    }
    if (scroll_to_ >= 0) {
      const float y = static_cast<float>(line_of(scroll_to_)) * height, top = ImGui::GetScrollY(),
                  visible = ImGui::GetWindowHeight();
      if (y < top + height || y > top + visible - 2 * height)
        ImGui::SetScrollY(std::max(0.0F, y - visible / 2));
      scroll_to_ = -1;
    }
    ImDrawList* list = ImGui::GetWindowDrawList();
    const ImVec2 origin = ImGui::GetCursorScreenPos();
    const bool heat = model.mode == kAttention || model.mode == kRegret;
    const bool hovered = ImGui::IsWindowHovered();
    const ImVec2 mouse = ImGui::GetMousePos();
    const int first = std::max(0, static_cast<int>(ImGui::GetScrollY() / height) - 1),
              last = std::min(n_lines, first + static_cast<int>(ImGui::GetWindowHeight() / height) + 3);
    struct Frame {
      ImVec2 low, high;
      float width;
    };
    std::vector<Frame> frames;  // over the neighbours' fills
    for (int l = first; l < last; ++l) {
      const TextLine& line = layout.lines[static_cast<size_t>(l)];
      const float y = origin.y + static_cast<float>(l) * height;
      float x = origin.x + number_width;
      list->AddText(ImVec2(origin.x, y + ui.px(1)), Theme::with_alpha(ui.theme.muted, 0.75F),
                    fmt::format("{:>5}", line.first).c_str());
      for (int token = line.first; token < line.first + line.count; ++token) {
        const size_t i = static_cast<size_t>(token);
        const float width = advance * static_cast<float>(layout.columns[i]);
        const ImVec2 low(x, y), high(x + width, y + height - ui.px(1));
        const float value = model.values[i];
        const ImU32 fill = value < 0 ? ui.theme.surface : fill_of(ui.theme, heat, value);
        if (value >= 0) list->AddRectFilled(low, high, fill);
        list->AddText(ImVec2(x, y + ui.px(1)),
                      value < 0 ? Theme::with_alpha(ui.theme.muted, 0.7F) : Theme::ink_on(fill),
                      layout.pieces[i].c_str());
        if (token < model.n_prompt)
          list->AddLine(ImVec2(low.x, high.y), ImVec2(high.x, high.y), ui.theme.series[0], ui.px(1));
        if (!model.is_match.empty() && model.is_match[i] != 0)
          list->AddRect(low, high, ui.theme.accent, 0, ui.px(1.5F));
        if (token == ui.selection.step) frames.push_back({low, high, ui.px(1.5F)});
        if (token == ui.selection.pinned_token)
          frames.push_back({ImVec2(low.x - 1, low.y - 1), ImVec2(high.x + 1, high.y + 1), ui.px(2.5F)});
        if (hovered && mouse.x >= low.x && mouse.x < high.x && mouse.y >= low.y && mouse.y < y + height) {
          if (ImGui::IsMouseClicked(ImGuiMouseButton_Left)) {
            if (ImGui::GetIO().KeyCtrl) {
              ui.select_step(token);
            } else {
              ui.selection.pinned_token = ui.selection.pinned_token == token ? -1 : token;
            }
          }
          ImGui::PushFont(ui.fonts.text, 0);
          if (ImGui::BeginTooltip()) {
            ImGui::Text("token %d%s", token, token < model.n_prompt ? ", prompt" : "");
            if (model.mode == kHolders) {
              ImGui::Text("held by %.0f of %d kv heads after step %d", static_cast<double>(model.raw[i]),
                          model.n_heads, model.step);
            } else {
              ImGui::Text("%s: %s", kModeNames[static_cast<size_t>(model.mode)],
                          format_value(static_cast<double>(model.raw[i])).c_str());
            }
            ImGui::TextDisabled("click pins it in all panels, Ctrl+click goes to its step");
            ImGui::EndTooltip();
          }
          ImGui::PopFont();
        }
        x += width;
      }
    }
    for (const Frame& frame : frames) outline(ui, list, frame.low, frame.high, frame.width);
    ImGui::Dummy(ImVec2(1, static_cast<float>(n_lines) * height));
  }

  int mode_ = kHolders, columns_ = 60, scroll_to_ = -1, followed_step_ = -1;
  const TextLayout* followed_layout_ = nullptr;
  bool regex_ = false, follow_ = true;
  std::array<char, 256> text_{};
  std::string search_;
  std::shared_ptr<TextCache> cache_ = std::make_shared<TextCache>();
};

}  // namespace

std::unique_ptr<Panel> make_text_panel() {
  return std::make_unique<TextPanel>();
}

}  // namespace kvlapse::gui
