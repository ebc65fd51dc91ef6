// Times a step of the fast decoder.
#include <algorithm>

#include "core/base/error.h"
#include "core/model/model_config.h"
#include "kernels/choice/gpu.h"
#include "kernels/cuda/attention_bench.h"
#include "kernels/cuda/cuda_device.h"
#include "kernels/cuda/graph_decoder.h"

namespace kvlapse {
namespace {

constexpr int kWarmUp = 8;

DecoderShape shape_of(const ModelSpec& spec) {
  DecoderShape shape;
  shape.n_layers = spec.n_layers;
  shape.n_vocab = spec.n_vocab;
  shape.width = spec.width;
  shape.ffn_width = spec.ffn_width;
  shape.n_q_heads = spec.layer.n_q_heads;
  shape.n_kv_heads = spec.layer.n_kv_heads;
  shape.head_dim = spec.layer.head_dim;
  shape.norm_eps = spec.norm_eps;
  shape.qk_norm = spec.qk_norm;
  shape.qkv_bias = spec.qkv_bias;
  shape.tied = spec.tied_embeddings;
  shape.rope = rope_table(spec.rope, spec.layer.head_dim);
  return shape;
}

std::string kernel_text(const std::vector<LaunchRecord>& launches) {
  std::vector<std::pair<std::string, int>> counts;
  for (const LaunchRecord& l : launches) {
    auto at = std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == l.name; });
    if (at == counts.end()) at = counts.insert(counts.end(), {l.name, 0});
    ++at->second;
  }
  std::string text;
  for (const auto& [name, n] : counts) text += fmt::format("{}{} {}", text.empty() ? "" : ", ", n, name);
  return text;
}

}  // namespace

std::vector<BenchRow> bench_cuda_decode(const CudaDecodeBench& bench, const ModelSpec& spec,
                                        const TransformerWeights* weights, const Policy& policy) {
  use_gpu(bench.device);
  const PolicyInfo& info = policy.info();
  const FusedScore score = fused_score(info);
  if (info.evicts && score == FusedScore::none)
    fail(
        "bench decode: policy {}: the fused step computes no such score; expected full, longflow, tova or "
        "caote",
        info.name);
  const int n = bench.steps + kWarmUp;
  GraphDecoderOptions options;
  options.batch = bench.batch;
  options.n_slots = info.evicts ? bench.context : bench.context + n;
  options.n_positions = bench.context + n;
  options.score = score;
  options.shared = info.evicts && info.rule.granularity == Granularity::layer;
  options.recent = std::max(1, info.rule.recent_slots(bench.context));

  const double ceiling = measure_read_ceiling_gbps();
  GraphDecoder decoder =
      weights ? GraphDecoder(*weights, options) : GraphDecoder(shape_of(spec), options, bench.seed);
  decoder.fill_cache(bench.context, bench.seed);
  decoder.run(kWarmUp);
  const uint64_t kv_first = decoder.kv_bytes();
  std::vector<double> ms = decoder.time_steps(bench.steps);
  decoder.tokens();
  const uint64_t kv_bytes = (kv_first + decoder.kv_bytes()) / 2;
  const double bytes = static_cast<double>(decoder.weight_bytes() + kv_bytes);
  const double floor_ms = bytes / ceiling * 1e-6;
  const Spread spread = spread_of(ms);
  BenchRow row{"decode",
               fmt::format("{}{}, context {}, batch {}, bf16, {}", spec.name,
                           weights ? "" : " (random weights)", bench.context, bench.batch, info.name),
               current_gpu_name(),
               spread.median,
               "ms",
               floor_ms,
               floor_ms / spread.median,
               bench.steps,
               spread.relative,
               {},
               {}};
  const std::vector<LaunchRecord> launches = decoder.launches();
  row.numbers = {{"context", bench.context},
                 {"batch", bench.batch},
                 {"tokens_per_s", 1e3 * bench.batch / spread.median},
                 {"times_floor", spread.median / floor_ms},
                 {"weight_bytes", static_cast<double>(decoder.weight_bytes())},
                 {"kv_bytes", static_cast<double>(kv_bytes)},
                 {"read_ceiling_gbps", ceiling},
                 {"attention_splits", decoder.n_splits()},
                 {"n_launches", static_cast<double>(launches.size())},
                 {"n_layers", spec.n_layers}};
  row.texts = {{"products", decoder.products()}, {"launches", kernel_text(launches)}};
  return {row};
}

}  // namespace kvlapse
