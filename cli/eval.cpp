// Closed loop: every configuration really evicts while it generates. Problems are paired: each configuration
// gets the same ones, so that differences between rows are differences of policy.
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/model_path.h"
#include "cli/products.h"
#include "cli/progress.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "core/engine/decode_session.h"
#include "core/task/task.h"
#include "kernels/cpu/cpu_backend.h"
#include "replay/results_file.h"
#include "replay/statistics.h"

namespace kvlapse::cli {
namespace {

struct Options {
  std::string model, tasks, policies = "full", budgets = "100%", out, kv_dtype = "fp32",
                            products = kDefaultProducts;
  int n = 32, batch = 16, max_tokens = 0, threads = 0, size = 0;
  uint64_t seed = 0;
  bool force = false;
};

struct Outcome {
  bool right = false;
  int n_generated = 0;
  std::vector<int32_t> tokens;  // generated
};

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> parts;
  std::string part;
  for (char c : text + ",") {
    if (c != ',') {
      part += c;
    } else if (!part.empty()) {
      parts.push_back(std::move(part));
      part.clear();
    }
  }
  return parts;
}

class Evaluation {
 public:
  Evaluation(const Options& options, const Context& context)
      : options_(options),
        model_(load_model(find_model(options.model))),
        backend_(make_cpu_backend(options.threads, products_of(options.products, model_))),
        kv_dtype_(parse_dtype(options.kv_dtype)),
        enabled_(!context.quiet) {}

  const std::string& model_name() const { return model_.spec.name; }

  // Runs all cells of one task; `emit` gets each finished row.
  void run_task(const std::string& task, const std::vector<std::unique_ptr<Policy>>& policies,
                const std::vector<Budget>& budgets, const std::function<void(Json)>& emit) {
    std::vector<TaskProblem> problems;
    for (int i = 0; i < options_.n; ++i)
      problems.push_back(make_task_problem(task, options_.seed + i, options_.size));
    std::unique_ptr<Policy> full = make_policy("full");
    const std::vector<Outcome> reference = run_cell(task, problems, *full, parse_budget("100%"));
    if (interrupted()) return;
    emit(row(task, *full, 0, "100%", reference, reference));
    for (const auto& policy : policies) {
      if (!policy->info().evicts) continue;
      for (const Budget& budget : budgets) {
        std::vector<Outcome> outcomes = run_cell(task, problems, *policy, budget);
        if (interrupted()) return;
        emit(row(task, *policy, budget_slots_, budget.text(), outcomes, reference));
      }
    }
  }

 private:
  std::vector<Outcome> run_cell(const std::string& task, const std::vector<TaskProblem>& problems,
                                const Policy& policy, const Budget& budget) {
    std::vector<Outcome> outcomes(problems.size());
    Progress progress(
        fmt::format("{} {} {}", task, canonical_spec(policy), policy.info().evicts ? budget.text() : ""),
        static_cast<double>(problems.size()), "problems", enabled_);
    budget_slots_ = 0;
    for (size_t begin = 0; begin < problems.size(); begin += options_.batch) {
      const size_t end = std::min(problems.size(), begin + options_.batch);
      SessionOptions session_options;
      session_options.policy = &policy;
      session_options.budget = budget;
      session_options.kv_dtype = kv_dtype_;
      session_options.interrupt = &interrupted();
      DecodeSession session(*backend_, model_, session_options);
      for (size_t i = begin; i < end; ++i) {
        SequenceRequest request;
        request.prompt = model_.tokenizer->encode(problems[i].prompt, SpecialTokens::parse);
        // A wrong run may ramble: room for a quarter more than the right text, then it counts as wrong.
        auto right_tokens = static_cast<int>(task_token_count(problems[i].completion));
        int room = right_tokens + right_tokens / 4 + 64;
        request.max_tokens = options_.max_tokens > 0 ? options_.max_tokens : room;
        session.add_sequence(std::move(request));
      }
      while (session.step()) {
      }
      if (interrupted()) break;
      for (size_t i = begin; i < end; ++i) {
        const SequenceState& state = session.sequence(static_cast<int>(i - begin));
        Outcome& outcome = outcomes[i];
        outcome.tokens.assign(state.tokens.begin() + state.n_prompt, state.tokens.end());
        outcome.n_generated = state.generated();
        outcome.right = answer_is_right(problems[i], model_.tokenizer->decode(outcome.tokens));
        budget_slots_ = std::max(budget_slots_, state.budget_slots);
      }
      progress.update(static_cast<double>(end));
    }
    return outcomes;
  }

  static Json row(const std::string& task, const Policy& policy, int budget_slots,
                  const std::string& budget_text, const std::vector<Outcome>& outcomes,
                  const std::vector<Outcome>& reference) {
    int n = static_cast<int>(outcomes.size()), correct = 0;
    double tokens = 0, reference_tokens = 0;
    std::vector<double> divergence;  // generated tokens before the first that differs from the full cache's
    for (int i = 0; i < n; ++i) {
      correct += outcomes[i].right;
      tokens += outcomes[i].n_generated;
      reference_tokens += reference[i].n_generated;
      const auto &a = outcomes[i].tokens, &b = reference[i].tokens;
      auto [left, right] = std::mismatch(a.begin(), a.end(), b.begin(), b.end());
      divergence.push_back(static_cast<double>(left - a.begin()));
    }
    std::sort(divergence.begin(), divergence.end());
    Interval ci = wilson(correct, n);
    return {{"task", task},
            {"policy", canonical_spec(policy)},
            {"budget_slots", budget_slots},
            {"budget", budget_text},
            {"n", n},
            {"correct", correct},
            {"accuracy", static_cast<double>(correct) / n},
            {"ci95_low", ci.low},
            {"ci95_high", ci.high},
            {"tokens_mean", tokens / n},
            {"length_ratio", tokens / reference_tokens},
            {"first_divergence_median", divergence[static_cast<size_t>(n) / 2]},
            {"open_loop", false}};
  }

  const Options& options_;
  Model model_;
  std::unique_ptr<Backend> backend_;
  DType kv_dtype_;
  bool enabled_;
  int budget_slots_ = 0;
};

EvalRow result_row(const Json& row, const std::string& model, int64_t seed) {
  EvalRow r;
  r.model = model;
  r.task = row["task"];
  r.policy = row["policy"];
  r.budget = row["budget"];
  r.budget_slots = row["budget_slots"];
  r.seed = seed;
  r.n = row["n"];
  r.correct = row["correct"];
  r.accuracy = row["accuracy"];
  r.ci95_low = row["ci95_low"];
  r.ci95_high = row["ci95_high"];
  r.tokens_mean = row["tokens_mean"];
  r.length_ratio = row["length_ratio"];
  r.first_divergence_median = row["first_divergence_median"];
  return r;
}

void run_eval(const Options& options, Context& context) {
  if (options.n < 1) fail_usage("eval: --n: expected at least 1, found {}", options.n);
  std::vector<std::string> tasks = split_list(options.tasks);
  for (const std::string& task : tasks) {
    if (find_task_family(task)) continue;
    std::vector<std::string_view> known;
    for (const TaskFamily& family : task_families()) known.push_back(family.name);
    fail_usage("eval: unknown task '{}'{}", task, suggest(task, known));
  }
  std::vector<std::unique_ptr<Policy>> policies;
  for (const PolicySpec& spec : parse_policy_list(options.policies)) policies.push_back(make_policy(spec));
  std::vector<Budget> budgets = parse_budget_list(options.budgets);

  Evaluation evaluation(options, context);
  std::optional<ResultsFile> results;
  if (!options.out.empty())
    results.emplace(options.out, options.force ? ResultsFile::Open::replace : ResultsFile::Open::create);
  Json rows = Json::array();
  Table table(
      {"task", "policy", "budget", "right", "accuracy", "95 % interval", "tokens", "length", "diverges at"});
  for (const std::string& task : tasks) {
    evaluation.run_task(task, policies, budgets, [&](Json row) {
      table.add(
          {row["task"], row["policy"],
           row["budget_slots"] == 0 ? "-" : fmt::format("{}", row["budget_slots"].get<int>()),
           fmt::format("{}/{}", row["correct"].get<int>(), row["n"].get<int>()),
           fmt::format("{:.3f}", row["accuracy"].get<double>()),
           fmt::format("{:.3f} to {:.3f}", row["ci95_low"].get<double>(), row["ci95_high"].get<double>()),
           fmt::format("{:.0f}", row["tokens_mean"].get<double>()),
           fmt::format("{:.2f}", row["length_ratio"].get<double>()),
           fmt::format("{:.0f}", row["first_divergence_median"].get<double>())});
      if (results) results->add(result_row(row, evaluation.model_name(), static_cast<int64_t>(options.seed)));
      rows.push_back(std::move(row));
    });
  }
  if (results && !interrupted()) results->finish();
  if (context.json)
    print_json({{"rows", rows}});
  else
    fmt::print("{}closed loop: every row really evicted while generating\n", table.text());
  if (interrupted()) context.exit_code = 2;
}

}  // namespace

void add_eval(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "eval", "closed loop: evict while generating, and count right answers",
                  "  kvlapse eval --task sort,rotor --n 32 --policy streaming_llm,longflow --budget 128,256\n"
                  "  kvlapse eval --task sum --n 200 --json");
  auto options = std::make_shared<Options>();
  command->add_option("--model", options->model, "model folder, file or name (default: the built-in one)");
  command->add_option("--task", options->tasks, "task families, comma-separated")->required();
  command->add_option("--n", options->n, "problems of each family")->capture_default_str();
  command->add_option("--policy", options->policies,
                      "policies, comma-separated; full always runs as the reference");
  command->add_option("--budget", options->budgets,
                      "budgets, comma-separated: slots per kv head or a share of prompt + max tokens");
  command->add_option("--seed", options->seed, "first problem")->capture_default_str();
  command->add_option("--size", options->size, "problem size (default: the family's)");
  command->add_option("--max-tokens", options->max_tokens,
                      "tokens a problem may take (default: a quarter more than its right text)");
  command->add_option("--batch", options->batch, "sequences decoded together; changes no result")
      ->capture_default_str();
  command->add_option("--kv-dtype", options->kv_dtype, "fp32, fp16 or bf16")->capture_default_str();
  add_products_option(*command, options->products);
  command->add_option("-j,--threads", options->threads, "threads (default: all)");
  command->add_option("-o,--output", options->out, "results file (*.kvr) that takes the rows");
  command->add_flag("--force", options->force, "replace an existing results file");
  command->callback([options, &context] { run_eval(*options, context); });
}

}  // namespace kvlapse::cli
