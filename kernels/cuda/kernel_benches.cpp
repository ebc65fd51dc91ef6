// `bench attention` and `bench rkv` on a GPU, as the command line shows them.
#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "kernels/cuda/attention_bench.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/rkv_bench.h"

namespace kvlapse {
namespace {

BenchRow row_of(const char* bench, std::string name, const std::string& device, double median_us,
                double floor_us, double min_us, double max_us, int runs) {
  BenchRow row;
  row.bench = bench;
  row.name = std::move(name);
  row.device = device;
  row.median = median_us;
  row.unit = "us";
  row.limit = floor_us;
  row.ratio_to_limit = floor_us / median_us;
  row.runs = runs;
  row.spread = (max_us - min_us) / median_us;
  return row;
}

}  // namespace

std::vector<BenchRow> bench_cuda_attention(const CudaAttentionBench& bench) {
  if (bench.dtype == DType::f32)
    fail("bench attention: --kv-dtype: expected fp16, bf16 or fp8 on a GPU, found fp32");
  use_gpu(bench.device);
  AttentionBenchOptions options;
  options.fp8 = bench.dtype == DType::f8e4m3;
  if (bench.batch > 0) {
    options.cases = {{bench.batch, bench.n_slots, bench.dtype}};
    if (options.fp8) options.cases.push_back({bench.batch, bench.n_slots, DType::bf16});
  }
  options.n_q_heads = bench.n_q_heads, options.n_kv_heads = bench.n_kv_heads,
  options.head_dim = bench.head_dim;
  options.overlapped_only = true;
  options.leave_one_out = bench.leave_one_out;
  std::vector<BenchRow> rows;
  bench_attention(options, [&](const AttentionBenchRow& r) {
    if (bench.batch == 0 && r.at.dtype != bench.dtype && !options.fp8) return;
    BenchRow row = row_of(
        "attention", fmt::format("{} B{} S{} {}", r.variant, r.at.batch, r.at.slots, dtype_name(r.at.dtype)),
        r.device, r.median_us, r.floor_us(), r.min_us, r.max_us, r.runs);
    row.texts = {{"variant", r.variant}, {"dtype", std::string(dtype_name(r.at.dtype))}};
    row.numbers = {{"batch", r.at.batch},
                   {"slots", r.at.slots},
                   {"q_heads", r.n_q_heads},
                   {"kv_heads", r.n_kv_heads},
                   {"head_dim", r.head_dim},
                   {"splits", r.n_splits},
                   {"kv_bytes", static_cast<double>(r.kv_bytes)},
                   {"counted_bytes", static_cast<double>(r.counted_bytes)},
                   {"median_us", r.median_us},
                   {"floor_us", r.floor_us()},
                   {"read_ceiling_gbps", r.read_ceiling_gbps},
                   {"share_of_ceiling", r.floor_us() / r.median_us},
                   {"with_importance", r.with_importance ? 1.0 : 0.0},
                   {"with_eviction", r.with_eviction ? 1.0 : 0.0}};
    rows.push_back(std::move(row));
  });
  return rows;
}

std::vector<BenchRow> bench_cuda_rkv(const CudaRkvBench& bench) {
  use_gpu(bench.device);
  std::vector<BenchRow> rows;
  std::vector<RkvBenchCase> cases;
  for (bool alike : {false, true})
    cases.push_back({bench.batch, bench.budget, bench.buffer, alike, bench.dtype, 0});
  bench_rkv(cases, 0, [&](const RkvBenchRow& r) {
    BenchRow row = row_of("rkv",
                          fmt::format("B{} budget {} + {} {}, keys {}", r.at.batch, r.at.budget, r.at.buffer,
                                      dtype_name(r.at.dtype), r.at.alike ? "alike" : "unlike"),
                          r.device, r.median_us, r.floor_us(), r.min_us, r.max_us, r.runs);
    row.texts = {{"dtype", std::string(dtype_name(r.at.dtype))}, {"keys", r.at.alike ? "alike" : "unlike"}};
    row.numbers = {{"batch", r.at.batch},
                   {"budget_slots", r.at.budget},
                   {"slots", r.at.budget + r.at.buffer},
                   {"q_heads", r.n_q_heads},
                   {"kv_heads", r.n_kv_heads},
                   {"head_dim", r.head_dim},
                   {"key_bytes", static_cast<double>(r.key_bytes)},
                   {"counted_bytes", static_cast<double>(r.counted_bytes)},
                   {"median_us", r.median_us},
                   {"floor_us", r.floor_us()},
                   {"read_ceiling_gbps", r.read_ceiling_gbps}};
    rows.push_back(std::move(row));
  });
  return rows;
}

}  // namespace kvlapse
