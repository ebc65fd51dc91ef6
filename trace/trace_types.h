// What a trace holds, as plain data shared by writer and reader. Units and provenance: trace/FORMAT.md.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "core/cache/geometry.h"
#include "core/engine/step_observer.h"

namespace kvlapse {

// events: occupancy, evictions, timings. sketch: also the largest attention weights. qkv: also q, k, v, not
// sketches.
enum class TraceTier : uint8_t { events, sketch, qkv };
std::string_view tier_name(TraceTier tier);
TraceTier parse_tier(std::string_view name);  // throws UsageError

inline constexpr int kSketchTop = 32;   // attention weights kept per kv head and step
inline constexpr int32_t kNoToken = -1;  // id of a token that an imported trace does not know
inline constexpr int kChunkSteps = 64;  // chunks end at multiples of this position

// The policy as it ran, for whoever reads the file without this program's catalogue.
struct TracePolicy {
  std::string spec;  // canonical
  std::string name, reference, summary, formula, paper, source;
  int version = 1;
  bool evicts = false;
  EvictionRule rule;
  std::vector<std::string> score_parts;                    // names of TraceEviction::parts
  std::vector<std::pair<std::string, double>> parameters;  // resolved
  std::vector<int> layer_budgets;                          // slots per kv head and layer; empty when !evicts
};
TracePolicy describe_policy(const Policy& policy, int budget_slots, int n_layers);

// Known before the first step. Free-form facts (hashes, device, driver, sampling, versions, counter
// permissions) go into `meta`; FORMAT.md lists the keys.
struct TraceHeader {
  CacheGeometry geometry;              // dtype is that of K and V in the cache and in the file
  int layer_begin = 0, layer_end = 0;  // layers whose q, k, v or sketches are recorded
  TraceTier tier = TraceTier::events;
  TracePolicy policy;
  std::string budget_text;  // as written: "512" or "25%"
  int budget_slots = 0;     // 0: the policy never evicts
  double rope_theta = 0;
  int n_sequences = 1;
  std::map<std::string, std::string> meta;

  bool has_rows(int layer) const {
    return tier == TraceTier::qkv && layer >= layer_begin && layer < layer_end;
  }
  bool has_sketch(int layer) const {
    return tier == TraceTier::sketch && layer >= layer_begin && layer < layer_end;
  }
};

// Per sequence; what is only known at the end is filled then.
struct TraceSequence {
  int sequence = 0;
  uint64_t seed = 0;
  std::vector<int32_t> tokens;  // prompt, then generation; the last one may have been chosen but never fed
  int n_prompt = 0;
  int n_steps = 0;       // tokens whose forward pass was recorded, prompt included: positions [0, n_steps)
  int budget_slots = 0;  // resolved for this sequence's length; 0: the policy never evicts
  int think_begin = -1, think_end = -1;  // positions of the tags, -1: none
  std::string task;                      // "" when the prompt is not of a known task
  std::string prompt, text;              // decoded
  std::string answer;
  std::optional<bool> answer_right;
  std::string end_reason;  // "" while the sequence runs
};

// One forward pass whose next token was chosen. Times are of the whole batch's step.
struct TraceStep {
  StepSummary summary;
  int64_t held_tokens = 0;     // after the step, summed over layers and kv heads
  int64_t evicted_tokens = 0;  // by the step, summed over layers and kv heads
  int64_t queue_wait_ns = 0;   // time that decode waited for the writer
};

// One victim. This is also the record of an 'evictions' chunk, byte for byte (little endian).
struct TraceEviction {
  int32_t step = 0;
  int32_t pos = 0;
  int32_t slot = 0;               // before the eviction
  int16_t kv_head = kWholeLayer;  // kWholeLayer: all kv heads of the layer
  EvictionReason reason = EvictionReason::over_budget;
  uint8_t reserved = 0;
  float score = 0;
  float threshold = 0;           // lowest score that was kept beside it; +inf when none was left
  std::array<float, 2> parts{};  // TracePolicy::score_parts
};
static_assert(sizeof(TraceEviction) == 32);

// One (step, kv head). Also the record of a 'sketch' chunk, byte for byte; there the weights are in no order.
struct SketchRow {
  float recall =
      0;  // attention mass of the held tokens; 1 when nothing was evicted before, otherwise NaN: unknown
  float entropy = 0;                      // nats, mean over the group of each query head's
  std::array<int32_t, kSketchTop> pos{};  // -1 pads
  std::array<float, kSketchTop>
      weight{};  // mean over the group, descending; the newest position first among equals
};
static_assert(sizeof(SketchRow) == 264);

enum class RowKind : uint8_t { q, k, v };
constexpr std::string_view row_kind_name(RowKind kind) {
  return kind == RowKind::q ? "q" : kind == RowKind::k ? "k" : "v";
}

}  // namespace kvlapse
