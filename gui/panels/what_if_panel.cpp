// What if: another policy and budget over the recorded q, k and v, replayed in the background.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "core/policy/registry.h"
#include "core/policy/spec.h"
#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"

namespace kvlapse::gui {
namespace {

struct WhatIfModel final : DrawModel {
  int n_tokens = 0;
};

class WhatIfPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    const auto trace = ui.trace;
    const int sequence = ui.selection.sequence;
    return {mix_key({reinterpret_cast<uintptr_t>(trace.get()), trace ? trace->version() : 0}),
            [trace, sequence] {
              auto model = std::make_shared<WhatIfModel>();
              if (!trace) {
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
              } else if (trace->reader().header().tier != TraceTier::qkv) {
                model->absence = fmt::format(
                    "A replay needs the recorded q, k and v; this trace has tier {}. Record with --tier qkv.",
                    tier_name(trace->reader().header().tier));
              } else {
                model->n_tokens = trace->n_steps(sequence);
              }
              return model;
            }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const WhatIfModel&>(base);
    const auto policies = policy_registry();
    std::vector<std::string> names;
    for (const PolicyEntry& entry : policies) {
      const PolicyInfo info = entry.info();
      names.push_back(info.reference.empty() ? std::string(info.name)
                                             : fmt::format("{}@{}", info.name, info.reference));
    }
    if (policy_ < 0) {
      const auto found =
          std::ranges::find_if(names, [](const std::string& name) { return name.starts_with("longflow"); });
      choose_policy(found == names.end() ? 0 : static_cast<int>(found - names.begin()));
    }
    std::vector<const char*> labels;
    for (const std::string& name : names) labels.push_back(name.c_str());
    int chosen = policy_;
    if (choose("policy", chosen, labels, ui.px(220))) choose_policy(chosen);
    ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.muted);
    ImGui::TextWrapped("%s", std::string(info_.summary).c_str());
    ImGui::PopStyleColor();
    ImGui::SetNextItemWidth(ui.px(220));
    ImGui::SliderFloat("##budget", &share_, 1, 100, "");  // the grab would cover a text inside
    ImGui::SameLine();
    ImGui::Text(
        "budget %.0f %% of the sequence: %d tokens", static_cast<double>(share_),
        std::max(1, static_cast<int>(std::lround(share_ / 100 * static_cast<float>(model.n_tokens)))));
    for (size_t i = 0; i < info_.parameters.size(); ++i) {
      const ParameterInfo& parameter = info_.parameters[i];
      float value = static_cast<float>(values_[i]);
      ImGui::SetNextItemWidth(ui.px(220));
      const std::string name(parameter.name), summary(parameter.summary);
      if (ImGui::SliderFloat(name.c_str(), &value, static_cast<float>(parameter.min),
                             static_cast<float>(parameter.max), ""))
        values_[i] = static_cast<double>(value);
      ImGui::SetItemTooltip("%s", summary.c_str());
      ImGui::SameLine();
      ImGui::TextDisabled("%.4g", values_[i]);
    }
    ImGui::Separator();
    WhatIf& runner = ui.what_if_runner;
    const WhatIfChoice wanted{spec(names), fmt::format("{:.0f}%", share_)};
    if (runner.running()) {
      ImGui::ProgressBar(static_cast<float>(runner.progress()), ImVec2(ui.px(220), 0),
                         fmt::format("{:.0f} %", runner.progress() * 100).c_str());
      ImGui::SameLine();
      if (ImGui::Button("Cancel")) runner.cancel();
    } else if (ImGui::Button("Replay", ImVec2(ui.px(100), 0))) {
      runner.start(ui.trace->file(), wanted);
    }
    if (const std::string message = runner.message(); !message.empty()) {
      ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.bad);
      ImGui::TextWrapped("%s", message.c_str());
      ImGui::PopStyleColor();
    }
    if (!ui.what_if.policy.empty()) {
      ImGui::TextDisabled("Token lives can show: %s at %s", ui.what_if.policy.c_str(),
                          ui.what_if.budget.c_str());
    }
    ImGui::PushStyleColor(ImGuiCol_Text, ui.theme.muted);
    ImGui::TextWrapped(
        "Open loop: the replay keeps the recorded q, k and v; a real run under this policy would have "
        "drifted. The result "
        "appears in Compare and in Token lives.");
    ImGui::PopStyleColor();
  }

  std::string state() const override { return fmt::format("{}", share_); }
  void set_state(std::string_view text) override {
    share_ = std::clamp(static_cast<float>(std::atof(std::string(text).c_str())), 1.0F, 100.0F);
  }

 private:
  void choose_policy(int index) {
    policy_ = index;
    info_ = policy_registry()[static_cast<size_t>(index)].info();
    values_.clear();
    for (const ParameterInfo& parameter : info_.parameters) values_.push_back(parameter.value);
  }
  std::string spec(const std::vector<std::string>& names) const {
    std::string text = names[static_cast<size_t>(policy_)];
    for (size_t i = 0; i < values_.size(); ++i) {
      if (std::abs(values_[i] - info_.parameters[i].value) > 1e-12)
        text += fmt::format(":{}={:g}", info_.parameters[i].name, values_[i]);
    }
    return text;
  }

  int policy_ = -1;
  PolicyInfo info_;
  std::vector<double> values_;
  float share_ = 25;
};

}  // namespace

std::unique_ptr<Panel> make_what_if_panel() {
  return std::make_unique<WhatIfPanel>();
}

}  // namespace kvlapse::gui
