// Application: the dashboard without a platform. frame() builds one ImGui frame: menus, docked panels,
// palette, help, status. The same code runs in a window, headless and under the test engine. UI thread only.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "gui/app/commands.h"
#include "gui/app/settings.h"
#include "gui/panel.h"

namespace kvlapse::gui {

struct ApplicationOptions {
  float scale = 1;                     // physical pixels per design pixel
  bool persistent = true;              // settings, layouts and recent files are kept
  std::optional<ThemeKind> theme;      // overrides the settings
  bool builtin_font = false;           // the same letters on every machine
  std::string only_panel;              // this panel alone fills the window
  std::function<void()> wake = [] {};  // called from workers when a model is ready
  std::function<std::vector<MachineFinding>()> examine_machine;  // for Trace info; called from a worker
  std::function<MachineCeilings(int threads)> measure_machine;   // for the roofline; called from a worker
};

class Application {
 public:
  // Makes ImGui's and ImPlot's contexts.
  explicit Application(ApplicationOptions options);
  ~Application();
  Application(const Application&) = delete;
  Application& operator=(const Application&) = delete;

  // Throws Error for a file that cannot be opened (for the command line); open_or_tell shows a message
  // instead.
  void open(const std::filesystem::path& file);
  void open_or_tell(const std::filesystem::path& file);
  void select(std::optional<int> step, std::optional<int> layer, std::optional<int> kv_head);

  void frame();  // between Platform::new_frame and ImGui::Render; calls ImGui::NewFrame itself
  // Something moves, waits or has changed since the last frame.
  bool wants_frame() const;
  // A file grew or was opened since the last frame.
  bool document_changed() const { return document_->version() != drawn_version_; }
  // Physical pixels per design pixel.
  void set_scale(float scale);
  // Every visible panel shows the current selection.
  bool settled() const;
  bool wants_quit() const { return quit_; }
  uint32_t clear_colour() const { return ui_->theme.background; }

  // A picture of a rectangle of the next presented frame, to be written by whoever can read pixels.
  struct Picture {
    std::filesystem::path file;
    int x, y, width, height;
  };
  std::optional<Picture> take_picture_request();
  void picture_done(const std::string& message) { ui_->toast(message); }

  Ui& ui() { return *ui_; }
  // This panel fills the window, "NAME" or "NAME:STATE" (Panel::state); "": all of them. Throws UsageError
  // for an unknown name.
  void show_alone(const std::string& panel);
  bool panel_open(std::string_view name) const;
  void set_panel_open(std::string_view name, bool open);
  const DrawModel* shown_model(std::string_view name) const;  // null: none yet
  bool shows_current(std::string_view name) const;            // the model of what it was asked for last
  // What an export of the panel would write; empty: nothing is shown, or the panel has no such form.
  Table shown_table(std::string_view name) const;
  std::optional<Figure> shown_figure(std::string_view name) const;

 private:
  struct PanelState {
    const PanelInfo* info;
    std::unique_ptr<Panel> panel;
    bool open = true;
    bool visible = false;  // drawn in the last frame
    bool focus = false;    // bring to the front
    uint64_t submitted = 0, shown_key = 0;
    DrawModelPtr shown;
    DrawModelPtr continued;  // partial model whose rest was asked for
  };

  void make_commands();
  void advance_playback();
  void draw_menu();
  void draw_dock_space();
  void default_layout(unsigned dock_id);
  void draw_panel(size_t index);
  void draw_panel_menu(PanelState& state);
  void draw_status();
  void draw_banner();
  void draw_help();
  void draw_settings();
  void draw_open();
  void draw_note();
  void draw_save_layout();
  void draw_toasts();
  void apply_settings();
  void apply_layout(const std::string& text);
  std::string layout_text() const;
  void move_step(int by);
  void move_head(int layers, int heads);
  void edit_note();
  void export_panel(PanelState& state, const char* kind);  // asks for the name first
  void write_export(PanelState& state, const std::string& kind, const std::filesystem::path& file);
  void draw_export();
  PanelState* find(std::string_view name);
  const PanelState* find(std::string_view name) const;
  PanelState* focused();
  void submit(size_t index);

  ApplicationOptions options_;
  SettingsStore store_;
  Settings settings_;
  std::unique_ptr<Document> document_;
  std::unique_ptr<Preparer> preparer_;
  std::unique_ptr<WhatIf> what_if_;
  std::unique_ptr<Ui> ui_;
  std::vector<PanelState> panels_;
  Commands commands_;
  Palette palette_;
  bool help_open_ = false, settings_open_ = false, quit_ = false, reset_layout_ = false;
  bool open_dialog_ = false, note_dialog_ = false, layout_dialog_ = false, export_dialog_ = false;
  std::string export_panel_, export_kind_;
  std::string maximised_;
  std::string last_focused_;
  std::string pending_layout_;
  char path_text_[1024] = {}, export_text_[1024] = {}, note_text_[256] = {}, layout_name_[64] = {};
  int note_step_ = 0, seen_what_if_ = 0;
  struct Toast {
    std::string text;
    double until;
  };
  std::vector<Toast> toasts_;
  std::optional<Picture> picture_;
  std::shared_ptr<TraceSource> checked_trace_;  // whose chunks are being or were checked
  uint64_t frames_ = 0, layout_frame_ = 0, drawn_version_ = 0;
};

}  // namespace kvlapse::gui
