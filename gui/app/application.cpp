#include "gui/app/application.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "gui/draw/widgets.h"
#include "imgui_internal.h"
#include "implot.h"

namespace kvlapse::gui {
namespace {

constexpr double kToastSeconds = 5;
constexpr int kWorkers = 2;
constexpr const char* kDockName = "Main dock";

std::string window_name(const PanelInfo& info) {
  return fmt::format("{}###{}", info.title, info.name);
}

}  // namespace

void Ui::select_step(int step) {
  selection.step = std::clamp(step, 0, std::max(0, n_steps - 1));
}

void Ui::select_head(int layer, int kv_head) {
  if (!trace) return;
  const CacheGeometry& geometry = trace->reader().header().geometry;
  selection.layer = std::clamp(layer, 0, geometry.n_layers - 1);
  selection.kv_head = std::clamp(kv_head, 0, geometry.n_kv_heads - 1);
}

uint64_t mix_key(std::initializer_list<uint64_t> values) {
  uint64_t hash = 0x9e3779b97f4a7c15ULL;
  for (uint64_t value : values) {
    hash ^= value + 0x9e3779b97f4a7c15ULL + (hash << 6) + (hash >> 2);
    hash *= 0xff51afd7ed558ccdULL;
    hash ^= hash >> 33;
  }
  return hash | 1;
}

Application::Application(ApplicationOptions options)
    : options_(std::move(options)), store_(options_.persistent), settings_(store_.load()) {
  ImGui::CreateContext();
  ImPlot::CreateContext();
  ImGuiIO& io = ImGui::GetIO();
  io.IniFilename = nullptr;  // layouts are ours to save
  io.ConfigFlags |= ImGuiConfigFlags_DockingEnable;
  io.ConfigInputTextCursorBlink = false;  // a blinking cursor would redraw an idle window
  io.ConfigWindowsMoveFromTitleBarOnly = true;
  io.ConfigErrorRecoveryEnableAssert = false;
  if (options_.theme) settings_.theme = *options_.theme;
  document_ = std::make_unique<Document>(options_.wake);
  preparer_ = std::make_unique<Preparer>(kWorkers, options_.wake);
  what_if_ = std::make_unique<WhatIf>(options_.wake);
  ui_ = std::make_unique<Ui>(
      Ui{.document = *document_,
         .preparer = *preparer_,
         .what_if_runner = *what_if_,
         .what_if = {},
         .quality = std::make_shared<QualitySource>(),
         .examine_machine = options_.examine_machine,
         .measure_machine = options_.measure_machine,
         .selection = {},
         .playback = {},
         .theme = make_theme(settings_.theme),
         .fonts = load_fonts(options_.builtin_font),
         .scale = options_.scale,
         .trace = nullptr,
         .n_steps = 0,
         .toast =
             [this](const std::string& text) {
               toasts_.push_back({text, ImGui::GetTime() + kToastSeconds});
             },
         .open_panel = [this](std::string_view name) { set_panel_open(name, true); },
         .open_file = [this](const std::filesystem::path& file) { open_or_tell(file); }});
  for (const PanelInfo& info : panel_registry()) {
    PanelState state{.info = &info, .panel = info.make(), .shown = nullptr, .continued = nullptr};
    if (const auto saved = settings_.panel_state.find(info.name); saved != settings_.panel_state.end())
      state.panel->set_state(saved->second);
    panels_.push_back(std::move(state));
  }
  show_alone(options_.only_panel);
  if (options_.persistent) pending_layout_ = store_.load_layout("last");
  apply_settings();
  make_commands();
}

Application::~Application() {
  preparer_.reset();
  what_if_.reset();
  if (options_.persistent) {
    for (const PanelState& state : panels_) {
      if (const std::string text = state.panel->state(); !text.empty())
        settings_.panel_state[state.info->name] = text;
    }
    store_.save(settings_);
    if (frames_ > 2) store_.save_layout("last", layout_text());
  }
  panels_.clear();
  ui_.reset();
  document_.reset();
  ImPlot::DestroyContext();
  ImGui::DestroyContext();
}

void Application::set_scale(float scale) {
  options_.scale = scale;
  apply_settings();
}

void Application::apply_settings() {
  ui_->theme = make_theme(settings_.theme);
  const float font = static_cast<float>(settings_.font_percent) / 100;
  ui_->scale = options_.scale * font;
  apply_theme(ui_->theme, ui_->scale);
  ImGui::GetStyle().FontSizeBase = kFontPixels;
  ImGui::GetIO().FontDefault = ui_->fonts.text;
}

void Application::open(const std::filesystem::path& file) {
  const bool first = document_->traces().empty();
  document_->open(file);
  if (file != what_if_->results()) settings_.remember(file);
  ui_->trace = document_->trace();
  if (ui_->trace && first) {
    ui_->n_steps = ui_->trace->n_steps(0);
    ui_->selection = {};
    ui_->selection.step = std::max(0, ui_->n_steps - 1);
  }
}

void Application::open_or_tell(const std::filesystem::path& file) {
  try {
    open(file);
  } catch (const std::exception& error) {
    ui_->toast(error.what());
  }
}

void Application::select(std::optional<int> step, std::optional<int> layer, std::optional<int> kv_head) {
  if (step) ui_->select_step(*step);
  ui_->select_head(layer.value_or(ui_->selection.layer), kv_head.value_or(ui_->selection.kv_head));
}

Application::PanelState* Application::find(std::string_view name) {
  const auto found =
      std::ranges::find_if(panels_, [&](const PanelState& state) { return state.info->name == name; });
  return found == panels_.end() ? nullptr : &*found;
}
const Application::PanelState* Application::find(std::string_view name) const {
  return const_cast<Application*>(this)->find(name);
}

void Application::show_alone(const std::string& panel) {
  const std::string name = panel.substr(0, panel.find(':'));
  PanelState* state = find(name);
  if (!name.empty() && state == nullptr) {
    std::string names;
    for (const PanelState& known : panels_)
      names += fmt::format("{}{}", names.empty() ? "" : ", ", known.info->name);
    fail_usage("--panel {}: expected one of {}", name, names);
  }
  if (name.size() < panel.size()) state->panel->set_state(std::string_view(panel).substr(name.size() + 1));
  maximised_ = name;
}

bool Application::panel_open(std::string_view name) const {
  const PanelState* state = find(name);
  return state != nullptr && state->open;
}

void Application::set_panel_open(std::string_view name, bool open) {
  if (PanelState* state = find(name)) {
    state->open = open;
    state->focus = open;
    if (!maximised_.empty() && open) maximised_ = state->info->name;
  }
}

const DrawModel* Application::shown_model(std::string_view name) const {
  const PanelState* state = find(name);
  return state == nullptr ? nullptr : state->shown.get();
}

bool Application::shows_current(std::string_view name) const {
  const PanelState* state = find(name);
  return state != nullptr && state->shown && state->submitted == state->shown_key;
}

Table Application::shown_table(std::string_view name) const {
  const PanelState* state = find(name);
  const bool shown = state != nullptr && state->shown && state->shown->absence.empty();
  return shown ? state->panel->table(*state->shown) : Table{};
}

std::optional<Figure> Application::shown_figure(std::string_view name) const {
  const PanelState* state = find(name);
  const bool shown = state != nullptr && state->shown && state->shown->absence.empty();
  return shown ? state->panel->figure(*ui_, *state->shown) : std::nullopt;
}

Application::PanelState* Application::focused() {
  PanelState* state = find(maximised_.empty() ? last_focused_ : maximised_);
  return state != nullptr ? state : find("life-map");
}

std::optional<Application::Picture> Application::take_picture_request() {
  return std::exchange(picture_, std::nullopt);
}

void Application::move_step(int by) {
  ui_->playback.playing = false;
  ui_->select_step(ui_->selection.step + by);
}

void Application::move_head(int layers, int heads) {
  ui_->select_head(ui_->selection.layer + layers, ui_->selection.kv_head + heads);
}

void Application::edit_note() {
  if (!ui_->trace) return;
  note_step_ = ui_->selection.step;
  const Note* note = document_->notes().at(note_step_);
  fmt::format_to_n(note_text_, sizeof note_text_ - 1, "{}", note != nullptr ? note->text : "").out[0] = 0;
  note_dialog_ = true;
}

void Application::make_commands() {
  commands_.clear();
  const auto add = [this](std::string title, ImGuiKeyChord chord, std::function<void()> run,
                          bool repeat = false) {
    commands_.add(std::move(title), chord, std::move(run), repeat);
  };
  add("Command palette", ImGuiMod_Ctrl | ImGuiMod_Shift | ImGuiKey_P, [this] { palette_.open(); });
  add("Help: shortcuts and panels", ImGuiMod_Shift | ImGuiKey_Slash, [this] { help_open_ = !help_open_; });
  add("Open file", ImGuiMod_Ctrl | ImGuiKey_O, [this] { open_dialog_ = true; });
  add("Settings", ImGuiMod_Ctrl | ImGuiKey_Comma, [this] { settings_open_ = !settings_open_; });
  add("Play or pause", ImGuiKey_Space, [this] { ui_->playback.playing = !ui_->playback.playing; });
  add(
      "Next step", ImGuiKey_RightArrow, [this] { move_step(1); }, true);
  add(
      "Previous step", ImGuiKey_LeftArrow, [this] { move_step(-1); }, true);
  add(
      "Forward 10 steps", ImGuiMod_Shift | ImGuiKey_RightArrow, [this] { move_step(10); }, true);
  add(
      "Back 10 steps", ImGuiMod_Shift | ImGuiKey_LeftArrow, [this] { move_step(-10); }, true);
  add(
      "Forward 100 steps", ImGuiMod_Ctrl | ImGuiKey_RightArrow, [this] { move_step(100); }, true);
  add(
      "Back 100 steps", ImGuiMod_Ctrl | ImGuiKey_LeftArrow, [this] { move_step(-100); }, true);
  add("First step", ImGuiKey_Home, [this] { move_step(-ui_->n_steps); });
  add("Last step", ImGuiKey_End, [this] { move_step(ui_->n_steps); });
  add("Play faster", ImGuiKey_Equal,
      [this] { ui_->playback.steps_per_second = std::min(ui_->playback.steps_per_second * 2, 3840.0); });
  add("Play slower", ImGuiKey_Minus,
      [this] { ui_->playback.steps_per_second = std::max(ui_->playback.steps_per_second / 2, 1.0); });
  add("Loop the selected range", ImGuiKey_L, [this] { ui_->playback.loop = !ui_->playback.loop; });
  add(
      "Layer below", ImGuiKey_DownArrow, [this] { move_head(1, 0); }, true);
  add(
      "Layer above", ImGuiKey_UpArrow, [this] { move_head(-1, 0); }, true);
  add(
      "Next kv head", ImGuiKey_RightBracket, [this] { move_head(0, 1); }, true);
  add(
      "Previous kv head", ImGuiKey_LeftBracket, [this] { move_head(0, -1); }, true);
  add("Bookmark or note at this step", ImGuiKey_B, [this] { edit_note(); });
  add("Next bookmark", ImGuiKey_N, [this] {
    for (const Note& note : document_->notes().all()) {
      if (note.step > ui_->selection.step) return ui_->select_step(note.step);
    }
  });
  add("Clear the selected range and the pinned token", ImGuiKey_Escape, [this] {
    ui_->selection.token_begin = ui_->selection.token_end = 0;
    ui_->selection.pinned_token = -1;
  });
  add("Maximise or restore the focused panel", ImGuiKey_F11, [this] {
    const PanelState* state = focused();
    maximised_ = maximised_.empty() && state != nullptr ? state->info->name : "";
  });
  add("Reset layout", 0, [this] { reset_layout_ = true; });
  add("Save layout", ImGuiMod_Ctrl | ImGuiKey_S, [this] { layout_dialog_ = true; });
  for (const std::string& name : store_.layouts()) {
    if (name != "last")
      add("Layout: " + name, 0, [this, name] { pending_layout_ = store_.load_layout(name); });
  }
  for (size_t i = 0; i < kThemeNames.size(); ++i) {
    add(fmt::format("Theme: {}", kThemeNames[i]), 0, [this, i] {
      settings_.theme = static_cast<ThemeKind>(i);
      apply_settings();
    });
  }
  add("Larger text", ImGuiMod_Ctrl | ImGuiKey_Equal, [this] {
    settings_.font_percent = std::min(settings_.font_percent + 10, 250);
    apply_settings();
  });
  add("Smaller text", ImGuiMod_Ctrl | ImGuiKey_Minus, [this] {
    settings_.font_percent = std::max(settings_.font_percent - 10, 60);
    apply_settings();
  });
  int digit = 0;
  for (const PanelState& state : panels_) {
    const std::string name = state.info->name;
    const ImGuiKeyChord chord = digit < 9 ? ImGuiMod_Ctrl | static_cast<ImGuiKey>(ImGuiKey_1 + digit) : 0;
    ++digit;
    add(fmt::format("Panel: {}", state.info->title), chord, [this, name] { set_panel_open(name, true); });
  }
  for (const char* kind : {"PNG", "SVG", "CSV"}) {
    add(fmt::format("Export the focused panel as {}", kind), 0, [this, kind] {
      if (PanelState* state = focused()) export_panel(*state, kind);
    });
  }
  add("Copy the focused panel's data as SQL", ImGuiMod_Ctrl | ImGuiMod_Shift | ImGuiKey_C, [this] {
    if (PanelState* state = focused()) export_panel(*state, "SQL");
  });
  add("Quit", ImGuiMod_Ctrl | ImGuiKey_Q, [this] { quit_ = true; });
}

namespace {

// A modal with one line of text; returns true when it was confirmed.
bool ask_line(bool& requested, const char* title, const char* hint, char* text, size_t size,
              const char* action, float width) {
  if (requested) {
    ImGui::OpenPopup(title);
    requested = false;
  }
  ImGui::SetNextWindowPos(ImGui::GetMainViewport()->GetCenter(), ImGuiCond_Appearing, ImVec2(0.5F, 0.5F));
  bool confirmed = false;
  if (ImGui::BeginPopupModal(title, nullptr,
                             ImGuiWindowFlags_AlwaysAutoResize | ImGuiWindowFlags_NoSavedSettings)) {
    if (ImGui::IsWindowAppearing()) ImGui::SetKeyboardFocusHere();
    ImGui::SetNextItemWidth(width);
    confirmed = ImGui::InputTextWithHint("##text", hint, text, size, ImGuiInputTextFlags_EnterReturnsTrue);
    confirmed |= ImGui::Button(action);
    ImGui::SameLine();
    if (ImGui::Button("Cancel") || ImGui::IsKeyPressed(ImGuiKey_Escape) || confirmed)
      ImGui::CloseCurrentPopup();
    ImGui::EndPopup();
  }
  return confirmed;
}

}  // namespace

void Application::export_panel(PanelState& state, const char* kind) {
  const std::string_view form = kind;
  if (form == "SQL") {
    const std::string sql = state.panel->sql(*ui_);
    if (sql.empty()) return ui_->toast(fmt::format("{}: its data is not one query", state.info->title));
    ImGui::SetClipboardText(sql.c_str());
    return ui_->toast("Copied: " + sql);
  }
  const std::string base = ui_->trace ? ui_->trace->file().stem().string() : "kvlapse";
  std::string suffix(form);
  std::ranges::transform(suffix, suffix.begin(),
                         [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  const std::string name = fmt::format("{}-{}.{}", base, state.info->name, suffix);
  fmt::format_to_n(export_text_, sizeof export_text_ - 1, "{}",
                   (std::filesystem::current_path() / name).string())
      .out[0] = 0;
  export_panel_ = state.info->name, export_kind_ = kind;
  export_dialog_ = true;
}

void Application::draw_export() {
  const std::string title = fmt::format("Export as {}###export", export_kind_);
  if (!ask_line(export_dialog_, title.c_str(), "path of the file", export_text_, sizeof export_text_, "Write",
                ui_->px(520)))
    return;
  if (PanelState* state = find(export_panel_); state != nullptr && export_text_[0] != 0)
    write_export(*state, export_kind_, export_text_);
}

void Application::write_export(PanelState& state, const std::string& form,
                               const std::filesystem::path& file) {
  try {
    if (form == "PNG") {
      const ImGuiWindow* window = ImGui::FindWindowByName(window_name(*state.info).c_str());
      if (window == nullptr) return ui_->toast(fmt::format("{}: not on screen", state.info->title));
      picture_ = Picture{file, static_cast<int>(window->Pos.x), static_cast<int>(window->Pos.y),
                         static_cast<int>(window->Size.x), static_cast<int>(window->Size.y)};
      return;
    }
    // A panel that says why it has no data has none to export.
    if (!state.shown || !state.shown->absence.empty())
      return ui_->toast(fmt::format("{}: nothing is shown yet", state.info->title));
    const Table table = shown_table(state.info->name);
    if (form == "CSV") {
      if (table.columns.empty())
        return ui_->toast(fmt::format("{}: there is no table to export", state.info->title));
      write_csv(file, table);
    } else if (const auto figure = shown_figure(state.info->name)) {
      write_svg(file, *figure);
    } else if (!table.columns.empty()) {
      write_svg(file, table, state.info->title);
    } else {
      return ui_->toast(fmt::format("{}: there is nothing to export", state.info->title));
    }
    ui_->toast("Written: " + file.string());
  } catch (const Error& error) {
    ui_->toast(error.what());
  }
}

void Application::advance_playback() {
  Playback& play = ui_->playback;
  if (!play.playing || !ui_->trace) return;
  play.fraction += play.steps_per_second * static_cast<double>(ImGui::GetIO().DeltaTime);
  const int whole = static_cast<int>(play.fraction);
  play.fraction -= whole;
  const bool loops = play.loop && ui_->selection.has_range();
  const int last = loops ? ui_->selection.token_end - 1 : ui_->n_steps - 1;
  int step = ui_->selection.step + whole;
  if (step > last) {
    if (loops) {
      step = ui_->selection.token_begin;
    } else {
      step = last;
      play.playing = ui_->trace->live();  // a growing trace is followed
    }
  }
  ui_->select_step(step);
}

void Application::submit(size_t index) {
  PanelState& state = panels_[index];
  PanelRequest request = state.panel->request(*ui_);
  if (request.key != 0 && request.key != state.submitted) {
    state.submitted = request.key;
    preparer_->submit(static_cast<int>(index), request.key, std::move(request.job));
  }
  Preparer::Ready ready = preparer_->ready(static_cast<int>(index));
  // A job that was handed over in this very frame may be done already; then the next frame asks for the rest.
  const bool more = ready.model && ready.model->partial && ready.model != state.continued;
  if (more && ready.key == request.key && request.job) {
    preparer_->submit(static_cast<int>(index), request.key, std::move(request.job));
    state.continued = ready.model;
  }
  state.shown = std::move(ready.model);
  state.shown_key = ready.key;
}

void Application::draw_panel_menu(PanelState& state) {
  if (ImGui::MenuItem("Export as PNG")) export_panel(state, "PNG");
  if (ImGui::MenuItem("Export as SVG")) export_panel(state, "SVG");
  if (ImGui::MenuItem("Export data as CSV")) export_panel(state, "CSV");
  if (ImGui::MenuItem("Copy as SQL")) export_panel(state, "SQL");
  ImGui::Separator();
  if (ImGui::MenuItem(maximised_.empty() ? "Maximise" : "Restore", "F11"))
    maximised_ = maximised_.empty() ? state.info->name : "";
  ImGui::Separator();
  ImGui::PushTextWrapPos(ui_->px(320));
  ImGui::TextDisabled("%s", state.info->help);
  ImGui::PopTextWrapPos();
}

void Application::draw_panel(size_t index) {
  PanelState& state = panels_[index];
  submit(index);
  state.panel->controls(*ui_);
  if (state.shown == nullptr) {
    draw_absence(*ui_, state.info->title, "Preparing ...");
  } else if (!state.shown->absence.empty()) {
    draw_absence(*ui_, state.info->title, state.shown->absence);
  } else {
    if (!state.shown->notes.empty()) {
      std::string all;
      for (const std::string& note : state.shown->notes) all += (all.empty() ? "" : "   ") + note;
      ImGui::AlignTextToFramePadding();
      cut_text(*ui_, all, ImGui::GetContentRegionAvail().x, true);
    }
    state.panel->draw(*ui_, *state.shown);
  }
}

void Application::frame() {
  ui_->trace = document_->trace();
  if (ui_->trace) {
    const bool at_end = ui_->selection.step >= ui_->n_steps - 1;
    ui_->n_steps = ui_->trace->n_steps(ui_->selection.sequence);
    if (at_end && ui_->trace->live()) ui_->select_step(ui_->n_steps - 1);  // stays with the newest step
  } else {
    ui_->n_steps = 0;
  }
  if (!pending_layout_.empty()) apply_layout(std::exchange(pending_layout_, {}));
  drawn_version_ = document_->version();
  ImGui::NewFrame();
  ++frames_;
  advance_playback();
  if (what_if_->finished() != seen_what_if_) {
    seen_what_if_ = what_if_->finished();
    const WhatIfChoice choice = what_if_->choice();
    if (what_if_->shown()) ui_->what_if = choice;
    open_or_tell(what_if_->results());
    ui_->toast(fmt::format("Replayed: {} at {}; see Compare{}", choice.policy, choice.budget,
                           what_if_->shown() ? " and Token lives" : ""));
  }
  commands_.dispatch_shortcuts();
  if (maximised_.empty()) draw_menu();
  draw_banner();
  draw_status();
  draw_dock_space();
  palette_.draw(commands_, ui_->scale);
  draw_help();
  draw_settings();
  draw_open();
  draw_note();
  draw_save_layout();
  draw_export();
  draw_toasts();
}

bool Application::settled() const {
  if (!preparer_->idle()) return false;
  return std::ranges::all_of(panels_, [](const PanelState& state) {
    return !state.visible || (state.submitted == state.shown_key && !(state.shown && state.shown->partial));
  });
}

bool Application::wants_frame() const {
  if (ui_->playback.playing || !toasts_.empty() || picture_ || what_if_->running()) return true;
  return std::ranges::any_of(panels_, [this](const PanelState& state) {
    const int index = static_cast<int>(&state - panels_.data());
    return state.visible && preparer_->ready(index).model != state.shown;
  });
}

void Application::draw_dock_space() {
  ImGuiViewport* viewport = ImGui::GetMainViewport();
  if (!maximised_.empty()) {
    ImGui::SetNextWindowPos(viewport->WorkPos);
    ImGui::SetNextWindowSize(viewport->WorkSize);
    PanelState& state = *find(maximised_);
    for (PanelState& other : panels_) other.visible = &other == &state;
    ImGui::PushStyleVar(ImGuiStyleVar_WindowBorderSize, 0);
    const bool shown =
        ImGui::Begin(fmt::format("{}###alone-{}", state.info->title, state.info->name).c_str(), nullptr,
                     ImGuiWindowFlags_NoDecoration | ImGuiWindowFlags_NoDocking | ImGuiWindowFlags_NoMove |
                         ImGuiWindowFlags_NoSavedSettings | ImGuiWindowFlags_NoBringToFrontOnFocus);
    ImGui::PopStyleVar();
    if (shown) draw_panel(static_cast<size_t>(&state - panels_.data()));
    ImGui::End();
    return;
  }
  const ImGuiID dock = ImHashStr(kDockName);
  if (reset_layout_ || ImGui::DockBuilderGetNode(dock) == nullptr) {
    reset_layout_ = false;
    default_layout(dock);
  }
  ImGui::DockSpaceOverViewport(dock, viewport, ImGuiDockNodeFlags_None);
  for (size_t i = 0; i < panels_.size(); ++i) {
    PanelState& state = panels_[i];
    state.visible = false;
    if (!state.open) continue;
    if (state.focus && frames_ > layout_frame_ + 2) {  // a layout's tabs exist from its second frame on
      state.focus = false;
      ImGui::SetNextWindowFocus();
    }
    ImGui::SetNextWindowSize(ImVec2(ui_->px(520), ui_->px(360)), ImGuiCond_FirstUseEver);
    const std::string name = window_name(*state.info);
    state.visible = ImGui::Begin(name.c_str(), &state.open, ImGuiWindowFlags_NoCollapse);
    if (ImGui::IsWindowFocused(ImGuiFocusedFlags_RootAndChildWindows)) last_focused_ = state.info->name;
    if (state.visible) {
      draw_panel(i);
      if (ImGui::BeginPopupContextWindow(
              "panel menu", ImGuiPopupFlags_MouseButtonRight | ImGuiPopupFlags_NoOpenOverItems)) {
        draw_panel_menu(state);
        ImGui::EndPopup();
      }
    }
    ImGui::End();
  }
}

void Application::default_layout(unsigned dock) {
  layout_frame_ = frames_;
  ImGui::DockBuilderRemoveNode(dock);
  ImGui::DockBuilderAddNode(dock, static_cast<int>(ImGuiDockNodeFlags_DockSpace));
  ImGui::DockBuilderSetNodeSize(dock, ImGui::GetMainViewport()->WorkSize);
  ImGuiID rest = dock, top = 0, left = 0, right = 0;
  ImGui::DockBuilderSplitNode(rest, ImGuiDir_Up, 0.34F, &top, &rest);
  ImGui::DockBuilderSplitNode(rest, ImGuiDir_Left, 0.27F, &left, &rest);
  ImGui::DockBuilderSplitNode(rest, ImGuiDir_Right, 0.37F, &right, &rest);
  const auto place = [&](DockPlace where) {
    return where == DockPlace::top     ? top
           : where == DockPlace::left  ? left
           : where == DockPlace::right ? right
                                       : rest;
  };
  for (PanelState& state : panels_) {
    state.open = true;
    state.focus = state.info->front;
    ImGui::DockBuilderDockWindow(window_name(*state.info).c_str(), place(state.info->place));
  }
  for (const ImGuiID id : {top, left, right, rest}) {
    if (ImGuiDockNode* node = ImGui::DockBuilderGetNode(id)) {
      node->SetLocalFlags(node->LocalFlags |
                          static_cast<ImGuiDockNodeFlags>(ImGuiDockNodeFlags_NoWindowMenuButton) |
                          static_cast<ImGuiDockNodeFlags>(ImGuiDockNodeFlags_NoCloseButton));
    }
  }
  ImGui::DockBuilderFinish(dock);
}

std::string Application::layout_text() const {
  std::string text;
  for (const PanelState& state : panels_)
    text += fmt::format("; {}={}\n", state.info->name, state.open ? 1 : 0);
  return text + ImGui::SaveIniSettingsToMemory();
}

void Application::apply_layout(const std::string& text) {
  for (PanelState& state : panels_) {
    state.open = text.find(fmt::format("; {}=0\n", state.info->name)) == std::string::npos;
  }
  ImGui::LoadIniSettingsFromMemory(text.c_str(), text.size());
}

void Application::draw_menu() {
  if (!ImGui::BeginMainMenuBar()) return;
  const auto item = [this](std::string_view title) {
    for (const Command& command : commands_.all()) {
      if (command.title == title) {
        const auto run = command.run;
        if (ImGui::MenuItem(command.title.c_str(), chord_name(command.chord).c_str())) run();
        return;
      }
    }
  };
  if (ImGui::BeginMenu("File")) {
    item("Open file");
    if (ImGui::BeginMenu("Recent files", !settings_.recent.empty())) {
      for (const std::string& file : std::vector<std::string>(settings_.recent)) {
        if (ImGui::MenuItem(file.c_str())) open_or_tell(file);
      }
      ImGui::EndMenu();
    }
    ImGui::Separator();
    for (const char* kind : {"PNG", "SVG", "CSV"}) item(fmt::format("Export the focused panel as {}", kind));
    item("Copy the focused panel's data as SQL");
    ImGui::Separator();
    item("Settings");
    item("Quit");
    ImGui::EndMenu();
  }
  if (ImGui::BeginMenu("Trace", !document_->traces().empty())) {
    for (size_t i = 0; i < document_->traces().size(); ++i) {
      if (ImGui::MenuItem(document_->traces()[i]->name().c_str(), nullptr, i == document_->primary()))
        document_->set_primary(i);
    }
    ImGui::EndMenu();
  }
  if (ImGui::BeginMenu("Panels")) {
    for (PanelState& state : panels_) {
      if (ImGui::MenuItem(state.info->title, nullptr, &state.open)) state.focus = state.open;
      ImGui::SetItemTooltip("%s", state.info->help);
    }
    ImGui::EndMenu();
  }
  if (ImGui::BeginMenu("Layout")) {
    item("Reset layout");
    item("Save layout");
    item("Maximise or restore the focused panel");
    const std::vector<std::string> layouts = store_.layouts();
    if (!layouts.empty()) ImGui::Separator();
    for (const std::string& name : layouts) {
      if (ImGui::MenuItem(name == "last" ? "As last time" : name.c_str()))
        pending_layout_ = store_.load_layout(name);
    }
    ImGui::EndMenu();
  }
  if (ImGui::BeginMenu("Help")) {
    item("Command palette");
    item("Help: shortcuts and panels");
    ImGui::EndMenu();
  }
  if (ui_->trace) {
    const std::string name = ui_->trace->name();
    ImGui::SameLine(ImGui::GetWindowWidth() - ImGui::CalcTextSize(name.c_str()).x - ui_->px(12));
    ImGui::TextDisabled("%s", name.c_str());
  }
  ImGui::EndMainMenuBar();
}

void Application::draw_banner() {
  if (!ui_->trace || !maximised_.empty()) return;
  if (checked_trace_ != ui_->trace && !ui_->trace->live() && frames_ > 3 && preparer_->idle()) {
    checked_trace_ = ui_->trace;
    ui_->trace->start_damage_check(options_.wake);
  }
  std::string text;
  ImU32 colour = ui_->theme.warning;
  if (const std::vector<ChunkDamage> damage = ui_->trace->damage(); !damage.empty()) {
    text = fmt::format("{} damaged {}: ", damage.size(), damage.size() == 1 ? "chunk" : "chunks");
    for (size_t i = 0; i < damage.size() && i < 3; ++i) {
      const ChunkDamage& chunk = damage[i];
      text += fmt::format("{}{} (id {}{}, steps {} to {})", i > 0 ? "; " : "", chunk.kind, chunk.id,
                          chunk.layer >= 0 ? fmt::format(", layer {}", chunk.layer) : "", chunk.step_begin,
                          chunk.step_end - 1);
    }
    if (damage.size() > 3) text += fmt::format("; and {} more (Trace info names all)", damage.size() - 3);
    colour = ui_->theme.bad;
  } else if (ui_->trace->reader().interrupted()) {
    text = fmt::format("Recording was interrupted after step {}; everything up to there is whole.",
                       ui_->n_steps - 1);
  } else if (ui_->trace->live()) {
    text = fmt::format("Not finished: {} steps so far; new steps appear as they are written.", ui_->n_steps);
    colour = ui_->theme.accent;
  }
  if (text.empty()) return;
  if (ImGui::BeginViewportSideBar(
          "##banner", ImGui::GetMainViewport(), ImGuiDir_Up, ImGui::GetFrameHeight(),
          ImGuiWindowFlags_NoSavedSettings | ImGuiWindowFlags_MenuBar | ImGuiWindowFlags_NoScrollbar)) {
    if (ImGui::BeginMenuBar()) {
      const ImVec2 at = ImGui::GetCursorScreenPos();
      const float side = ImGui::GetTextLineHeight() * 0.6F, top = at.y + (ImGui::GetFrameHeight() - side) / 2;
      ImGui::GetWindowDrawList()->AddRectFilled(ImVec2(at.x, top), ImVec2(at.x + side, top + side), colour);
      ImGui::SetCursorPosX(ImGui::GetCursorPosX() + side + ui_->px(8));
      ImGui::TextUnformatted(text.c_str());
      ImGui::EndMenuBar();
    }
  }
  ImGui::End();
}

void Application::draw_status() {
  if (ImGui::BeginViewportSideBar(
          "##status", ImGui::GetMainViewport(), ImGuiDir_Down, ImGui::GetFrameHeight(),
          ImGuiWindowFlags_NoSavedSettings | ImGuiWindowFlags_MenuBar | ImGuiWindowFlags_NoScrollbar)) {
    if (ImGui::BeginMenuBar()) {
      if (!ui_->trace) {
        ImGui::TextDisabled(
            "No trace is open. Ctrl+O opens one, or drop a .kvl or .kvr file here.   Ctrl+Shift+P commands   "
            "? help");
      } else {
        const Selection& selection = ui_->selection;
        const TraceHeader& header = ui_->trace->reader().header();
        ImGui::TextUnformatted(fmt::format("step {} / {}", selection.step, ui_->n_steps - 1).c_str());
        ImGui::TextUnformatted(
            fmt::format("layer {} / {}", selection.layer, header.geometry.n_layers - 1).c_str());
        ImGui::TextUnformatted(
            fmt::format("kv head {} / {}", selection.kv_head, header.geometry.n_kv_heads - 1).c_str());
        if (selection.has_range())
          ImGui::TextUnformatted(
              fmt::format("range {} to {}", selection.token_begin, selection.token_end - 1).c_str());
        if (selection.pinned_token >= 0)
          ImGui::TextUnformatted(fmt::format("pinned token {}", selection.pinned_token).c_str());
        const std::string right =
            fmt::format("{}, budget {}, tier {}{}", header.policy.spec,
                        header.budget_slots > 0 ? fmt::format("{} tokens", header.budget_slots) : "none",
                        tier_name(header.tier), preparer_->idle() ? "" : ", working");
        const float width = ImGui::CalcTextSize(right.c_str()).x;
        const float at = ImGui::GetWindowWidth() - width - ui_->px(12);
        if (at > ImGui::GetCursorPosX()) {
          ImGui::SameLine(at);
          ImGui::TextDisabled("%s", right.c_str());
        }
      }
      ImGui::EndMenuBar();
    }
  }
  ImGui::End();
}

void Application::draw_help() {
  if (!help_open_) return;
  const ImGuiViewport* viewport = ImGui::GetMainViewport();
  ImGui::SetNextWindowPos(viewport->GetCenter(), ImGuiCond_Appearing, ImVec2(0.5F, 0.5F));
  ImGui::SetNextWindowSize(ImVec2(std::min(ui_->px(760), viewport->Size.x * 0.9F),
                                  std::min(ui_->px(620), viewport->Size.y * 0.9F)),
                           ImGuiCond_Appearing);
  if (ImGui::Begin("Help", &help_open_, ImGuiWindowFlags_NoDocking | ImGuiWindowFlags_NoSavedSettings)) {
    if (ImGui::IsKeyPressed(ImGuiKey_Escape)) help_open_ = false;
    ImGui::SeparatorText("Shortcuts");
    if (ImGui::BeginTable("shortcuts", 2, ImGuiTableFlags_RowBg | ImGuiTableFlags_SizingFixedFit)) {
      for (const Command& command : commands_.all()) {
        if (command.chord == 0) continue;
        ImGui::TableNextRow();
        ImGui::TableNextColumn();
        ImGui::TextUnformatted(chord_name(command.chord).c_str());
        ImGui::TableNextColumn();
        ImGui::TextUnformatted(command.title.c_str());
      }
      ImGui::EndTable();
    }
    ImGui::SeparatorText("In maps and plots");
    ImGui::BulletText(
        "Wheel zooms at the pointer, right drag zooms to a box, left drag pans, double click shows all.");
    ImGui::BulletText("Click sets the step; Ctrl+click pins a token; hover explains a cell.");
    ImGui::BulletText("Right click on a panel's margin exports it.");
    ImGui::SeparatorText("Panels");
    for (const PanelState& state : panels_) {
      ImGui::TextUnformatted(state.info->title);
      ImGui::Indent();
      ImGui::PushStyleColor(ImGuiCol_Text, ui_->theme.muted);
      ImGui::TextWrapped("%s", state.info->help);
      ImGui::PopStyleColor();
      ImGui::Unindent();
    }
    ImGui::SeparatorText("Where a number comes from");
    badge(*ui_, Provenance::measured, "Example."), ImGui::SameLine(),
        ImGui::TextUnformatted("counted or timed while recording");
    badge(*ui_, Provenance::sampled, "Example."), ImGui::SameLine(),
        ImGui::TextUnformatted("from periodic or partial samples");
    badge(*ui_, Provenance::modelled, "Example."), ImGui::SameLine(),
        ImGui::TextUnformatted("from what the code is known to read or hold");
    badge(*ui_, Provenance::derived, "Example."), ImGui::SameLine(),
        ImGui::TextUnformatted("computed from recorded values");
  }
  ImGui::End();
}

void Application::draw_settings() {
  if (!settings_open_) return;
  ImGui::SetNextWindowPos(ImGui::GetMainViewport()->GetCenter(), ImGuiCond_Appearing, ImVec2(0.5F, 0.5F));
  if (ImGui::Begin("Settings", &settings_open_,
                   ImGuiWindowFlags_NoDocking | ImGuiWindowFlags_AlwaysAutoResize |
                       ImGuiWindowFlags_NoSavedSettings)) {
    if (ImGui::IsKeyPressed(ImGuiKey_Escape)) settings_open_ = false;
    int theme = static_cast<int>(settings_.theme);
    if (choose("Theme", theme, {kThemeNames[0].data(), kThemeNames[1].data(), kThemeNames[2].data()},
               ui_->px(220))) {
      settings_.theme = static_cast<ThemeKind>(theme);
      apply_settings();
    }
    int percent = settings_.font_percent;
    ImGui::SetNextItemWidth(ui_->px(220));
    ImGui::SliderInt("Size of text and lines", &percent, 60, 250, "%d %%");
    if (ImGui::IsItemDeactivatedAfterEdit()) {
      settings_.font_percent = percent;
      apply_settings();
    } else if (ImGui::IsItemActive()) {
      settings_.font_percent = percent;  // takes effect when let go: the slider would move under the pointer
    }
    ImGui::PushStyleColor(ImGuiCol_Text, ui_->theme.muted);
    ImGui::Text("Text font: %s", ui_->fonts.text_path.empty() ? "built in" : ui_->fonts.text_path.c_str());
    ImGui::Text("Token font: %s", ui_->fonts.mono_path.empty() ? "built in" : ui_->fonts.mono_path.c_str());
    ImGui::Text("Kept in: %s",
                options_.persistent ? SettingsStore::folder().c_str() : "nowhere (this run only)");
    ImGui::PopStyleColor();
  }
  ImGui::End();
}

void Application::draw_open() {
  if (ask_line(open_dialog_, "Open a trace or results", "path of a .kvl or .kvr file", path_text_,
               sizeof path_text_, "Open", ui_->px(520)))
    open_or_tell(path_text_);
}

void Application::draw_note() {
  const std::string title = fmt::format("Note at step {}###note", note_step_);
  if (!ask_line(note_dialog_, title.c_str(), "what happens here; empty removes it", note_text_,
                sizeof note_text_, "Keep", ui_->px(420)))
    return;
  if (note_text_[0] == 0) {
    document_->notes().remove(note_step_);
  } else {
    document_->notes().set(note_step_, note_text_);
  }
  if (!document_->notes().problem().empty()) ui_->toast(document_->notes().problem());
}

void Application::draw_save_layout() {
  if (!ask_line(layout_dialog_, "Save layout", "name", layout_name_, sizeof layout_name_, "Save",
                ui_->px(320)))
    return;
  const std::string problem = store_.save_layout(layout_name_, layout_text());
  ui_->toast(problem.empty() ? fmt::format("Layout saved: {}", layout_name_) : problem);
  make_commands();
}

void Application::draw_toasts() {
  std::erase_if(toasts_, [](const Toast& toast) { return toast.until < ImGui::GetTime(); });
  const ImGuiViewport* viewport = ImGui::GetMainViewport();
  float bottom = viewport->WorkPos.y + viewport->WorkSize.y - ui_->px(10);
  for (size_t i = 0; i < toasts_.size(); ++i) {
    ImGui::SetNextWindowPos(ImVec2(viewport->WorkPos.x + viewport->WorkSize.x - ui_->px(10), bottom),
                            ImGuiCond_Always, ImVec2(1, 1));
    ImGui::SetNextWindowSizeConstraints(ImVec2(0, 0),
                                        ImVec2(std::min(ui_->px(560), viewport->Size.x * 0.8F), FLT_MAX));
    if (ImGui::Begin(fmt::format("##toast{}", i).c_str(), nullptr,
                     ImGuiWindowFlags_NoDecoration | ImGuiWindowFlags_NoDocking |
                         ImGuiWindowFlags_NoSavedSettings | ImGuiWindowFlags_AlwaysAutoResize |
                         ImGuiWindowFlags_NoFocusOnAppearing | ImGuiWindowFlags_NoNav)) {
      ImGui::PushTextWrapPos(ui_->px(540));
      ImGui::TextUnformatted(toasts_[i].text.c_str());
      ImGui::PopTextWrapPos();
      bottom -= ImGui::GetWindowHeight() + ui_->px(6);
    }
    ImGui::End();
  }
}

}  // namespace kvlapse::gui
