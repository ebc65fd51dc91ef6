// Measures the engine on this machine; every figure stands beside the limit that the same run measured.
#include "kernels/cpu/bench/bench.h"

#include <fmt/format.h>

#include <optional>
#include <thread>

#include "cli/bench_record.h"
#include "cli/bench_replay.h"
#include "cli/command.h"
#include "cli/model_path.h"
#include "cli/products.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "core/policy/spec.h"
#include "kernels/choice/gpu.h"

namespace kvlapse::cli {
namespace {

struct Options {
  std::string what, model, policy = "longflow", kv_dtype = "fp32", products = kDefaultProducts,
                           tier = "events";
  int threads = 0, slots = 4096, batch = 1, context = 4096, budget = 0, runs = 30, steps = 64;
  int q_heads = 8, kv_heads = 4, head_dim = 64;
  int cache_mib = 256;
  std::vector<int> batches = {1, 4, 16}, configs = {1, 4, 16};  // one row each
  std::string device = "cpu", trace;
  uint64_t seed = 0;
  bool given_shape = false;  // of attention
  bool given_context = false, given_runs = false;
};

// Without a shape of its own: the standard table.
std::vector<BenchRow> attention_on_gpu(const Options& o) {
  CudaAttentionBench bench;
  bench.device = parse_device(o.device);
  bench.dtype = parse_dtype(o.kv_dtype == "fp32" ? "bf16" : o.kv_dtype);
  if (o.given_shape) {
    bench.batch = o.batch, bench.n_slots = o.slots;
    bench.n_q_heads = o.q_heads, bench.n_kv_heads = o.kv_heads, bench.head_dim = o.head_dim;
  }
  bench.leave_one_out = make_policy(o.policy)->info().fused == FusedScore::leave_one_out;
  return bench_cuda_attention(bench);
}

std::vector<BenchRow> rkv(const Options& o) {
  if (o.device == "cpu")
    fail(
        "bench rkv: --device: expected cuda[:i], found cpu (on the CPU `bench decode --policy rkv` holds "
        "it)");
  CudaRkvBench bench;
  bench.device = parse_device(o.device);
  bench.batch = o.batch;
  if (o.budget > 0) bench.budget = o.budget;
  bench.dtype = parse_dtype(o.kv_dtype == "fp32" ? "bf16" : o.kv_dtype);
  return bench_cuda_rkv(bench);
}

std::vector<BenchRow> attention(const Options& o) {
  if (o.device != "cpu") return attention_on_gpu(o);
  AttentionBench bench;
  bench.n_threads = o.threads;
  bench.n_slots = o.slots;
  bench.n_q_heads = o.q_heads;
  bench.n_kv_heads = o.kv_heads;
  bench.head_dim = o.head_dim;
  bench.batch = o.batch;
  bench.dtype = parse_dtype(o.kv_dtype);
  bench.cache_bytes = static_cast<size_t>(o.cache_mib) << 20;
  bench.runs = o.runs;
  return bench_attention(bench, *make_policy(o.policy));
}

// A folder without weights gets random ones.
std::vector<BenchRow> decode_on_gpu(const Options& o, const Model* loaded = nullptr) {
  CudaDecodeBench bench;
  bench.device = parse_device(o.device);
  bench.context = o.context;
  bench.batch = o.batch;
  bench.steps = o.steps;
  bench.seed = o.seed;
  if (o.budget > 0) bench.context = o.budget;
  const std::unique_ptr<Policy> policy = make_policy(o.budget > 0 ? o.policy : "full");
  if (loaded != nullptr) return bench_cuda_decode(bench, loaded->spec, &loaded->weights.transformer, *policy);
  const std::filesystem::path path = find_model(o.model);
  const ModelFiles files = open_model_files(path);
  if (files.tensors.empty()) return bench_cuda_decode(bench, files.spec, nullptr, *policy);
  const Model model = load_model(path);
  return bench_cuda_decode(bench, model.spec, &model.weights.transformer, *policy);
}

DecodeBench decode_bench(const Options& o, const Model& model) {
  DecodeBench bench;
  bench.n_threads = o.threads;
  bench.context = o.context;
  bench.batch = o.batch;
  bench.kv_dtype = parse_dtype(o.kv_dtype);
  bench.budget = o.budget;
  bench.steps = o.steps;
  bench.mode = products_of(o.products, model);
  return bench;
}

std::vector<BenchRow> decode(const Options& o) {
  if (o.device != "cpu") return decode_on_gpu(o);
  const Model model = load_model(find_model(o.model));
  return bench_decode(decode_bench(o, model), model, *make_policy(o.budget > 0 ? o.policy : "full"));
}

std::vector<BenchRow> record(const Options& o) {
  const Model model = load_model(find_model(o.model));
  return bench_record(decode_bench(o, model), parse_tier(o.tier), model,
                      *make_policy(o.budget > 0 ? o.policy : "full"));
}

// Decode steps of several batches, as tokens a second: the full cache, then the policy at its budget.
std::vector<BenchRow> throughput(const Options& options) {
  Options o = options;
  const int budget = o.budget > 0 ? o.budget : std::max(1, o.context / 4);
  const std::filesystem::path path = find_model(o.model);
  std::optional<Model> model;
  if (o.device == "cpu" || !open_model_files(path).tensors.empty()) model = load_model(path);
  std::vector<BenchRow> rows;
  for (const int batch : o.batches) {
    double full = 0;
    for (const int slots : {0, budget}) {
      o.batch = batch;
      o.budget = slots;
      BenchRow row = o.device != "cpu" ? decode_on_gpu(o, model ? &*model : nullptr).front()
                                       : bench_decode(decode_bench(o, *model), *model,
                                                      *make_policy(slots > 0 ? o.policy : "full"))
                                             .front();
      const double step_ms = row.median;
      row.bench = "throughput";
      row.median = 1e3 * batch / step_ms;
      row.limit = 1e3 * batch / row.limit;
      row.unit = "tok/s";
      row.name += slots > 0 ? fmt::format(", {} slots", slots) : "";
      if (slots == 0) full = row.median;
      row.numbers.emplace_back("budget_slots", slots);
      row.numbers.emplace_back("step_ms", step_ms);
      row.numbers.emplace_back("times_full", row.median / full);
      rows.push_back(std::move(row));
    }
  }
  return rows;
}

std::vector<BenchRow> replay(const Options& o) {
  ReplayBench bench;
  bench.gpu = parse_device(o.device);
  if (bench.gpu >= 0) {
    bench.n_tokens = 16384;
    bench.n_q_heads = o.q_heads, bench.n_kv_heads = o.kv_heads, bench.head_dim = o.head_dim;
  }
  bench.n_threads = o.threads;
  bench.trace = o.trace;
  if (o.given_context || !o.trace.empty()) bench.n_tokens = o.given_context ? o.context : 0;
  if (o.given_shape) {
    bench.n_q_heads = o.q_heads;
    bench.n_kv_heads = o.kv_heads;
    bench.head_dim = o.head_dim;
  }
  bench.configs = o.configs;
  if (o.given_runs) bench.runs = o.runs;
  return bench_replay(bench);
}

struct Bench {
  const char* name;
  std::vector<BenchRow> (*run)(const Options&);
};
constexpr Bench kBenches[] = {{"attention", attention},   {"rkv", rkv},       {"decode", decode},
                              {"throughput", throughput}, {"replay", replay}, {"record", record}};

Json to_json(const BenchRow& row) {
  Json json = {{"bench", row.bench},
               {"case", row.name},
               {"device", row.device},
               {"median", row.median},
               {"unit", row.unit},
               {"limit", row.limit},
               {"ratio_to_limit", row.ratio_to_limit},
               {"runs", row.runs},
               {"spread", row.spread}};
  for (const auto& [key, value] : row.texts) json[key] = value;
  for (const auto& [key, value] : row.numbers)
    if (value == static_cast<double>(static_cast<int64_t>(value)))
      json[key] = static_cast<int64_t>(value);
    else
      json[key] = value;
  return json;
}

void run(Options o, Context& context) {
  if (o.threads == 0) o.threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::vector<BenchRow> rows;
  for (const Bench& bench : kBenches)
    if (o.what == bench.name) rows = bench.run(o);
  if (context.json) {
    Json document = {{"rows", Json::array()}};
    for (const BenchRow& row : rows) document["rows"].push_back(to_json(row));
    return print_json(document);
  }
  Table table({"case", "device", "median", "unit", "limit", "ratio", "runs", "spread"});
  for (const BenchRow& row : rows)
    table.add({row.name, row.device, fmt::format("{:.3f}", row.median), row.unit,
               fmt::format("{:.3f}", row.limit), fmt::format("{:.2f}", row.ratio_to_limit),
               std::to_string(row.runs), fmt::format("{:.0f}%", 100 * row.spread)});
  fmt::print("{}", table.text());
}

}  // namespace

void add_bench(CLI::App& app, Context& context) {
  auto options = std::make_shared<Options>();
  CLI::App* command = add_command(
      app, context, "bench", "measure the engine on this machine, beside its physical limit",
      "  kvlapse bench attention --slots 4096 --kv-dtype bf16\n"
      "  kvlapse bench decode --context 4096 --policy longflow --budget 1024 --json\n"
      "  kvlapse bench throughput --batches 1,8,32 --context 2048 --policy longflow --budget 512\n"
      "  kvlapse bench replay --trace full.kvl --configs 8,32\n"
      "  kvlapse bench replay --device cuda --configs 32\n"
      "  kvlapse bench record --tier qkv --context 512 --steps 512\n"
      "  kvlapse bench record --tier qkv --batch 20 --policy longflow --budget 256 --context 256 --json\n");
  std::vector<std::string> names;
  for (const Bench& bench : kBenches) names.push_back(bench.name);
  command->add_option("WHAT", options->what, "what to measure")->required()->check(CLI::IsMember(names));
  command->add_option("--model", options->model,
                      "decode, throughput, record: model folder, file or name (default: the built-in model)");
  command->add_option("--policy", options->policy, "whose importance and eviction are measured")
      ->capture_default_str();
  command
      ->add_option(
          "--budget", options->budget,
          "decode, record: slots per kv head; 0 keeps all; throughput: 0 is a quarter of the context")
      ->capture_default_str();
  command
      ->add_option("--kv-dtype", options->kv_dtype,
                   "fp32, fp16 or bf16; attention on a GPU: or fp8, with bf16 beside it")
      ->capture_default_str();
  command->add_option("--tier", options->tier, "record: events, sketch or qkv")->capture_default_str();
  add_products_option(*command, options->products);
  command->add_option("--threads", options->threads, "0: one per core")->capture_default_str();
  command->add_option("--batch", options->batch, "sequences")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      ->add_option("--batches", options->batches,
                   "throughput: sequences, a row for each with and without policy")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command->add_option("--configs", options->configs, "replay: policies x budgets at once, a row for each")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option(
      "--trace", options->trace,
      "replay: a recording with q, k, v, its first sequence (default: synthetic rows of one layer)");
  command->add_option("--slots", options->slots, "attention: slots held")
      ->check(CLI::Range(2, 1 << 20))
      ->capture_default_str();
  command->add_option("--q-heads", options->q_heads, "attention, replay")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--kv-heads", options->kv_heads, "attention, replay")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--head-dim", options->head_dim, "attention, replay")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  command
      ->add_option("--cache-mib", options->cache_mib,
                   "attention: K/V of all layers; beyond the last-level cache")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--runs", options->runs, "attention, replay: measured runs (replay: 3)")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command
      ->add_option("--context", options->context,
                   "decode, throughput, record: tokens held at the start; replay: tokens")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command->add_option("--steps", options->steps, "decode, throughput, record: measured steps")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command
      ->add_option(
          "--device", options->device,
          "cpu or cuda[:i]; decode on a GPU: weights and K/V are bf16, random when the model folder holds "
          "none, "
          "and a budget is the context; attention on a GPU: the standard table unless --slots is given")
      ->capture_default_str();
  command->add_option("--seed", options->seed, "decode on a GPU: of random weights")->capture_default_str();
  command->callback([options, command, &context] {
    const auto given = [&](const char* name) { return command->count(name) > 0; };
    options->given_shape = options->what == "replay"
                               ? given("--q-heads") || given("--kv-heads") || given("--head-dim")
                               : given("--slots");
    options->given_context = command->count("--context") > 0;
    options->given_runs = command->count("--runs") > 0;
    if (options->device != "cpu") {  // the shape of an 8B model, where none is given
      if (command->count("--q-heads") == 0) options->q_heads = 32;
      if (command->count("--kv-heads") == 0) options->kv_heads = 8;
      if (command->count("--head-dim") == 0) options->head_dim = 128;
    }
    run(*options, context);
  });
}

}  // namespace kvlapse::cli
