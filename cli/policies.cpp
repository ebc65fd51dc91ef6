#include <fmt/format.h>

#include "cli/command.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "core/policy/registry.h"
#include "core/policy/spec.h"

namespace kvlapse::cli {
namespace {

constexpr std::string_view kSignalNames[] = {"logits", "attention",    "output", "value_l1", "keys",
                                             "values", "query_window", "rope",   "future"};
constexpr std::string_view kGqaNames[] = {"mean", "max", "sum"};
constexpr std::string_view kReclaimNames[] = {"fill: the next token overwrites the victim's slot",
                                              "compact: slot order kept",
                                              "compact: survivors in score order"};

std::string full_name(const PolicyInfo& info) {
  return info.reference.empty() ? std::string(info.name) : fmt::format("{}@{}", info.name, info.reference);
}

Json describe(const PolicyInfo& info) {
  Json signals = Json::array(), parameters = Json::array(), deviations = Json::array();
  for (size_t i = 0; i < std::size(kSignalNames); ++i)
    if (info.signals & (1u << i)) signals.push_back(kSignalNames[i]);
  for (const ParameterInfo& p : info.parameters) {
    if (p.choices.empty())
      parameters.push_back(
          {{"name", p.name}, {"default", p.value}, {"min", p.min}, {"max", p.max}, {"summary", p.summary}});
    else
      parameters.push_back({{"name", p.name},
                            {"default", p.choices[static_cast<size_t>(p.value)]},
                            {"choices", p.choices},
                            {"summary", p.summary}});
  }
  for (const TextParameter& p : info.texts)
    parameters.push_back({{"name", p.name}, {"default", p.value}, {"summary", p.summary}});
  for (std::string_view d : info.deviations) deviations.push_back(d);
  const EvictionRule& rule = info.rule;
  return {{"policy", info.name},
          {"reference", info.reference},
          {"version", info.version},
          {"summary", info.summary},
          {"formula", info.formula},
          {"paper", info.paper},
          {"source", info.source},
          {"deviations", deviations},
          {"parameters", parameters},
          {"signals", signals},
          {"cadence", rule.cadence},
          {"granularity", rule.granularity == Granularity::layer ? "layer" : "kv_head"},
          {"gqa", kGqaNames[static_cast<int>(rule.gqa)]},
          {"sinks", rule.sinks},
          {"recent", rule.recent},
          {"pin_prompt", rule.pin_prompt},
          {"reclaim", kReclaimNames[static_cast<int>(rule.reclaim)]},
          {"occupancy_over_budget_max", rule.cadence - 1},
          {"state_columns", info.state_columns}};
}

void print_one(const PolicyInfo& info) {
  Json d = describe(info);
  fmt::print("{}\n  {}\n\n", full_name(info), info.summary);
  for (const char* key : {"formula", "paper", "source", "granularity", "gqa", "reclaim"})
    if (!d[key].get<std::string>().empty()) fmt::print("  {:<12}{}\n", key, d[key].get<std::string>());
  fmt::print("  {:<12}after every {} token(s); at most {} over the budget\n", "cadence", info.rule.cadence,
             info.rule.cadence - 1);
  fmt::print("  {:<12}{} sinks, recent {:g}, prompt {}\n", "protects", info.rule.sinks, info.rule.recent,
             info.rule.pin_prompt ? "pinned" : "not pinned");
  std::string signals;
  for (const auto& s : d["signals"]) signals += (signals.empty() ? "" : ", ") + s.get<std::string>();
  fmt::print("  {:<12}{}\n", "reads", signals.empty() ? "positions only" : signals);
  fmt::print("  {:<12}{}\n", "version", info.version);
  if (!info.parameters.empty() || !info.texts.empty()) {
    Table table({"    parameter", "default", "range", "meaning"});
    for (const ParameterInfo& p : info.parameters)
      table.add({fmt::format("    {}", p.name),
                 p.choices.empty() ? fmt::format("{:g}", p.value)
                                   : std::string(p.choices[static_cast<size_t>(p.value)]),
                 p.choices.empty() ? fmt::format("[{:g}, {:g}]", p.min, p.max)
                                   : fmt::format("{}", fmt::join(p.choices, "|")),
                 std::string(p.summary)});
    for (const TextParameter& p : info.texts)
      table.add({fmt::format("    {}", p.name), p.value, "text", std::string(p.summary)});
    fmt::print("\n{}", table.text());
  }
  if (!info.deviations.empty()) fmt::print("\n  deviations from the reference or the paper\n");
  for (std::string_view deviation : info.deviations) fmt::print("    - {}\n", deviation);
}

// Infos of every entry whose name is `name`, or of that one reference; the instance's, since a factory may
// derive its rule from parameters.
std::vector<PolicyInfo> matching(const std::string& name) {
  std::vector<PolicyInfo> infos;
  for (const PolicyEntry& entry : policy_registry()) {
    PolicyInfo info = entry.make(entry.info())->info();
    if (name.empty() || name == info.name || name == full_name(info)) infos.push_back(std::move(info));
  }
  // A plug-in, or an unknown name: then this throws, with the nearest ones.
  if (infos.empty()) infos.push_back(make_policy(name)->info());
  return infos;
}

}  // namespace

void add_policies(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "policies", "the catalogue of eviction policies; with a name, one in full",
                  "  kvlapse policies\n  kvlapse policies rkv@zefan-cai");
  auto name = std::make_shared<std::string>();
  command->add_option("name", *name, "policy, with or without @reference");
  command->callback([name, &context] {
    std::vector<PolicyInfo> infos = matching(*name);
    if (context.json) {
      Json rows = Json::array();
      for (const PolicyInfo& info : infos) rows.push_back(describe(info));
      print_json({{"policies", rows}});
    } else if (!name->empty()) {
      for (const PolicyInfo& info : infos) print_one(info);
    } else {
      Table table({"policy", "evicts", "victims", "what it keeps"});
      for (const PolicyInfo& info : infos)
        table.add({full_name(info),
                   info.evicts    ? fmt::format("every {}", info.rule.cadence)
                   : info.selects ? "never: selects"
                                  : "never",
                   !info.evicts                                  ? ""
                   : info.rule.granularity == Granularity::layer ? "per layer"
                                                                 : "per kv head",
                   std::string(info.summary)});
      fmt::print(
          "{}\nEvery policy takes pin_prompt recent gqa cadence cast ties granularity, as in "
          "random:pin_prompt=1:recent=32.\n",
          table.text());
    }
  });
}

}  // namespace kvlapse::cli
