#include <fmt/format.h>

#include <charconv>

#include "cli/command.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "replay/comparison.h"

namespace kvlapse::cli {

void add_choose(CLI::App& app, Context& context) {
  struct Options {
    std::string file, limit;
    double confidence = 0.95;
  };
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(app, context, "choose",
                                  "the smallest budget of each policy that is good enough, with confidence",
                                  "  kvlapse choose run.kvr --max output_error=0.1\n"
                                  "  kvlapse choose run.kvr --max recall_below_90=0.05 --confidence 0.99");
  command->add_option("results", options->file, "results file (*.kvr)")->required()->type_name("FILE");
  command->add_option("--max", options->limit, "METRIC=VALUE: stays below VALUE (recalls: above it)")
      ->required();
  command->add_option("--confidence", options->confidence, "one-sided")
      ->check(CLI::Range(0.5, 0.999))
      ->capture_default_str();
  command->callback([options, &context] {
    const size_t equals = options->limit.find('=');
    const std::string metric = options->limit.substr(0, equals);
    double limit = 0;
    const char* end = options->limit.data() + options->limit.size();
    if (equals == std::string::npos ||
        std::from_chars(options->limit.data() + equals + 1, end, limit).ptr != end)
      fail_usage("--max: expected METRIC=VALUE, found '{}'", options->limit);
    const std::vector<Choice> choices =
        choose_budgets(read_results(options->file, /*details=*/true), metric, limit, options->confidence);
    if (context.json) {
      Json rows = Json::array();
      for (const Choice& c : choices) {
        Json row = {{"policy", c.policy}};
        if (!c.budget.empty()) {
          row["budget_slots"] = c.budget_slots;
          row["budget"] = c.budget;
        }
        row["enough"] = !c.budget.empty();
        row[metric] = c.value.mean;
        row["ci_low"] = c.value.low;
        row["ci_high"] = c.value.high;
        row["samples"] = c.n_samples;
        row["basis"] = c.basis;
        rows.push_back(row);
      }
      return print_json(
          {{"metric", metric}, {"limit", limit}, {"confidence", options->confidence}, {"rows", rows}});
    }
    Table table({"policy", "budget", "slots", metric, "interval", "samples"});
    bool steps = false;
    for (const Choice& c : choices) {
      steps |= c.basis == "steps";
      table.add(
          {c.policy, c.budget.empty() ? "none of those replayed" : c.budget,
           c.budget.empty() ? "" : fmt::format("{}", c.budget_slots), fmt::format("{:.4f}", c.value.mean),
           fmt::format("[{:.4f}, {:.4f}]", c.value.low, c.value.high),
           fmt::format("{} {}", c.basis == "steps" ? 1 : c.n_samples, c.basis == "steps" ? "(steps)" : "")});
    }
    fmt::print("{}", table.text());
    if (steps)
      fmt::print(
          "(steps): one sequence; the interval is over blocks of its steps and says nothing about other "
          "prompts\n");
  });
}

}  // namespace kvlapse::cli
