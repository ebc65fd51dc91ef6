// SQL: read-only queries over the open trace, with its tables at hand, a history and a plot of two columns.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"
#include "implot.h"
#include "trace/sql.h"

namespace kvlapse::gui {
namespace {

constexpr size_t kMostRows = 20000;
constexpr const char* kTables =
    "SELECT name, type FROM sqlite_master WHERE type IN ('table', 'view') AND name NOT LIKE 'sqlite_%' ORDER "
    "BY name";
constexpr std::array<const char*, 5> kExamples = {
    "SELECT step, held_tokens, evicted_tokens, total_ns * 1e-6 AS ms FROM KV_STEP ORDER BY step",
    "SELECT layer, kv_head, count(*) AS evictions FROM kv_eviction GROUP BY 1, 2 ORDER BY 3 DESC",
    "SELECT step - position AS lifetime, count(*) AS tokens FROM kv_eviction WHERE layer = 0 GROUP BY 1 "
    "ORDER BY 1",
    "SELECT step, held FROM kv_occupancy WHERE layer = 0 AND kv_head = 0",
    "SELECT key, value FROM KV_META ORDER BY key"};

struct SqlModel final : DrawModel {
  std::string sql, problem;
  std::vector<std::string> columns;
  std::vector<std::vector<std::string>> rows;
  std::vector<std::vector<double>> numbers;  // by column; empty: not numeric
  bool cut = false;
  std::vector<std::string> tables;
};

std::string text_of(const SqlValue& value) {
  if (const auto* whole = std::get_if<int64_t>(&value)) return std::to_string(*whole);
  if (const auto* real = std::get_if<double>(&value)) return fmt::format("{:.7g}", *real);
  if (const auto* text = std::get_if<std::string>(&value)) return visible_token(*text);
  if (const auto* blob = std::get_if<std::vector<std::byte>>(&value))
    return fmt::format("blob, {} bytes", blob->size());
  return "NULL";
}

DrawModelPtr run_query(const std::filesystem::path& file, const std::string& sql) {
  auto model = std::make_shared<SqlModel>();
  model->sql = sql;
  std::vector<SqlValue> row;
  SqlQuery tables(file, kTables);
  while (tables.next(row)) model->tables.push_back(text_of(row[0]));
  for (const char* table : {"kv_eviction", "kv_occupancy", "kv_sketch", "kv_token", "kv_value"})
    model->tables.emplace_back(table);
  if (sql.empty()) return model;
  try {
    SqlQuery query(file, sql);
    model->columns = query.columns();
    model->numbers.resize(model->columns.size());
    std::vector<char> numeric(model->columns.size(), 1);
    while (query.next(row)) {
      if (model->rows.size() == kMostRows) {
        model->cut = true;
        break;
      }
      std::vector<std::string> texts;
      for (size_t c = 0; c < row.size(); ++c) {
        texts.push_back(text_of(row[c]));
        if (const auto* whole = std::get_if<int64_t>(&row[c])) {
          model->numbers[c].push_back(static_cast<double>(*whole));
        } else if (const auto* real = std::get_if<double>(&row[c])) {
          model->numbers[c].push_back(*real);
        } else {
          numeric[c] = 0;
        }
      }
      model->rows.push_back(std::move(texts));
    }
    for (size_t c = 0; c < numeric.size(); ++c) {
      if (numeric[c] == 0) model->numbers[c].clear();
    }
  } catch (const std::exception& error) {
    model->problem = error.what();
  }
  return model;
}

class SqlPanel final : public Panel {
 public:
  SqlPanel() { set_text(kExamples[0]); }

  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<SqlModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    const uint64_t key = mix_key({reinterpret_cast<uintptr_t>(ui.trace.get()), static_cast<uint64_t>(runs_),
                                  std::hash<std::string>{}(submitted_)});
    return {key, [file = ui.trace->file(), sql = submitted_] { return run_query(file, sql); }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const SqlModel&>(base);
    ImGui::PushFont(ui.fonts.mono, 0);
    const bool entered = ImGui::InputTextMultiline(
        "##sql", text_.data(), text_.size(), ImVec2(-1, ImGui::GetTextLineHeight() * 4 + ui.px(10)),
        ImGuiInputTextFlags_CtrlEnterForNewLine | ImGuiInputTextFlags_EnterReturnsTrue |
            ImGuiInputTextFlags_WordWrap);
    ImGui::PopFont();
    if (ImGui::Button("Run") || entered) run();
    ImGui::SetItemTooltip("Enter runs, Ctrl+Enter is a new line");
    ImGui::SameLine();
    menu(ui, "Tables", "tables", model.tables,
         [this](const std::string& table) { set_text(fmt::format("SELECT * FROM {} LIMIT 100", table)); });
    ImGui::SameLine();
    menu(ui, "Examples", "examples", {kExamples.begin(), kExamples.end()},
         [this](const std::string& sql) { set_text(sql); });
    ImGui::SameLine();
    menu(ui, "History", "history", history_, [this](const std::string& sql) { set_text(sql); });
    ImGui::SameLine();
    ImGui::Checkbox("plot", &plot_);
    same_line_if_fits(ui.px(120));
    if (!model.problem.empty()) {
      ImGui::NewLine();
      ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.bad);
      ImGui::TextWrapped("%s", model.problem.c_str());
      ImGui::PopStyleColor();
      return;
    }
    if (model.columns.empty()) {
      ImGui::TextDisabled("no query yet");
      return;
    }
    ImGui::TextDisabled("%zu rows%s", model.rows.size(), model.cut ? " (the first ones)" : "");
    if (plot_) draw_plot(ui, model);
    draw_rows(ui, model);
  }

  Table table(const DrawModel& base) const override {
    const auto& model = static_cast<const SqlModel&>(base);
    return {model.columns, model.rows};
  }
  std::string sql(const Ui&) const override { return submitted_; }
  std::string state() const override { return text_.data(); }
  void set_state(std::string_view text) override { set_text(std::string(text)); }

 private:
  void set_text(const std::string& sql) {
    fmt::format_to_n(text_.data(), text_.size() - 1, "{}", sql).out[0] = 0;
  }
  void run() {
    submitted_ = text_.data();
    ++runs_;
    std::erase(history_, submitted_);
    history_.insert(history_.begin(), submitted_);
  }

  template <typename Chosen>
  static void menu(const Ui& ui, const char* label, const char* id, const std::vector<std::string>& items,
                   Chosen chosen) {
    ImGui::BeginDisabled(items.empty());
    if (ImGui::Button(label)) ImGui::OpenPopup(id);
    ImGui::EndDisabled();
    ImGui::SetNextWindowSizeConstraints(ImVec2(0, 0), ImVec2(ui.px(900), ui.px(420)));
    if (!ImGui::BeginPopup(id)) return;
    for (const std::string& item : items) {
      if (ImGui::MenuItem(item.c_str())) chosen(item);
    }
    ImGui::EndPopup();
  }

  void draw_plot(Ui& ui, const SqlModel& model) {
    std::vector<const char*> names;
    std::vector<size_t> columns;
    for (size_t c = 0; c < model.columns.size(); ++c) {
      if (model.numbers[c].empty()) continue;
      names.push_back(model.columns[c].c_str());
      columns.push_back(c);
    }
    if (names.size() < 2) {
      ImGui::TextDisabled("a plot needs two columns of numbers");
      return;
    }
    x_ = std::clamp(x_, 0, static_cast<int>(names.size()) - 1),
    y_ = std::clamp(y_, 0, static_cast<int>(names.size()) - 1);
    choose("x", x_, names, ui.px(140));
    ImGui::SameLine();
    choose("y", y_, names, ui.px(140));
    const std::vector<double>& xs = model.numbers[columns[static_cast<size_t>(x_)]];
    const std::vector<double>& ys = model.numbers[columns[static_cast<size_t>(y_)]];
    // A flat line at the highest value would lie under the frame.
    ImPlot::PushStyleVar(ImPlotStyleVar_FitPadding, ImVec2(0.01F, 0.06F));
    if (ImPlot::BeginPlot("##plot", ImVec2(-1, std::max(ui.px(120), ImGui::GetContentRegionAvail().y * 0.5F)),
                          ImPlotFlags_NoTitle | ImPlotFlags_NoLegend | ImPlotFlags_NoFrame)) {
      ImPlot::SetupAxes(names[static_cast<size_t>(x_)], names[static_cast<size_t>(y_)],
                        ImPlotAxisFlags_AutoFit | ImPlotAxisFlags_NoGridLines, ImPlotAxisFlags_AutoFit);
      ImPlotSpec spec;
      spec.LineColor = ImGui::ColorConvertU32ToFloat4(ui.theme.series[0]);
      spec.LineWeight = ui.px(1.3F);
      ImPlot::PlotLine("##data", xs.data(), ys.data(), static_cast<int>(std::min(xs.size(), ys.size())),
                       spec);
      ImPlot::EndPlot();
    }
    ImPlot::PopStyleVar();
  }

  static void draw_rows(Ui& ui, const SqlModel& model) {
    const int n_columns = std::min(static_cast<int>(model.columns.size()), 64);
    if (!ImGui::BeginTable("##rows", n_columns,
                           ImGuiTableFlags_RowBg | ImGuiTableFlags_ScrollX | ImGuiTableFlags_ScrollY |
                               ImGuiTableFlags_Resizable | ImGuiTableFlags_BordersInnerV))
      return;
    ImGui::TableSetupScrollFreeze(0, 1);
    for (int c = 0; c < n_columns; ++c)
      ImGui::TableSetupColumn(model.columns[static_cast<size_t>(c)].c_str());
    ImGui::TableHeadersRow();
    ImGui::PushFont(ui.fonts.mono, 0);
    ImGuiListClipper clipper;
    clipper.Begin(static_cast<int>(model.rows.size()));
    while (clipper.Step()) {
      for (int r = clipper.DisplayStart; r < clipper.DisplayEnd; ++r) {
        ImGui::TableNextRow();
        for (int c = 0; c < n_columns; ++c) {
          ImGui::TableNextColumn();
          ImGui::TextUnformatted(model.rows[static_cast<size_t>(r)][static_cast<size_t>(c)].c_str());
        }
      }
    }
    ImGui::PopFont();
    ImGui::EndTable();
  }

  std::array<char, 4096> text_{};
  std::string submitted_ = kExamples[0];
  std::vector<std::string> history_;
  int runs_ = 0, x_ = 0, y_ = 1;
  bool plot_ = true;
};

}  // namespace

std::unique_ptr<Panel> make_sql_panel() {
  return std::make_unique<SqlPanel>();
}

}  // namespace kvlapse::gui
