#include "cli/bench_replay.h"

#include <fmt/format.h>

#include <chrono>
#include <filesystem>

#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "kernels/cpu/cpu_backend.h"
#include "replay/bench_configs.h"
#include "replay/device_replay.h"
#include "replay/synthetic_rows.h"
#include "replay/trace_rows.h"

namespace kvlapse::cli {
namespace {

constexpr int kSyntheticPrompt = 128;
constexpr uint64_t kSeed = 7;

// Multiply-adds, two operations each, of q.k and of weight x value over all tokens seen.
double attention_operations(const RowSource& rows) {
  const CacheGeometry& g = rows.geometry();
  const RowSequence sequence = rows.sequence(0);
  double pairs = 0;
  for (int t = sequence.n_prompt; t < sequence.n_tokens; ++t) pairs += t + 1;
  return 4.0 * pairs * g.n_q_heads * g.head_dim * (rows.layer_end() - rows.layer_begin());
}

std::vector<BenchRow> over(const RowSource& rows, const std::string& what, const ReplayBench& bench) {
  const RowSequence sequence = rows.sequence(0);
  const CacheGeometry& g = rows.geometry();
  const double gflops = multiply_add_gflops(bench.n_threads);
  const double floor_s = attention_operations(rows) / gflops * 1e-9;
  const ReplayEngine engine(rows, {.threads = bench.n_threads, .memory_bytes = size_t{4} << 30});
  std::vector<BenchRow> out;
  for (const int n : bench.configs) {
    const std::vector<ReplayConfig> configs = bench_configs(n, sequence);
    std::vector<double> per_second;
    for (int run = 0; run < bench.runs; ++run) {
      const auto start = std::chrono::steady_clock::now();
      engine.run(0, configs);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      per_second.push_back(n / took.count());
    }
    const Spread spread = spread_of(per_second);
    const double limit = n / floor_s;
    BenchRow row{
        "replay",
        fmt::format("{}, {} tokens, {} configuration{}", what, sequence.n_tokens, n, n == 1 ? "" : "s"),
        make_cpu_backend(bench.n_threads, MatmulMode::exact)->describe(),
        spread.median,
        "configs/s",
        limit,
        spread.median / limit,
        bench.runs,
        spread.relative,
        {},
        {}};
    row.numbers = {{"configs", n},
                   {"tokens", sequence.n_tokens},
                   {"prompt_tokens", sequence.n_prompt},
                   {"layers", rows.layer_end() - rows.layer_begin()},
                   {"q_heads", g.n_q_heads},
                   {"kv_heads", g.n_kv_heads},
                   {"head_dim", g.head_dim},
                   {"seconds", n / spread.median},
                   {"full_attention_floor_s", floor_s},
                   {"multiply_add_gflops", gflops}};
    out.push_back(std::move(row));
  }
  return out;
}

// Bytes that the weights of all (step, query head) cannot but move: written as logits, read by decisions,
// read twice and written as probabilities in both precisions, read by masses and by outputs.
double weight_bytes(const RowSource& rows) {
  const CacheGeometry& g = rows.geometry();
  const auto n = static_cast<double>(rows.sequence(0).n_tokens);
  return n * (n + 1) / 2 * g.n_q_heads * (4 * 6 + 2 * 2) * (rows.layer_end() - rows.layer_begin());
}

std::vector<BenchRow> on_gpu(const RowSource& rows, const std::string& what, const ReplayBench& bench) {
  const RowSequence sequence = rows.sequence(0);
  const CacheGeometry& g = rows.geometry();
  const GpuRates rates = gpu_rates(bench.gpu);
  const auto n_tokens = static_cast<double>(sequence.n_tokens);
  const double operations = n_tokens * (n_tokens + 1) * g.n_q_heads * g.head_dim;
  const double floor_s =
      std::max(operations / rates.fp32_gflops, weight_bytes(rows) / rates.read_gbps) * 1e-9;
  const std::unique_ptr<ReplayDevice> device = make_cuda_replay(bench.gpu);
  const DeviceReplayer replayer(rows, {.threads = bench.n_threads, .memory_bytes = size_t{4} << 30}, *device);
  std::vector<BenchRow> out;
  for (const int n : bench.configs) {
    const std::vector<ReplayConfig> configs = gpu_bench_configs(n, sequence);
    std::vector<double> per_second;
    for (int run = -1; run < bench.runs; ++run) {  // the first one allocates
      const auto start = std::chrono::steady_clock::now();
      replayer.run(0, configs);
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
      if (run >= 0) per_second.push_back(n / took.count());
    }
    const Spread spread = spread_of(per_second);
    const double limit = n / floor_s;
    BenchRow row{
        "replay",
        fmt::format("{}, {} tokens, {} configuration{}", what, sequence.n_tokens, n, n == 1 ? "" : "s"),
        device->describe(),
        spread.median,
        "configs/s",
        limit,
        spread.median / limit,
        bench.runs,
        spread.relative,
        {},
        {}};
    row.numbers = {{"configs", n},
                   {"tokens", sequence.n_tokens},
                   {"prompt_tokens", sequence.n_prompt},
                   {"layers", rows.layer_end() - rows.layer_begin()},
                   {"q_heads", g.n_q_heads},
                   {"kv_heads", g.n_kv_heads},
                   {"head_dim", g.head_dim},
                   {"seconds", n / spread.median},
                   {"floor_s", floor_s},
                   {"weight_bytes", weight_bytes(rows)},
                   {"logit_operations", operations},
                   {"read_ceiling_gbps", rates.read_gbps},
                   {"fp32_gflops", rates.fp32_gflops}};
    const DeviceReplay once = replayer.run_layer(0, rows.layer_begin(), configs, true, true);
    for (const auto& [stage, seconds] : once.stages)
      row.numbers.emplace_back("stage_" + stage + "_s", seconds);
    const DeviceReplay plain = replayer.run_layer(0, rows.layer_begin(), configs, true);
    row.numbers.emplace_back("device_s", plain.seconds);
    out.push_back(std::move(row));
  }
  return out;
}

}  // namespace

std::vector<BenchRow> bench_replay(const ReplayBench& bench) {
  if (!bench.trace.empty()) {
    const TraceReader reader(bench.trace);
    return (bench.gpu >= 0 ? on_gpu : over)(TraceRows(reader, bench.n_tokens),
                                            std::filesystem::path(bench.trace).filename().string(), bench);
  }
  if (bench.n_tokens <= 2 * kSyntheticPrompt)
    fail_usage("bench replay: --context: expected more than {} tokens, found {}", 2 * kSyntheticPrompt,
               bench.n_tokens);
  if (bench.n_q_heads % bench.n_kv_heads != 0)
    fail_usage("bench replay: --q-heads: expected a multiple of {} kv heads, found {}", bench.n_kv_heads,
               bench.n_q_heads);
  const CacheGeometry geometry{1, bench.n_q_heads, bench.n_kv_heads, bench.head_dim, 0, DType::f32};
  return (bench.gpu >= 0 ? on_gpu : over)(synthetic_rows(geometry, bench.n_tokens, kSyntheticPrompt, kSeed),
                                          "synthetic", bench);
}

}  // namespace kvlapse::cli
