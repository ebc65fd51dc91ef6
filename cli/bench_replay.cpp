#include "cli/bench_replay.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <functional>

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

// One row: the rate of `replay`, run as often as asked after `warm_ups`, against the limit that a floor of
// one replay gives.
BenchRow timed_row(const RowSource& rows, const std::string& what, const ReplayBench& bench,
                   const std::string& device, int n_configs, double floor_s, int warm_ups,
                   const std::function<void()>& replay) {
  const RowSequence sequence = rows.sequence(0);
  const CacheGeometry& g = rows.geometry();
  std::vector<double> per_second;
  for (int run = -warm_ups; run < bench.runs; ++run) {
    const auto start = std::chrono::steady_clock::now();
    replay();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    if (run >= 0) per_second.push_back(n_configs / took.count());
  }
  const Spread spread = spread_of(per_second);
  const double limit = n_configs / floor_s;
  BenchRow row{"replay",
               fmt::format("{}, {} tokens, {} configuration{}", what, sequence.n_tokens, n_configs,
                           n_configs == 1 ? "" : "s"),
               device,
               spread.median,
               "configs/s",
               limit,
               spread.median / limit,
               bench.runs,
               spread.relative,
               {},
               {}};
  row.numbers = {{"configs", n_configs},
                 {"tokens", sequence.n_tokens},
                 {"prompt_tokens", sequence.n_prompt},
                 {"layers", rows.layer_end() - rows.layer_begin()},
                 {"q_heads", g.n_q_heads},
                 {"kv_heads", g.n_kv_heads},
                 {"head_dim", g.head_dim},
                 {"seconds", n_configs / spread.median}};
  return row;
}

std::vector<BenchRow> on_cpu(const RowSource& rows, const std::string& what, const ReplayBench& bench) {
  const double gflops = multiply_add_gflops(bench.n_threads);
  const double floor_s = attention_operations(rows) / gflops * 1e-9;
  const std::string device = make_cpu_backend(bench.n_threads, MatmulMode::exact)->describe();
  const ReplayEngine engine(rows, {.threads = bench.n_threads, .memory_bytes = size_t{4} << 30});
  std::vector<BenchRow> out;
  for (const int n : bench.configs) {
    const std::vector<ReplayConfig> configs = bench_configs(n, rows.sequence(0));
    out.push_back(timed_row(rows, what, bench, device, n, floor_s, 0, [&] { engine.run(0, configs); }));
    out.back().numbers.emplace_back("full_attention_floor_s", floor_s);
    out.back().numbers.emplace_back("multiply_add_gflops", gflops);
  }
  return out;
}

// Operations of the logits, and bytes that the weights of all (step, query head) cannot but move. In fp32:
// written as logits, read and written as exponentials, read by decisions and by masses. In half precision:
// written, turned (read and written) with the full cache's outputs, read by the configurations'.
struct GpuWork {
  double logit_operations, weight_bytes;
};
GpuWork gpu_work(const RowSource& rows) {
  const CacheGeometry& g = rows.geometry();
  const auto n = static_cast<double>(rows.sequence(0).n_tokens);
  const double pairs = n * (n + 1) / 2 * g.n_q_heads * (rows.layer_end() - rows.layer_begin());
  return {pairs * 2 * g.head_dim, pairs * (4 * 5 + 2 * 4)};
}

std::vector<BenchRow> on_gpu(const RowSource& rows, const std::string& what, const ReplayBench& bench) {
  const GpuRates rates = gpu_rates(bench.gpu);
  const GpuWork work = gpu_work(rows);
  const double floor_s =
      std::max(work.logit_operations / rates.fp32_gflops, work.weight_bytes / rates.read_gbps) * 1e-9;
  const std::unique_ptr<ReplayDevice> device = make_cuda_replay(bench.gpu);
  const DeviceReplayer replayer(rows, {.threads = bench.n_threads, .memory_bytes = size_t{4} << 30}, *device);
  std::vector<BenchRow> out;
  for (const int n : bench.configs) {
    const std::vector<ReplayConfig> configs = gpu_bench_configs(n, rows.sequence(0));
    out.push_back(timed_row(rows, what, bench, device->describe(), n, floor_s, /*warm_ups=*/1,
                            [&] { replayer.run(0, configs); }));
    auto& numbers = out.back().numbers;
    numbers.emplace_back("floor_s", floor_s);
    numbers.emplace_back("weight_bytes", work.weight_bytes);
    numbers.emplace_back("logit_operations", work.logit_operations);
    numbers.emplace_back("read_ceiling_gbps", rates.read_gbps);
    numbers.emplace_back("fp32_gflops", rates.fp32_gflops);
    const DeviceReplay once = replayer.run_layer(0, rows.layer_begin(), configs, true, true);
    for (const auto& [stage, seconds] : once.stages) numbers.emplace_back("stage_" + stage + "_s", seconds);
    const DeviceReplay plain = replayer.run_layer(0, rows.layer_begin(), configs, true);
    numbers.emplace_back("device_s", plain.seconds);
  }
  return out;
}

}  // namespace

std::vector<BenchRow> bench_replay(const ReplayBench& bench) {
  if (!bench.trace.empty()) {
    const TraceReader reader(bench.trace);
    return (bench.gpu >= 0 ? on_gpu : on_cpu)(TraceRows(reader, bench.n_tokens),
                                              std::filesystem::path(bench.trace).filename().string(), bench);
  }
  if (bench.n_tokens <= 2 * kSyntheticPrompt)
    fail_usage("bench replay: --context: expected more than {} tokens, found {}", 2 * kSyntheticPrompt,
               bench.n_tokens);
  if (bench.n_q_heads % bench.n_kv_heads != 0)
    fail_usage("bench replay: --q-heads: expected a multiple of {} kv heads, found {}", bench.n_kv_heads,
               bench.n_q_heads);
  const CacheGeometry geometry{1, bench.n_q_heads, bench.n_kv_heads, bench.head_dim, 0, DType::f32};
  return (bench.gpu >= 0 ? on_gpu : on_cpu)(synthetic_rows(geometry, bench.n_tokens, kSyntheticPrompt, kSeed),
                                            "synthetic", bench);
}

}  // namespace kvlapse::cli
