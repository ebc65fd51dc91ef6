#include "tests/support/trace/synthetic_gpu.h"

#include <array>
#include <cmath>

namespace kvlapse::test {
namespace {

constexpr double kLaunchNs = 1500;  // what a kernel needs without any bytes
constexpr int64_t kSampleNs = 20'000;

struct MadeUpKernel {
  const char* mangled;
  const char* launch;
  const char* phase;
  uint32_t stream;
  bool foreign;
};
constexpr std::array<MadeUpKernel, kGpuKernelsOfLayer> kKernels = {
    {{"nvjet_synthetic_64x8", "projections", "matmul", 7, true},
     {"_ZN7kvlapse12_GLOBAL__N_112fused_decodeILi128EEEvi", "fused_decode", "attention", 7, false},
     {"_ZN7kvlapse12_GLOBAL__N_113lowest_scoresEi", "lowest_scores", "evict", 13, false},
     {"nvjet_synthetic_128x16", "feed_forward", "matmul", 7, true}}};

double kernel_ns(int64_t bytes) {
  return kLaunchNs + static_cast<double>(bytes) / kDramGbps;
}

int64_t kernel_bytes(const SyntheticProcess& process, int kernel, int64_t held) {
  const CacheGeometry& g = process.geometry;
  const int64_t width = int64_t{g.n_q_heads} * g.head_dim;
  switch (kernel) {
    case 0: return 2 * width * (width + 2 * int64_t{g.n_kv_heads} * g.head_dim);
    case 1: return synthetic_attention_bytes(process, held);
    case 2: return held * g.n_kv_heads * 4;
    default: return 2 * 3 * width * 3 * width;
  }
}

void add_step(TraceWriter& writer, const SyntheticProcess& process, const StepSummary& summary,
              int64_t held) {
  const int64_t ordinal = raw(summary.pos) - (process.n_prompt - 1);
  GpuBatch batch;
  if (ordinal == 0) {
    batch.devices = {{0, "synthetic GPU", "made up", int64_t{80} << 30, 50 << 20, 132, 9, 0, 1'980'000'000}};
    batch.sources = {{"activity", "measured", "", "", 1, 0, 0},
                     {"dram", "sampled", "", "", 1, 0, 0},
                     {"kernels", "measured", "", "", 1, 0, 0}};
  }
  batch.steps = {{ordinal, summary.start_ns, summary.start_ns + summary.total_ns}};
  std::vector<double> busy;  // bytes a ns over the samples of this step
  const auto n_samples = static_cast<size_t>(summary.total_ns / kSampleNs);
  busy.resize(n_samples);
  double at = static_cast<double>(summary.start_ns) + 5000;
  int ordinal_in_step = 0;
  for (int layer = 0; layer < process.geometry.n_layers; ++layer) {
    for (int kernel = 0; kernel < kGpuKernelsOfLayer; ++kernel) {
      const MadeUpKernel& kind = kKernels[static_cast<size_t>(kernel)];
      const int64_t bytes = kernel_bytes(process, kernel, held);
      const double ns = kernel_ns(bytes);
      const LaunchRecord launch{kind.launch, static_cast<uint64_t>(bytes), layer, kind.phase, kind.foreign};
      GpuKernel row;
      row.start_ns = static_cast<int64_t>(at), row.end_ns = static_cast<int64_t>(at + ns);
      row.stream = kind.stream, row.context = 1;
      row.mangled_name = intern_name(kind.mangled);
      row.grid[0] = 132, row.grid[1] = row.grid[2] = 1;
      row.block[0] = 128, row.block[1] = row.block[2] = 1;
      row.registers = 64;
      row.step = ordinal;
      row.launch = launch;
      batch.kernels.push_back(row);
      const auto sample = static_cast<size_t>((at - static_cast<double>(summary.start_ns)) / kSampleNs);
      if (sample < busy.size()) busy[sample] += kBytesRatio * static_cast<double>(bytes);
      if (ordinal == kCountedStep) {
        const double dram = kBytesRatio * static_cast<double>(bytes);
        batch.counters.push_back({ordinal, ordinal_in_step, ns, 0.99 * dram, 0.01 * dram, 1.5 * dram,
                                  100 * dram / ns / kPeakGbps, 35.0 + 5.0 * kernel, launch});
      }
      ++ordinal_in_step;
      // The victims are chosen beside the feed-forward's product.
      at += kernel == 2 ? 200 : ns + 300;
    }
  }
  for (size_t i = 0; i < n_samples; ++i) {
    const auto begin = summary.start_ns + static_cast<int64_t>(i) * kSampleNs;
    const auto bytes = static_cast<int64_t>(busy[i]);
    batch.dram.push_back({begin, begin + kSampleNs, bytes - bytes / 100, bytes / 100, bytes + bytes / 2});
  }
  writer.add_gpu(std::move(batch));
}

}  // namespace

int64_t synthetic_attention_bytes(const SyntheticProcess& process, int64_t held_tokens) {
  return held_tokens * process.geometry.n_kv_heads *
         static_cast<int64_t>(process.geometry.head_token_bytes());
}

double synthetic_attention_ns(const SyntheticProcess& process, int64_t held_tokens) {
  return kernel_ns(synthetic_attention_bytes(process, held_tokens));
}

SyntheticProcess with_gpu(SyntheticProcess process) {
  process.on_step = [](TraceWriter& writer, const SyntheticProcess& made_up, StepSummary& summary,
                       int64_t held) {
    if (summary.sequence != 0) return;  // the batch's step is recorded once
    const double n_layers = made_up.geometry.n_layers;
    summary.phase_ns[static_cast<int>(StepPhase::attention)] =
        static_cast<int64_t>(std::llround(n_layers * synthetic_attention_ns(made_up, held)));
    add_step(writer, made_up, summary, held);
  };
  return process;
}

}  // namespace kvlapse::test
