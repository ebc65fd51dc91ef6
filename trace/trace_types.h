// What a trace holds, as plain data shared by writer and reader. Units and provenance: trace/FORMAT.md.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "core/cache/geometry.h"
#include "core/engine/step_observer.h"

namespace kvlapse {

enum class TraceTier : uint8_t { events, sketch, qkv };
std::string_view tier_name(TraceTier tier);
TraceTier parse_tier(std::string_view name);  // throws UsageError

inline constexpr int kSketchTop = 32;  // attention weights kept per kv head and step

// Known before the first step. Free-form facts (hashes, device, driver, sampling, versions, counter permissions) go
// into `meta`; FORMAT.md lists the keys.
struct TraceHeader {
  CacheGeometry geometry;  // dtype is that of K and V in the cache and in the file
  int layer_begin = 0, layer_end = 0;  // layers whose q, k, v and sketches are recorded
  TraceTier tier = TraceTier::events;
  std::string policy;  // canonical spec
  std::string budget_text;
  int budget_slots = 0;
  double rope_theta = 0;
  int n_sequences = 1;
  std::map<std::string, std::string> meta;
};

// Per sequence; what is only known at the end is filled then.
struct TraceSequence {
  int sequence = 0;
  uint64_t seed = 0;
  std::vector<int32_t> tokens;  // prompt, then generation
  int n_prompt = 0;
  int n_steps = 0;              // tokens whose forward pass was recorded, prompt included: positions [0, n_steps)
  int think_begin = -1, think_end = -1;  // positions of the tags, -1: none
  std::string task;             // "" when the prompt is not of a known task
  std::optional<bool> answer_right;
  std::string answer;
  std::string end_reason;
};

struct SketchRow {  // one (step, kv head)
  float recall = 0;   // attention mass of the held tokens, see FORMAT.md; 1 when nothing was evicted
  float entropy = 0;  // nats
  std::array<int32_t, kSketchTop> pos;     // -1 pads
  std::array<float, kSketchTop> weight;    // mean over the group, descending
};

enum class RowKind : uint8_t { q, k, v };

}  // namespace kvlapse
