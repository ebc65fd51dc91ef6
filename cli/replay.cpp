#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <set>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "replay/comparison.h"
#include "replay/self_replay.h"
#include "replay/sweep.h"

namespace kvlapse::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::vector<std::string> traces, policies, budgets;
  std::string metrics = "all", match = "nominal", shard = "0/1", layers, heads, steps, output, device = "cpu",
              teacher;
  bool self = false, resume = false, force = false;
  int sbatch = 0;
  int threads = 0, max_tokens = 0, memory_mib = 768, cells_at_once = 48;
};

std::pair<int, int> parse_pair(std::string_view option, std::string_view text, char separator) {
  const size_t at = text.find(separator);
  try {
    if (at != std::string_view::npos) {
      size_t used_a = 0, used_b = 0;
      const std::string a(text.substr(0, at)), b(text.substr(at + 1));
      const int first = std::stoi(a, &used_a), second = std::stoi(b, &used_b);
      if (used_a == a.size() && used_b == b.size()) return {first, second};
    }
  } catch (const std::logic_error&) {  // not a number: the message below
  }
  fail_usage("{}: expected A{}B, found '{}'", option, separator, text);
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ",") + part;
  return text;
}

std::string quoted(const std::string& word) {
  std::string out = "'";
  for (char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

ReplayOptions replay_options(const Options& o) {
  ReplayOptions options;
  options.threads = o.threads;
  options.memory_bytes = static_cast<size_t>(o.memory_mib) << 20;
  auto range = [](std::string_view option, const std::string& text, int& begin, int& end) {
    if (text.empty()) return;
    std::tie(begin, end) = parse_pair(option, text, ':');
    if (begin < 0 || begin >= end) fail_usage("{}: expected A:B with 0 <= A < B, found '{}'", option, text);
  };
  range("--layers", o.layers, options.layer_begin, options.layer_end);
  range("--heads", o.heads, options.head_begin, options.head_end);
  range("--steps", o.steps, options.step_begin, options.step_end);
  return options;
}

// Lines of a Slurm array: one task a shard, each resumable, so that a requeued task goes on.
void print_sbatch(const Options& o) {
  std::string command = "kvlapse replay";
  for (const std::string& trace : o.traces) command += " " + quoted(trace);
  command += " --policy " + quoted(joined(o.policies)) + " --budget " + quoted(joined(o.budgets));
  if (o.match != "nominal") command += " --match " + o.match;
  if (!o.layers.empty()) command += " --layers " + o.layers;
  if (!o.heads.empty()) command += " --heads " + o.heads;
  if (!o.steps.empty()) command += " --steps " + o.steps;
  if (o.device != "cpu") command += " --device " + o.device;
  if (o.max_tokens > 0) command += fmt::format(" --max-tokens {}", o.max_tokens);
  if (o.cells_at_once != Options{}.cells_at_once)
    command += fmt::format(" --cells-at-once {}", o.cells_at_once);
  fs::path stem = fs::path(o.output).replace_extension();
  const std::string parts = quoted(stem.string()) + ".part-";
  fmt::print("#!/bin/bash\n");
  fmt::print("#SBATCH --job-name=kvlapse-replay\n#SBATCH --array=0-{}\n#SBATCH --requeue\n", o.sbatch - 1);
  fmt::print("#SBATCH --cpus-per-task=2\n#SBATCH --mem={}M\n", o.memory_mib + 256);
  if (o.device != "cpu") fmt::print("#SBATCH --gpus-per-task=1\n");
  fmt::print("# Then: kvlapse merge {}*.kvr -o {}\n", parts, quoted(o.output));
  fmt::print(
      "{} --memory-mib {} -j \"${{SLURM_CPUS_PER_TASK:-2}}\" \\\n  --shard \"${{SLURM_ARRAY_TASK_ID}}/{}\" "
      "--resume -q -o {}\"${{SLURM_ARRAY_TASK_ID}}\".kvr\n",
      command, o.memory_mib, o.sbatch, parts);
}

void print_self(const SelfReplayReport& report, const std::string& trace, Context& context) {
  if (report.mismatches > 0) context.exit_code = 1;
  if (context.json) {
    Json document = {{"policy", report.policy},       {"budget", report.budget_slots},
                     {"decisions", report.decisions}, {"mismatches", report.mismatches},
                     {"ties", report.ties},           {"first_mismatch", nullptr}};
    if (report.first_mismatch) {
      const Mismatch& m = *report.first_mismatch;
      document["first_mismatch"] = {{"sequence", m.sequence},
                                    {"layer", m.layer},
                                    {"step", m.step},
                                    {"kv_head", m.kv_head},
                                    {"recorded_pos", m.recorded_pos},
                                    {"replayed_pos", m.replayed_pos}};
    }
    return print_json(document);
  }
  fmt::print("{}: {} at {} slots: {} decisions, {} mismatches, {} near ties\n", trace, report.policy,
             report.budget_slots, report.decisions, report.mismatches, report.ties);
  if (report.first_mismatch) {
    const Mismatch& m = *report.first_mismatch;
    fmt::print(
        "first mismatch: sequence {}, layer {}, step {}, kv head {}: recorded position {}, replayed {}\n",
        m.sequence, m.layer, m.step, m.kv_head, m.recorded_pos, m.replayed_pos);
  }
}

Json row_json(const ResultCell& cell, const std::string& trace) {
  Json row = {{"trace", trace},
              {"policy", cell.policy},
              {"budget", cell.budget},
              {"budget_slots", cell.budget_slots},
              {"budget_share", cell.budget_share}};
  for (const NamedValue& v : cell.total)
    if (is_integer_metric(v.name))
      row[v.name] = static_cast<int64_t>(v.value);
    else
      row[v.name] = v.value;
  row["open_loop"] = cell.open_loop;
  row["cell"] = cell.id;
  return row;
}

Json comparison_json(const std::vector<ComparedRow>& rows) {
  Json out = Json::array();
  for (const ComparedRow& r : rows) {
    Json row = {{"policy", r.policy},
                {"budget", r.budget},
                {"budget_slots", r.budget_slots},
                {"samples", r.n_samples}};
    auto put = [&](const char* name, const ComparedMetric& m) {
      row[name] = {{"mean", m.value.mean},
                   {"ci95_low", m.value.low},
                   {"ci95_high", m.value.high},
                   {"best", m.best},
                   {"in_noise", m.in_noise}};
    };
    put("recall", r.recall);
    put("output_error", r.output_error);
    if (std::isfinite(r.regret)) row["regret"] = r.regret;
    out.push_back(row);
  }
  return out;
}

std::string marked(const ComparedMetric& m, int n_samples) {
  std::string text = fmt::format("{:.4f}", m.value.mean);
  if (n_samples > 1) text += fmt::format(" [{:.4f}, {:.4f}]", m.value.low, m.value.high);
  return text + (m.best ? " *" : m.in_noise ? " ~" : "  ");
}

void print_table(const std::vector<ComparedRow>& rows, const std::string& selection,
                 const std::set<std::string>& fitted) {
  Table table({"policy", "budget", "slots mean", "peak", "recall", "p10", "no sinks", "output error", "p90",
               "top-10", "KV peak"});
  bool noise = false;
  for (const ComparedRow& r : rows) {
    auto value = [&](const char* name) { return value_of(r.means, name); };
    noise |= r.recall.in_noise || r.output_error.in_noise;
    table.add({r.policy, r.budget, fmt::format("{:.1f}", value("slots_mean")),
               fmt::format("{:.0f}", value("slots_peak")), marked(r.recall, r.n_samples),
               fmt::format("{:.4f}", value("recall_p10")),
               fmt::format("{:.4f}", value("recall_no_sinks_mean")), marked(r.output_error, r.n_samples),
               fmt::format("{:.4f}", value("output_error_p90")), fmt::format("{:.4f}", value("topk_recall")),
               format_bytes(value("kv_bytes_peak"))});
  }
  fmt::print("{}", table.text());
  if (!selection.empty()) fmt::print("only {}\n", selection);
  for (const std::string& policy : fitted)
    fmt::print("! {}: calibrated on a recording that it scores here; no fair comparison\n", policy);
  fmt::print("open loop: q, k, v are the recording's, whatever a policy evicts. * best of its budget{}\n",
             noise ? "; ~ not distinguishable from it (95 %, paired)" : "");
}

void run_self(const Options& o, Context& context) {
  if (!o.heads.empty() || !o.steps.empty())
    fail_usage("replay --self: compares every victim of a layer: expected no --heads and no --steps");
  ReplayOptions options = replay_options(o);
  options.progress = [](int, int) { return !interrupted(); };
  for (const std::string& file : o.traces) {
    const TraceReader trace(file);
    if (!o.teacher.empty()) {
      const TraceReader full(o.teacher);
      print_self(layer0_replay(full, trace, options), file, context);
    } else {
      print_self(self_replay(trace, options), file, context);
    }
  }
}

void run_sweep(const Options& o, Context& context) {
  SweepOptions options;
  options.replay = replay_options(o);
  options.max_tokens = o.max_tokens;
  options.match = parse_budget_match(o.match);
  options.cells_at_once = o.cells_at_once;
  std::tie(options.shard, options.n_shards) = parse_pair("--shard", o.shard, '/');
  std::vector<fs::path> traces(o.traces.begin(), o.traces.end());
  std::unique_ptr<ReplayDevice> device;
  if (const int index = parse_device(o.device); index >= 0) device = make_cuda_replay(index);
  options.device = device.get();
  Sweep sweep(traces, parse_policy_list(joined(o.policies)), parse_budget_list(joined(o.budgets)), options);
  if (device) {
    std::set<std::string> others;
    for (const SweepCell& cell : sweep.cells())
      if (!sweep.on_device(cell)) others.insert(canonical_spec(*cell.policy));
    if (!others.empty())
      fmt::print(stderr, "replay: on the CPU, since no GPU serves them: {}\n",
                 joined({others.begin(), others.end()}));
  }
  ResultsFile results(o.output, o.resume  ? ResultsFile::Open::resume
                                : o.force ? ResultsFile::Open::replace
                                          : ResultsFile::Open::create);
  Progress progress("replay", static_cast<double>(sweep.cells().size()), "cells", !context.quiet);
  sweep.run(results, [&](double done, double) {
    progress.update(done);
    return !interrupted();
  });
  progress.finish();
  results.finish();

  const Results all = read_results(o.output);
  const std::vector<ComparedRow> rows = compare(all);
  const std::string selection = all.cells.empty() ? "" : all.cells[0].selection;
  std::set<std::string> fitted;
  for (const ResultCell& cell : all.cells)
    if (value_of(cell.total, "fitted_on_this_trace") == 1) fitted.insert(cell.policy);
  if (!context.json) return print_table(rows, selection, fitted);
  Json document = {{"trace", all.traces.empty() ? "" : all.traces[0].name},
                   {"results", o.output},
                   {"device", device ? device->describe() : "cpu"},
                   {"rows", Json::array()}};
  if (!selection.empty()) document["selection"] = selection;
  for (const ResultCell& cell : all.cells)
    for (const ResultTrace& trace : all.traces)
      if (trace.hash == cell.trace) document["rows"].push_back(row_json(cell, trace.name));
  document["comparison"] = comparison_json(rows);
  print_json(document);
}

}  // namespace

void add_replay(CLI::App& app, Context& context) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(
      app, context, "replay", "every policy x budget over every trace, open loop",
      "  kvlapse replay run.kvl --policy longflow,rkv,random:pin_prompt=1 --budget 10%,25%,512 -o run.kvr\n"
      "  kvlapse replay run.kvl --device cuda --policy h2o,tova,longflow --budget 10%,20%,40% -o gpu.kvr\n"
      "  kvlapse replay run.kvl --self");
  command->add_option("traces", options->traces, "recordings (*.kvl)")->required()->type_name("TRACE");
  command->add_option("--policy", options->policies,
                      "policies, comma-separated: name[@reference][:key=value...]");
  command->add_option("--budget", options->budgets,
                      "slots per kv head (512) or a share of the sequence (25%), comma-separated");
  command->add_option("-o,--output", options->output, "results file (*.kvr)");
  command->add_flag("--self", options->self,
                    "replay the recorded policy and compare every victim; exit 1 on a mismatch");
  command->add_option(
      "--layer0-of", options->teacher,
      "with --self: replay layer 0 of this recording of the same tokens instead, under the trace's policy");
  command
      ->add_option("--match", options->match, "budgets that cost the same: nominal, peak or mean occupancy")
      ->capture_default_str();
  command->add_option("--metrics", options->metrics, "all")
      ->check(CLI::IsMember({"all"}))
      ->capture_default_str();
  command->add_option("--layers", options->layers, "only layers A:B (B exclusive)");
  command->add_option("--heads", options->heads,
                      "measure kv heads A:B only, with their query heads; all heads still decide");
  command->add_option("--steps", options->steps,
                      "measure positions A:B only; those before still decide, those behind are not replayed");
  command
      ->add_option("--max-tokens", options->max_tokens,
                   "as if the recording ended after N tokens: shares are of these")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--shard", options->shard, "only cells of shard I/N, I from 0")->capture_default_str();
  command
      ->add_option("--emit-sbatch", options->sbatch,
                   "print a Slurm array of N tasks and stop (8 without a number)")
      ->expected(0, 1)
      ->default_str("8")
      ->check(CLI::Range(1, 100000));
  command->add_flag("--resume", options->resume, "go on with an unfinished results file");
  command->add_flag("--force", options->force, "replace an existing results file");
  command->add_option("-j,--threads", options->threads, "threads; 0: all cores")
      ->check(CLI::NonNegativeNumber);
  command->add_option("--memory-mib", options->memory_mib, "working memory")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option("--cells-at-once", options->cells_at_once,
                   "configurations that share work; a killed sweep repeats at most these")
      ->check(CLI::PositiveNumber)
      ->capture_default_str();
  command
      ->add_option(
          "--device", options->device,
          "cpu or cuda[:i]: a GPU replays the policies that it serves (window, streaming_llm, random, "
          "h2o, tova, longflow, vatp that evict at every step), the CPU the others")
      ->capture_default_str();
  command->callback([options, &context] {
    parse_device(options->device);
    if (options->self && options->device != "cpu")
      fail_usage("replay --self: compares victims on the CPU: expected --device cpu, found {}",
                 options->device);
    if (options->self) return run_self(*options, context);
    if (options->policies.empty() || options->budgets.empty())
      fail_usage("replay: expected --policy and --budget, or --self");
    if (options->output.empty()) fail_usage("replay: expected -o FILE.kvr");
    if (options->sbatch > 0) return print_sbatch(*options);
    run_sweep(*options, context);
  });
}

}  // namespace kvlapse::cli
