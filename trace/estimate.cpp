#include "trace/trace_writer.h"

namespace kvlapse {
namespace {

// Compressed over raw size at zstd's level 1, measured on recordings of the built-in model.
constexpr double kSketchRatio = 0.58, kEvictionRatio = 0.35, kOccupancyRatio = 0.1, kTokenRatio = 0.3;
double row_ratio(DType dtype) {
  return dtype == DType::bf16 ? 0.75 : dtype == DType::f16 ? 0.88 : 0.9;
}

constexpr double kStepBytes = 70;       // of a KV_STEP row
constexpr double kChunkBytes = 220;     // of a KV_CHUNK row and its index entry, beside the blob
constexpr double kPageOverhead = 1.08;  // what pages leave empty
constexpr double kFixedBytes = 120e3;

}  // namespace

int64_t estimate_trace_bytes(const TraceHeader& header, int64_t tokens, int64_t n_prompt) {
  const CacheGeometry& g = header.geometry;
  const double n = static_cast<double>(tokens), layers = g.n_layers,
               recorded = header.layer_end - header.layer_begin;
  double chunks_per_layer = 1;  // occupancy
  double bytes = n * (kStepBytes + sizeof(int32_t) * kTokenRatio);
  bytes += n * layers * g.n_kv_heads * sizeof(int32_t) * kOccupancyRatio;
  if (header.policy.evicts && tokens > header.budget_slots) {
    const int rows = header.policy.rule.granularity == Granularity::layer ? 1 : g.n_kv_heads;
    bytes += (n - header.budget_slots) * layers * rows * sizeof(TraceEviction) * kEvictionRatio;
    chunks_per_layer += 1;
  }
  double chunks = n / kChunkSteps * layers * chunks_per_layer;
  if (header.tier == TraceTier::sketch) {
    // Prompt tokens have no sketch.
    bytes += (n - static_cast<double>(n_prompt)) * recorded * g.n_kv_heads * sizeof(SketchRow) * kSketchRatio;
    chunks += n / kChunkSteps * recorded;
  }
  if (header.tier == TraceTier::qkv) {
    bytes += n * recorded * (g.n_q_heads + 2 * g.n_kv_heads) * static_cast<double>(g.row_bytes()) *
             row_ratio(g.dtype);
    chunks += n / kChunkSteps * recorded * 3;
  }
  return static_cast<int64_t>(kFixedBytes +
                              header.n_sequences * kPageOverhead * (bytes + chunks * kChunkBytes));
}

}  // namespace kvlapse
