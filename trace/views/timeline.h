// What happened at each step of a sequence, as columns: what a timeline draws. Plain data, safe to share.
#pragma once

#include <cstdint>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

enum class GenerationPhase : uint8_t { prompt, think, answer };
inline constexpr int kGenerationPhases = 3;
constexpr std::string_view generation_phase_name(GenerationPhase phase) {
  constexpr std::string_view kNames[kGenerationPhases] = {"prompt", "think", "answer"};
  return kNames[static_cast<int>(phase)];
}

struct PhaseRange {
  GenerationPhase phase;
  int begin, end;  // steps, half open
};

// Columns over steps [first_step, first_step + size()).
struct Timeline {
  int n_prompt = 0, n_steps = 0;
  int first_step = 0;  // only steps that chose a token are timed
  std::vector<PhaseRange> phases;
  std::vector<float> held_tokens;      // per kv head and layer, mean
  std::vector<float> evicted_tokens;   // by the step, all layers and kv heads
  std::vector<float> step_ms;          // measured
  std::vector<float> attention_share;  // of the step's time, measured
  std::vector<float> evict_share;
  std::vector<float> kv_read_mib;  // modelled: bytes of K and V that attention reads, whole model
  std::vector<float> kv_gibps;  // derived: kv_read over the measured attention time; 0 where it was not timed
  std::vector<float> logprob;
  std::vector<int32_t> compactions;  // steps that evicted more than one token per kv head
  size_t size() const { return held_tokens.size(); }
};
Timeline read_timeline(const TraceReader& reader, int sequence);

// Every (layer, kv head) at one step, [L][H].
struct HeadStates {
  int n_layers = 0, n_kv_heads = 0, step = 0;
  std::vector<int32_t> held;     // tokens after the step
  std::vector<int32_t> evicted;  // so far
  std::vector<float> entropy;    // nats, NaN where the trace holds no sketch
  std::vector<float> recall;     // NaN where it is not known
  std::vector<int> lost_layers;  // layers whose chunk cannot be read
};
HeadStates read_head_states(const TraceReader& reader, int sequence, int step);

// Occupancy of one kv head over a step range, for a line: tokens held after each step.
std::vector<int32_t> read_head_occupancy(const TraceReader& reader, int sequence, int layer, int kv_head,
                                         int begin, int end);

}  // namespace kvlapse
