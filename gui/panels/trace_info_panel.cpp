// Trace info: what a stranger needs to judge the recording, and what is wrong with the file.
#include <fmt/format.h>

#include "gui/draw/widgets.h"
#include "gui/panels/panels.h"

namespace kvlapse::gui {
namespace {

struct InfoRow {
  std::string name, value;
};
struct InfoSection {
  std::string title;
  std::vector<InfoRow> rows;
};

struct InfoModel final : DrawModel {
  std::vector<InfoSection> sections;
};

DrawModelPtr prepare(const TraceSource& trace, const std::function<std::vector<MachineFinding>()>& examine) {
  auto model = std::make_shared<InfoModel>();
  const TraceReader& reader = trace.reader();
  const TraceHeader& header = reader.header();
  const CacheGeometry& geometry = header.geometry;
  InfoSection file{"File", {}};
  file.rows.push_back({"path", reader.file().string()});
  file.rows.push_back({"format version", std::to_string(reader.format_version())});
  file.rows.push_back({"state", reader.complete() ? "complete"
                                : reader.interrupted()
                                    ? "interrupted by the user; everything recorded is whole"
                                    : "not finished: still being written, or its writer was killed"});
  file.rows.push_back({"tier", std::string(tier_name(header.tier))});
  file.rows.push_back({"chunks", !trace.damage_checked() ? "not checked yet"
                                 : trace.damage().empty()
                                     ? "all checksums right"
                                     : fmt::format("{} damaged", trace.damage().size())});
  for (const ChunkDamage& damage : trace.damage()) {
    file.rows.push_back({fmt::format("damaged chunk {}", damage.id),
                         fmt::format("{}, layer {}, steps {} to {}: {}", damage.kind, damage.layer,
                                     damage.step_begin, damage.step_end - 1, damage.what)});
  }
  model->sections.push_back(std::move(file));
  model->sections.push_back(
      {"Cache",
       {{"layers", std::to_string(geometry.n_layers)},
        {"query heads", std::to_string(geometry.n_q_heads)},
        {"kv heads", std::to_string(geometry.n_kv_heads)},
        {"head dim", std::to_string(geometry.head_dim)},
        {"dtype of K and V", std::string(dtype_name(geometry.dtype))},
        {"bytes of a token", format_bytes(static_cast<double>(geometry.token_bytes()))}}});
  InfoSection policy{
      "Policy",
      {{"spec", header.policy.spec},
       {"reference", header.policy.reference},
       {"what it does", header.policy.summary},
       {"formula", header.policy.formula},
       {"paper", header.policy.paper},
       {"budget", header.budget_slots > 0
                      ? fmt::format("{} = {} tokens a kv head", header.budget_text, header.budget_slots)
                      : "none: it never evicts"}}};
  for (const auto& [name, value] : header.policy.parameters)
    policy.rows.push_back({name, fmt::format("{:g}", value)});
  model->sections.push_back(std::move(policy));
  for (int i = 0; i < reader.n_sequences(); ++i) {
    const TraceSequence facts = reader.sequence(i);
    InfoSection section{reader.n_sequences() > 1 ? fmt::format("Sequence {}", i) : "Generation",
                        {{"prompt", fmt::format("{} tokens", facts.n_prompt)},
                         {"recorded", fmt::format("{} tokens, {} of them generated", facts.n_steps,
                                                  std::max(0, facts.n_steps - facts.n_prompt))},
                         {"seed", std::to_string(facts.seed)}}};
    if (!facts.task.empty()) section.rows.push_back({"task", facts.task});
    if (!facts.answer.empty())
      section.rows.push_back(
          {"answer",
           facts.answer + (facts.answer_right ? *facts.answer_right ? " (right)" : " (wrong)" : "")});
    if (!facts.end_reason.empty()) section.rows.push_back({"ended by", facts.end_reason});
    model->sections.push_back(std::move(section));
  }
  if (const std::vector<GpuSource> sources = reader.gpu_sources(); !sources.empty()) {
    InfoSection gpu{"GPU sources while recording", {}};
    for (const GpuSource& source : sources) {
      gpu.rows.push_back(
          {source.name,
           fmt::format("{}, {}, records: {}{}{}{}{}", source.state(), source.provenance, source.records,
                       source.dropped > 0 ? fmt::format(", {} dropped", source.dropped) : "",
                       source.reason.empty() ? "" : "; " + source.reason,
                       source.advice.empty() ? "" : "; " + source.advice,
                       source.overhead_ns > 0 ? fmt::format("; cost the decoding thread {:.1f} ms",
                                                            static_cast<double>(source.overhead_ns) * 1e-6)
                                              : "")});
    }
    model->sections.push_back(std::move(gpu));
  }
  InfoSection meta{"Recorded facts", {}};
  for (const auto& [key, value] : reader.meta()) meta.rows.push_back({key, value});
  if (meta.rows.empty()) meta.rows.push_back({"none", "the recorder stored no further facts"});
  model->sections.push_back(std::move(meta));
  if (examine) {
    InfoSection machine{"This machine now (kvlapse doctor)", {}};
    for (const MachineFinding& finding : examine())
      machine.rows.push_back({finding.part, fmt::format("{}: {}{}{}", finding.state, finding.found,
                                                        finding.advice.empty() ? "" : "; ", finding.advice)});
    model->sections.push_back(std::move(machine));
  }
  for (InfoSection& section : model->sections) {
    std::erase_if(section.rows, [](const InfoRow& row) { return row.value.empty(); });
  }
  return model;
}

class TraceInfoPanel final : public Panel {
 public:
  PanelRequest request(const Ui& ui) override {
    if (!ui.trace) {
      return {1, [] {
                auto model = std::make_shared<InfoModel>();
                model->absence = "No trace is open. Open a .kvl file with Ctrl+O, or drop one here.";
                return model;
              }};
    }
    return {mix_key({reinterpret_cast<uintptr_t>(ui.trace.get()), ui.trace->version(),
                     ui.trace->damage_checked() ? 1U : 0U}),
            [trace = ui.trace, examine = ui.examine_machine] { return prepare(*trace, examine); }};
  }

  void draw(Ui& ui, const DrawModel& base) override {
    const auto& model = static_cast<const InfoModel&>(base);
    ImGui::BeginChild("##info", ImVec2(0, 0));
    for (const InfoSection& section : model.sections) {
      ImGui::SeparatorText(section.title.c_str());
      if (!ImGui::BeginTable(section.title.c_str(), 2, ImGuiTableFlags_SizingFixedFit)) continue;
      ImGui::TableSetupColumn("name", ImGuiTableColumnFlags_WidthFixed, ui.px(130));
      ImGui::TableSetupColumn("value", ImGuiTableColumnFlags_WidthStretch);
      for (const InfoRow& row : section.rows) {
        ImGui::TableNextRow();
        ImGui::TableNextColumn();
        cut_text(ui, row.name, ui.px(126), true);
        ImGui::TableNextColumn();
        ImGui::PushTextWrapPos(0);
        ImGui::TextUnformatted(row.value.c_str());
        ImGui::PopTextWrapPos();
      }
      ImGui::EndTable();
    }
    ImGui::EndChild();
  }

  Table table(const DrawModel& base) const override {
    Table table{{"section", "name", "value"}, {}};
    for (const InfoSection& section : static_cast<const InfoModel&>(base).sections) {
      for (const InfoRow& row : section.rows) table.rows.push_back({section.title, row.name, row.value});
    }
    return table;
  }
  std::string sql(const Ui&) const override { return "SELECT key, value FROM KV_META ORDER BY key"; }
};

}  // namespace

std::unique_ptr<Panel> make_trace_info_panel() {
  return std::make_unique<TraceInfoPanel>();
}

}  // namespace kvlapse::gui
