#include <fmt/format.h>

#include <cmath>
#include <fstream>

#include "cli/command.h"
#include "cli/data_path.h"
#include "cli/model_path.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "core/model/model_config.h"
#include "core/policy/evictor.h"
#include "core/policy/spec.h"
#include "replay/published.h"
#include "replay/throughput_model.h"
#include "trace/trace_reader.h"

namespace kvlapse::cli {
namespace {

struct Options {
  std::string model, gpu, policies = "full", budgets = "100%", reproduce, kv_dtype = "bf16", output_file;
  std::vector<std::string> benches, lengths;
  bool check = false, force = false;
  int batch = 0, input = 512, output = 4096;
  double memory_gib = 0;
};

Sourced sourced(const std::string& file, const nlohmann::json& document, const char* key) {
  if (!document.contains(key) || !document[key].is_object() || !document[key].contains("value") ||
      !document[key]["value"].is_number())
    fail("{}: {}: expected {{\"value\": number, \"error\": number, \"provenance\": text}}", file, key);
  const nlohmann::json& field = document[key];
  return {field["value"].get<double>(), field.value("error", 0.0),
          field.value("provenance", std::string("not stated"))};
}

nlohmann::json read_object(const std::string& file, const char* expected) {
  std::ifstream in(file);
  if (!in) fail("{}: cannot be read; expected {}", file, expected);
  nlohmann::json document = nlohmann::json::parse(in, nullptr, false);
  if (!document.is_object()) fail("{}: expected {}, found no JSON object", file, expected);
  return document;
}

constexpr const char* kProfileFormat = "a GPU profile (JSON with gpu, memory_gib, weight_read_gbps, ...)";

GpuProfile read_profile(const std::string& file) {
  const nlohmann::json document = read_object(file, kProfileFormat);
  GpuProfile gpu;
  gpu.name = document.value("gpu", file);
  gpu.memory_gib = sourced(file, document, "memory_gib");
  gpu.weight_read_gbps = sourced(file, document, "weight_read_gbps");
  gpu.kv_read_gbps = sourced(file, document, "kv_read_gbps");
  gpu.step_overhead_us = sourced(file, document, "step_overhead_us");
  gpu.per_sequence_us = sourced(file, document, "per_sequence_us");
  if (document.contains("launch_us")) gpu.launch_us = sourced(file, document, "launch_us");
  if (document.contains("launches")) {
    const nlohmann::json& launches = document["launches"];
    if (!launches.is_array()) fail("{}: launches: expected an array, found {}", file, launches.dump());
    for (const nlohmann::json& l : launches) {
      if (!l.is_object() || !l.contains("batch") || !l["batch"].is_number_integer() ||
          !l.contains("per_layer") || !l["per_layer"].is_number())
        fail("{}: launches: expected objects of batch and per_layer, found {}", file, l.dump());
      const int batch = l["batch"].get<int>();
      if (!gpu.launches.empty() && batch < gpu.launches.back().batch)
        fail("{}: launches: expected ascending batches, found {} behind {}", file, batch,
             gpu.launches.back().batch);
      gpu.launches.push_back({batch, l["per_layer"].get<double>()});
    }
  }
  if (gpu.launch_us.value > 0 && gpu.launches.empty())
    fail("{}: launch_us: expected launches by batch beside it, found none", file);
  for (const Sourced* s : {&gpu.memory_gib, &gpu.weight_read_gbps, &gpu.kv_read_gbps})
    if (!(s->value > 0)) fail("{}: memory and bandwidths must be above 0, found {}", file, s->value);
  return gpu;
}

Json profile_json(const GpuProfile& gpu) {
  auto field = [](const Sourced& s) {
    return Json{{"value", s.value}, {"error", s.error}, {"provenance", s.provenance}};
  };
  Json launches = Json::array();
  for (const GpuProfile::Launches& l : gpu.launches)
    launches.push_back({{"batch", l.batch}, {"per_layer", l.per_layer}});
  return {{"gpu", gpu.name},
          {"memory_gib", field(gpu.memory_gib)},
          {"weight_read_gbps", field(gpu.weight_read_gbps)},
          {"kv_read_gbps", field(gpu.kv_read_gbps)},
          {"step_overhead_us", field(gpu.step_overhead_us)},
          {"launch_us", field(gpu.launch_us)},
          {"launches", launches},
          {"per_sequence_us", field(gpu.per_sequence_us)}};
}

// Rows of `kvlapse bench decode --json`, or the `measured` ones of a profile.
std::vector<MeasuredStep> read_steps(const std::string& file, const nlohmann::json& rows) {
  std::vector<MeasuredStep> steps;
  if (!rows.is_array()) fail("{}: expected an array of measured decode steps, found none", file);
  for (const nlohmann::json& row : rows) {
    if (!row.is_object()) fail("{}: step {}: expected an object, found {}", file, steps.size(), row.dump());
    for (const char* key : {"bench", "case", "device", "unit"})
      if (row.contains(key) && !row[key].is_string())
        fail("{}: step {}: {}: expected text, found {}", file, steps.size(), key, row[key].dump());
    if (row.value("bench", "decode") != "decode") continue;
    for (const char* key : {"median", "batch", "context", "weight_bytes", "kv_bytes"})
      if (!row.contains(key) || !row[key].is_number())
        fail("{}: step {}: expected the number '{}', found none", file, steps.size(), key);
    if (row.value("unit", "ms") != "ms")
      fail("{}: step {}: expected milliseconds, found '{}'", file, steps.size(), row.value("unit", ""));
    steps.push_back({row.value("case", "step"), row["batch"].get<int>(), row["context"].get<int>(),
                     row["median"].get<double>(), row["weight_bytes"].get<int64_t>(),
                     row["kv_bytes"].get<int64_t>(), 0, 0});
    if (row.contains("n_launches") && row.contains("n_layers")) {
      if (!row["n_launches"].is_number() || !row["n_layers"].is_number())
        fail("{}: step {}: n_launches, n_layers: expected numbers", file, steps.size() - 1);
      steps.back().launches = row["n_launches"].get<int>();
      steps.back().n_layers = row["n_layers"].get<int>();
    }
  }
  return steps;
}

std::string in_percent(double ratio) {
  return fmt::format("{:+.1f} %", 100 * ratio);
}

// Every measured step of a profile under what the others say.
void run_check(const Options& o, Context& context) {
  constexpr double kMost = 0.1;
  if (o.gpu.empty()) fail_usage("predict --check: expected --gpu, a profile with measured steps");
  const std::string file = find_gpu_profile(o.gpu).string();
  const GpuProfile gpu = read_profile(file);
  const nlohmann::json document = read_object(file, kProfileFormat);
  if (!document.contains("measured"))
    fail(
        "{}: expected measured steps to check against, found a profile without any (predict --fit makes one "
        "from `kvlapse bench decode --json`)",
        file);
  const std::vector<CheckedStep> checked = leave_one_out(gpu, read_steps(file, document["measured"]));
  Json rows = Json::array();
  Table table({"decode step", "batch", "context", "measured ms", "predicted ms", "difference"});
  double most = 0;
  for (const CheckedStep& step : checked) {
    const MeasuredStep& m = step.measured;
    most = std::max(most, std::abs(step.difference_ratio));
    rows.push_back({{"case", m.name},
                    {"batch", m.batch},
                    {"context", m.context},
                    {"measured_ms", m.step_ms},
                    {"step_ms", step.predicted_ms},
                    {"difference_ratio", step.difference_ratio},
                    {"provenance", "modelled"}});
    table.add({m.name, fmt::format("{}", m.batch), fmt::format("{}", m.context),
               fmt::format("{:.2f}", m.step_ms), fmt::format("{:.2f}", step.predicted_ms),
               in_percent(step.difference_ratio)});
  }
  if (most > kMost) context.exit_code = 1;
  if (context.json)
    return print_json({{"gpu", profile_json(gpu)},
                       {"method", "leave one out: each step under a profile fitted to all the others"},
                       {"rows", rows},
                       {"largest_difference", most},
                       {"limit", kMost}});
  fmt::print(
      "{}: each step under a profile fitted to all the others\n{}largest difference {:.1f} %, limit {:.0f} "
      "%\n",
      gpu.name, table.text(), 100 * most, 100 * kMost);
}

// A profile from what `bench decode --json` measured on its GPU.
void run_fit(const Options& o, Context& context) {
  if (o.output_file.empty() || !(o.memory_gib > 0))
    fail_usage("predict --fit: expected -o PROFILE.json and --memory-gib");
  std::error_code error;
  if (!o.force && std::filesystem::exists(o.output_file, error))
    fail("{}: exists; --force replaces it", o.output_file);
  std::vector<MeasuredStep> steps;
  Json measured = Json::array();
  std::string device;
  for (const std::string& file : o.benches) {
    const nlohmann::json document = read_object(file, "what `kvlapse bench decode --json` prints");
    const nlohmann::json rows = document.value("rows", nlohmann::json());
    const std::vector<MeasuredStep> found = read_steps(file, rows);
    if (found.empty()) fail("{}: expected rows of `kvlapse bench decode`, found none", file);
    for (const MeasuredStep& step : found) {
      steps.push_back(step);
      measured.push_back({{"case", step.name},
                          {"batch", step.batch},
                          {"context", step.context},
                          {"median", step.step_ms},
                          {"unit", "ms"},
                          {"weight_bytes", step.weight_bytes},
                          {"kv_bytes", step.kv_bytes}});
      if (step.launches > 0)
        measured.back().update({{"n_launches", step.launches}, {"n_layers", step.n_layers}});
    }
    for (const nlohmann::json& row : rows) {
      const std::string name = row.value("device", "");
      if (device.empty()) device = name;
      if (name != device) fail("{}: expected steps of one device, {}, found {}", file, device, name);
    }
  }
  GpuProfile gpu;
  gpu.name = device;
  gpu.memory_gib = {o.memory_gib, 0, "--memory-gib"};
  gpu = fit_profile(gpu, steps, "`kvlapse bench decode` on " + device);
  Json document = profile_json(gpu);
  document["measured"] = measured;
  std::ofstream out(o.output_file);
  out << document.dump(2) << '\n';
  if (!out.flush()) fail("{}: cannot be written", o.output_file);
  if (context.json) return print_json(document);
  const std::string launch = gpu.launch_us.value > 0 ? fmt::format("a launch {:.1f} +- {:.1f} us",
                                                                   gpu.launch_us.value, gpu.launch_us.error)
                                                     : "launches " + gpu.launch_us.provenance;
  fmt::print(
      "{}: {}; step overhead {:.0f} +- {:.0f} us, {}, weights {:.0f} +- {:.0f} GB/s, K/V {:.0f} +- {:.0f} "
      "GB/s\n",
      o.output_file, gpu.name, gpu.step_overhead_us.value, gpu.step_overhead_us.error, launch,
      gpu.weight_read_gbps.value, gpu.weight_read_gbps.error, gpu.kv_read_gbps.value, gpu.kv_read_gbps.error);
}

// Bytes that a decode step reads of the weights: all but the embedding table, whose row it looks up; a tied
// table is read in full by the head.
DecoderShape shape_of(const ModelSpec& spec, DType kv_dtype) {
  const LayerSpec& l = spec.layer;
  int64_t width = spec.width, q = int64_t{l.n_q_heads} * l.head_dim, kv = int64_t{l.n_kv_heads} * l.head_dim;
  int64_t layer = width * (q + 2 * kv) + q * width + 3 * width * spec.ffn_width + 2 * width;
  if (spec.qkv_bias) layer += q + 2 * kv;
  if (spec.qk_norm) layer += 2 * int64_t{l.head_dim};
  int64_t table = int64_t{spec.n_vocab} * width, blocks = layer * spec.n_layers + width;
  constexpr int64_t kBytes = 2;  // 16-bit weights
  return {spec.cache_geometry(0, kv_dtype), kBytes * (blocks + table),
          kBytes * (blocks + table * (spec.tied_embeddings ? 1 : 2))};
}

Json row_of(const Policy& policy, int budget, const Prediction& p) {
  return {{"policy", canonical_spec(policy)},
          {"budget_slots", budget},
          {"batch", p.batch},
          {"tokens_per_s", p.tokens_per_s},
          {"tokens_per_s_error", p.tokens_per_s_error},
          {"step_ms", p.step_ms},
          {"slots_mean", p.slots_mean},
          {"slots_peak", p.slots_peak},
          {"weight_bytes", p.weight_bytes},
          {"kv_bytes", p.kv_bytes},
          {"eviction_bytes", p.eviction_bytes},
          {"memory_bytes", p.memory_bytes},
          {"provenance", "modelled"}};
}

// What a batch is drawn from: one length, or the sequences of recordings.
std::vector<RequestLength> mix_of(const Options& o) {
  if (o.lengths.empty()) return {{o.input, o.output, 0}};
  std::vector<RequestLength> mix;
  for (const std::string& file : o.lengths) {
    const TraceReader trace(file);
    for (int s = 0; s < trace.n_sequences(); ++s)
      if (const int n_prompt = trace.sequence(s).n_prompt, n = trace.n_steps(s); n > n_prompt && n_prompt > 0)
        mix.push_back({n_prompt, n - n_prompt, 0});
  }
  if (mix.empty()) fail("--lengths: expected recordings with generated tokens, found none");
  return mix;
}

void run_predict(const Options& o, Context& context) {
  if (o.gpu.empty())
    fail_usage("predict: --gpu: expected a profile: h200, h100-80gb, or a file from `kvlapse bench`");
  GpuProfile gpu = read_profile(find_gpu_profile(o.gpu));
  if (o.memory_gib > 0) gpu.memory_gib = {o.memory_gib, 0, "--memory-gib"};
  std::filesystem::path path = find_model(o.model);
  if (std::filesystem::is_regular_file(path)) path = path.parent_path();
  DecoderShape shape = shape_of(read_model_config(path), parse_dtype(o.kv_dtype));
  std::vector<RequestLength> mix = mix_of(o);
  double input = 0, output = 0;
  for (const RequestLength& r : mix) {
    input += static_cast<double>(r.n_prompt) / static_cast<double>(mix.size());
    output += static_cast<double>(r.n_output) / static_cast<double>(mix.size());
  }
  Json rows = Json::array();
  Table table({"policy", "budget", "batch", "tok/s", "+-", "step ms", "mean slots", "KV read", "eviction",
               "memory GiB"});
  for (const PolicySpec& spec : parse_policy_list(o.policies)) {
    std::unique_ptr<Policy> policy = make_policy(spec);
    for (const Budget& b : parse_budget_list(o.budgets)) {
      int budget = 0;  // of the longest
      for (RequestLength& r : mix) {
        r.budget = policy->info().evicts ? b.slots(r.n_prompt + r.n_output) : 0;
        check_budget(*policy, r.budget, r.n_prompt);
        budget = std::max(budget, r.budget);
      }
      const int batch = o.batch > 0 ? o.batch : largest_batch(gpu, shape, *policy, mix);
      if (batch < 1) {
        rows.push_back({{"policy", canonical_spec(*policy)},
                        {"budget_slots", budget},
                        {"batch", 0},
                        {"provenance", "modelled"}});
        table.add({canonical_spec(*policy), fmt::format("{}", budget), "0", "does not fit"});
        continue;
      }
      const Prediction p = predict(gpu, shape, *policy, batch, mix);
      rows.push_back(row_of(*policy, budget, p));
      table.add({canonical_spec(*policy), fmt::format("{}", budget), fmt::format("{}", p.batch),
                 fmt::format("{:.0f}", p.tokens_per_s),
                 p.tokens_per_s_error > 0 ? fmt::format("{:.0f}", p.tokens_per_s_error) : "?",
                 fmt::format("{:.2f}", p.step_ms), fmt::format("{:.0f}", p.slots_mean),
                 fmt::format("{:.2f} GB", static_cast<double>(p.kv_bytes) / 1e9),
                 fmt::format("{:.3f} GB", static_cast<double>(p.eviction_bytes) / 1e9),
                 fmt::format("{:.1f}", static_cast<double>(p.memory_bytes) / (1 << 30))});
      if (!policy->info().evicts) break;  // budgets mean nothing to it
    }
  }
  if (context.json)
    print_json({{"gpu", profile_json(gpu)},
                {"input", std::llround(input)},
                {"output", std::llround(output)},
                {"requests", mix.size()},
                {"rows", rows}});
  else
    fmt::print("{}: {:.0f} tokens in, {:.0f} out{}; modelled from bytes, not measured\n{}", gpu.name, input,
               output, mix.size() > 1 ? fmt::format(" (mean of {} requests)", mix.size()) : "", table.text());
}

void run_reproduce_rkv(Context& context) {
  PublishedTable table = published_rkv();
  GpuProfile gpu = fit_profile(table);
  Json rows = Json::array();
  Table text({"tokens", "policy", "budget", "batch", "published tok/s", "predicted", "difference", "row"});
  for (const ReproducedRow& r : reproduce(table, gpu)) {
    rows.push_back({{"output", r.published.n_output},
                    {"policy", r.published.policy},
                    {"budget_slots", r.published.budget},
                    {"batch", r.published.batch},
                    {"published_tokens_per_s", r.published.tokens_per_s},
                    {"tokens_per_s", r.prediction.tokens_per_s},
                    {"difference_ratio", r.difference_ratio},
                    {"calibrates", r.published.calibrates},
                    {"provenance", "modelled"}});
    text.add({fmt::format("{}", r.published.n_output), std::string(r.published.policy),
              fmt::format("{}", r.published.budget), fmt::format("{}", r.published.batch),
              fmt::format("{:.1f}", r.published.tokens_per_s),
              fmt::format("{:.1f}", r.prediction.tokens_per_s),
              fmt::format("{:+.1f} %", 100 * r.difference_ratio),
              r.published.calibrates ? "fitted" : "predicted"});
  }
  const char* remark =
      "The 16K row of the full cache at batch 30 is slower than its bytes say: a cache that grows by "
      "concatenation is\n"
      "copied at every step, at batch 30 up to 64 GB of it, which the fitted rows (short or bounded caches) "
      "do not show.\n";
  if (context.json) {
    print_json({{"source", table.source},
                {"model", table.model},
                {"gpu", profile_json(gpu)},
                {"rows", rows},
                {"remark", remark}});
    return;
  }
  fmt::print("{}, {}\n{}\n", table.source, table.model, text.text());
  fmt::print(
      "fitted: step overhead {:.0f} +- {:.0f} us, per sequence {:.1f} +- {:.1f} us, K/V read at {:.0f} +- "
      "{:.0f} GB/s\n{}",
      gpu.step_overhead_us.value, gpu.step_overhead_us.error, gpu.per_sequence_us.value,
      gpu.per_sequence_us.error, gpu.kv_read_gbps.value, gpu.kv_read_gbps.error, remark);
}

void run_reproduce_longflow(Context& context) {
  LongFlowClaim claim = reproduce_longflow(fit_profile(published_rkv()));
  Json rows = Json::array();
  Table text({"LongFlow against", "its batch", "LongFlow's batch", "published", "predicted", "difference"});
  for (const RatioClaim& r : claim.ratios) {
    double difference = r.predicted / r.published - 1;
    rows.push_back({{"policy", r.against},
                    {"budget_slots", 3200},
                    {"batch", r.batch},
                    {"longflow_batch", claim.batch},
                    {"published_ratio", r.published},
                    {"predicted_ratio", r.predicted},
                    {"difference_ratio", difference},
                    {"provenance", "modelled"}});
    text.add({std::string(r.against), fmt::format("{}", r.batch), fmt::format("{}", claim.batch),
              fmt::format("{:.2f}x", r.published), fmt::format("{:.2f}x", r.predicted),
              fmt::format("{:+.0f} %", 100 * difference)});
  }
  const char* remark =
      "Under one attention speed for all methods the budget alone explains the predicted ratio. What is "
      "beyond it in the\n"
      "published one is the speed of the kernels (a fused one against eager attention), not the policy.\n";
  if (context.json)
    print_json(
        {{"source", "arXiv 2603.11504, figures 3 and 4: Qwen3-1.7B, A100 40GB, 512 in, 16K out, budget 3200"},
         {"rows", rows},
         {"remark", remark}});
  else
    fmt::print(
        "arXiv 2603.11504, figures 3 and 4: Qwen3-1.7B, A100 40GB, 512 tokens in, 16K out, budget 3200\n{}{}",
        text.text(), remark);
}

}  // namespace

void add_predict(CLI::App& app, Context& context) {
  CLI::App* command = add_command(app, context, "predict",
                                  "modelled: largest batch, tokens a second and bytes of a step on a GPU",
                                  "  kvlapse predict --model Qwen3-8B/ --gpu h200 --policy "
                                  "full,longflow,rkv --budget 2048 --output 16384\n"
                                  "  kvlapse predict --gpu h100-80gb --check\n"
                                  "  kvlapse predict --reproduce rkv");
  auto o = std::make_shared<Options>();
  command->add_option("--model", o->model,
                      "model folder (config.json is enough), or name; default: the built-in one");
  command->add_option("--gpu", o->gpu, "profile of the GPU: a name that comes with kvlapse (h200) or a file");
  command->add_option("--policy", o->policies, "policies, comma-separated")->capture_default_str();
  command->add_option("--budget", o->budgets, "budgets, comma-separated")->capture_default_str();
  command->add_option("--batch", o->batch, "sequences decoded together (default: as many as fit)");
  command->add_option("--memory-gib", o->memory_gib, "memory instead of the profile's");
  command->add_option("--input", o->input, "prompt tokens")->capture_default_str();
  command->add_option("--output", o->output, "generated tokens")->capture_default_str();
  command->add_option("--lengths", o->lengths, "lengths of the sequences of these recordings instead")
      ->type_name("TRACE.kvl");
  command->add_option("--kv-dtype", o->kv_dtype, "fp32, fp16, bf16 or fp8")->capture_default_str();
  command
      ->add_option("--reproduce", o->reproduce, "hold the model against a paper's figures: rkv or longflow")
      ->check(CLI::IsMember({"rkv", "longflow"}));
  command->add_flag(
      "--check", o->check,
      "hold a measured profile's steps against the model: each fitted to the others, within 10 %");
  command->add_option("--fit", o->benches, "make a profile of what `bench decode --json` printed on that GPU")
      ->type_name("BENCH.json");
  command->add_option("-o", o->output_file, "with --fit: the profile (*.json)");
  command->add_flag("--force", o->force, "replace an existing profile");
  command->callback([o, &context] {
    if (!o->benches.empty())
      run_fit(*o, context);
    else if (o->check)
      run_check(*o, context);
    else if (o->reproduce == "rkv")
      run_reproduce_rkv(context);
    else if (o->reproduce == "longflow")
      run_reproduce_longflow(context);
    else
      run_predict(*o, context);
  });
}

}  // namespace kvlapse::cli
