#include <fmt/format.h>

#include <fstream>

#include "cli/command.h"
#include "cli/model_info.h"
#include "cli/model_path.h"
#include "cli/progress.h"
#include "replay/results_file.h"
#include "trace/trace_reader.h"

namespace kvlapse::cli {
namespace {

// What GPU facts the trace holds, and why one that was asked for is missing.
Json counters_of(const TraceReader& reader, const std::string& name) {
  Json counters = {{"name", name}, {"provenance", "none"}, {"reason_if_missing", ""}};
  const std::vector<GpuSource> sources = reader.gpu_sources();
  if (sources.empty())
    counters["reason_if_missing"] = name == "none" ? "recorded on the CPU, or without --counters"
                                                   : "the recording ended before its counters were stored";
  Json rows = Json::array();
  for (const GpuSource& s : sources) {
    rows.push_back({{"name", s.name},
                    {"state", s.state()},
                    {"provenance", s.provenance},
                    {"reason", s.reason},
                    {"advice", s.advice},
                    {"records", s.records},
                    {"dropped", s.dropped},
                    {"overhead_ns", s.overhead_ns}});
    if (s.state() != "missing") counters["provenance"] = s.provenance;
    if (!s.reason.empty()) counters["reason_if_missing"] = s.reason;
  }
  if (!sources.empty()) counters["sources"] = std::move(rows);
  return counters;
}

Json trace_info(const TraceReader& reader) {
  const TraceHeader& header = reader.header();
  std::map<std::string, std::string> meta = reader.meta();
  auto fact = [&](const char* key) { return meta.count(key) ? meta[key] : std::string(); };
  int64_t steps = 0;
  Json sequences = Json::array();
  for (int s = 0; s < reader.n_sequences(); ++s) {
    TraceSequence sequence = reader.sequence(s);
    steps += sequence.n_steps;
    Json row = {{"sequence", s},
                {"seed", sequence.seed},
                {"task", sequence.task},
                {"prompt_tokens", sequence.n_prompt},
                {"steps", sequence.n_steps},
                {"think_begin", sequence.think_begin},
                {"think_end", sequence.think_end},
                {"answer", sequence.answer},
                {"end_reason", sequence.end_reason}};
    if (sequence.answer_right) row["answer_right"] = *sequence.answer_right;
    sequences.push_back(std::move(row));
  }
  const std::string counters = fact("counters").empty() ? "none" : fact("counters");
  return {{"kind", "trace"},
          {"format_version", reader.format_version()},
          {"complete", reader.complete()},
          {"interrupted", reader.interrupted()},
          {"model", fact("model")},
          {"policy", header.policy.spec},
          {"budget", header.budget_text},
          {"budget_slots", header.budget_slots},
          {"steps", steps},
          {"layers", header.geometry.n_layers},
          {"kv_heads", header.geometry.n_kv_heads},
          {"q_heads", header.geometry.n_q_heads},
          {"head_dim", header.geometry.head_dim},
          {"kv_dtype", dtype_name(header.geometry.dtype)},
          {"kv_bytes_per_token", header.geometry.token_bytes()},
          {"tier", tier_name(header.tier)},
          {"recorded_layers", {header.layer_begin, header.layer_end}},
          {"device", fact("device")},
          {"counters", counters_of(reader, counters)},
          {"content_hash", reader.content_hash()},
          {"sequences", sequences},
          {"meta", meta}};
}

void print_trace(const Json& info) {
  auto line = [](const char* name, const std::string& value) { fmt::print("  {:<14}{}\n", name, value); };
  line("state", info["complete"].get<bool>()      ? "complete"
                : info["interrupted"].get<bool>() ? "interrupted, valid up to its last step"
                                                  : "not finished: still written, or killed");
  line("model", fmt::format("{}: {} layers, {} q heads, {} kv heads of {}", info["model"].get<std::string>(),
                            info["layers"].get<int>(), info["q_heads"].get<int>(),
                            info["kv_heads"].get<int>(), info["head_dim"].get<int>()));
  line("cache", fmt::format("{}, {} a token", info["kv_dtype"].get<std::string>(),
                            format_bytes(static_cast<double>(info["kv_bytes_per_token"].get<int64_t>()))));
  std::string budget = info["budget"].get<std::string>();
  line("policy", info["policy"].get<std::string>() +
                     (budget.empty() ? ""
                                     : fmt::format(" at {} = {} slots per kv head", budget,
                                                   info["budget_slots"].get<int>())));
  line("tier", fmt::format("{}, layers {} to {}", info["tier"].get<std::string>(),
                           info["recorded_layers"][0].get<int>(), info["recorded_layers"][1].get<int>() - 1));
  if (info["meta"].contains("imported_file"))
    line("imported", fmt::format("{} ({})", info["meta"]["imported_file"].get<std::string>(),
                                 info["meta"]["imported_format"].get<std::string>()));
  line("device", info["device"].get<std::string>());
  line("counters", info["counters"]["name"].get<std::string>());
  for (const Json& s : info["counters"].value("sources", Json::array())) {
    std::string text = fmt::format("{} {}, {} records", s["name"].get<std::string>(),
                                   s["state"].get<std::string>(), s["records"].get<int64_t>());
    if (s["dropped"].get<int64_t>() > 0) text += fmt::format(", {} lost", s["dropped"].get<int64_t>());
    if (const auto reason = s["reason"].get<std::string>(); !reason.empty())
      text += fmt::format(": {}; {}", reason, s["advice"].get<std::string>());
    line("", text);
  }
  line("content", info["content_hash"].get<std::string>());
  for (const Json& s : info["sequences"])
    line("sequence",
         fmt::format(
             "{}: {} prompt tokens, {} steps, ended by {}{}{}", s["sequence"].get<int>(),
             s["prompt_tokens"].get<int>(), s["steps"].get<int>(),
             s["end_reason"].get<std::string>().empty() ? "nothing yet" : s["end_reason"].get<std::string>(),
             s["task"].get<std::string>().empty() ? "" : ", task " + s["task"].get<std::string>(),
             !s.contains("answer_right")     ? ""
             : s["answer_right"].get<bool>() ? ", answer right"
                                             : ", answer wrong"));
}

Json results_info(const Results& results) {
  Json traces = Json::array(), cells = Json::array(), evals = Json::array();
  for (const ResultTrace& t : results.traces)
    traces.push_back({{"content_hash", t.hash},
                      {"name", t.name},
                      {"model", t.model},
                      {"policy", t.policy},
                      {"kv_dtype", t.kv_dtype},
                      {"layers", t.n_layers},
                      {"q_heads", t.n_q_heads},
                      {"kv_heads", t.n_kv_heads},
                      {"head_dim", t.head_dim},
                      {"sequences", t.n_sequences},
                      {"tokens", t.n_tokens}});
  for (const ResultCell& c : results.cells)
    cells.push_back({{"id", c.id},
                     {"trace", c.trace},
                     {"policy", c.policy},
                     {"budget", c.budget},
                     {"budget_slots", c.budget_slots},
                     {"match", c.match},
                     {"layers", {c.layer_begin, c.layer_end}},
                     {"selection", c.selection},
                     {"open_loop", c.open_loop}});
  for (const EvalRow& e : results.evals)
    evals.push_back({{"model", e.model},
                     {"task", e.task},
                     {"policy", e.policy},
                     {"budget", e.budget},
                     {"budget_slots", e.budget_slots},
                     {"seed", e.seed},
                     {"n", e.n},
                     {"correct", e.correct}});
  return {{"kind", "results"},
          {"complete", results.complete},
          {"traces", std::move(traces)},
          {"cells", std::move(cells)},
          {"evals", std::move(evals)}};
}

void print_results(const Json& info) {
  fmt::print("  {:<14}{}\n", "state",
             info["complete"].get<bool>() ? "complete" : "unfinished: `kvlapse replay --resume` goes on");
  for (const Json& t : info["traces"])
    fmt::print("  {:<14}{}: {}, {}, {} tokens in {} sequence{}, {} layers, {} kv heads of {}\n", "trace",
               t["name"].get<std::string>(), t["model"].get<std::string>(), t["kv_dtype"].get<std::string>(),
               t["tokens"].get<int64_t>(), t["sequences"].get<int>(),
               t["sequences"].get<int>() == 1 ? "" : "s", t["layers"].get<int>(), t["kv_heads"].get<int>(),
               t["head_dim"].get<int>());
  for (const Json& c : info["cells"])
    fmt::print("  {:<14}{} at {} = {} slots, {}{}\n", "replay", c["policy"].get<std::string>(),
               c["budget"].get<std::string>(), c["budget_slots"].get<int>(),
               c["open_loop"].get<bool>() ? "open loop" : "closed loop",
               c["selection"] == "" ? "" : ", only " + c["selection"].get<std::string>());
  for (const Json& e : info["evals"])
    fmt::print("  {:<14}{}, {} at {}: {} of {} right, closed loop\n", "evaluation",
               e["task"].get<std::string>(), e["policy"].get<std::string>(), e["budget"].get<std::string>(),
               e["correct"].get<int>(), e["n"].get<int>());
}

}  // namespace

void add_info(CLI::App& app, Context& context) {
  CLI::App* command = add_command(app, context, "info", "what is in a trace, a results file or a model",
                                  "  kvlapse info run.kvl\n"
                                  "  kvlapse info compare.kvr\n"
                                  "  kvlapse info models/smollm2 --tokens 2048,8192 --json");
  auto file = std::make_shared<std::string>();
  auto kv_dtype = std::make_shared<std::string>("fp16");
  auto lengths = std::make_shared<std::vector<int64_t>>();
  command->add_option("file", *file, "trace; results; model file, folder or name")->required();
  command->add_option("--kv-dtype", *kv_dtype, "of a model's cache: fp32, fp16, bf16 or fp8")
      ->capture_default_str();
  command->add_option("--tokens", *lengths, "lengths to give a model's cache bytes for")
      ->delimiter(',')
      ->check(CLI::PositiveNumber);
  command->callback([=, &context] {
    if (is_results_file(*file)) {
      const Json info = results_info(read_results(*file));
      if (context.json) return print_json(info);
      fmt::print("{}\n", *file);
      return print_results(info);
    }
    const bool is_trace = std::filesystem::is_regular_file(*file) && !is_model_path(*file);
    Json info = is_trace ? trace_info(TraceReader(*file))
                         : model_info(find_model(*file), parse_dtype(*kv_dtype), *lengths);
    if (context.json) return print_json(info);
    if (!is_trace) return print_model_info(info);
    fmt::print("{}\n", *file);
    print_trace(info);
  });
}

}  // namespace kvlapse::cli
