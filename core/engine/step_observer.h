// StepObserver: what listens to a decode session; the recorder is one, so is a test. Called on the decoding
// thread, in order; an observer copies what it wants to keep and returns quickly.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/engine/cache_site.h"

namespace kvlapse {

// Phases of a step that are timed apart.
enum class StepPhase : uint8_t { embed, attention, matmul, evict, head, sample, observe };
inline constexpr int kStepPhases = 7;
constexpr std::string_view step_phase_name(StepPhase phase) {
  constexpr std::string_view kNames[kStepPhases] = {"embed", "attention", "matmul", "evict",
                                                    "head",  "sample",    "observe"};
  return kNames[static_cast<int>(phase)];
}

// One generated token of one sequence, after its forward pass. Times are of the whole batch's step.
struct StepSummary {
  int sequence = 0;
  Pos pos{0};              // of the token that was fed
  int32_t token = 0;       // the token that was fed
  int32_t next_token = 0;  // the token that was chosen
  float logprob = 0;       // of next_token
  float margin = 0;        // logit lead over the runner-up
  int64_t start_ns = 0;    // since the session began
  int64_t total_ns = 0;
  int64_t waited_ns = 0;  // of it, for a device that runs ahead (Backend::waited_ns)
  std::array<int64_t, kStepPhases> phase_ns{};  // zero: not timed (Backend::queues_steps)
};

class StepObserver {
 public:
  virtual ~StepObserver() = default;
  // What on_layer needs: attention() and output() of prompt tokens are only computed when asked for.
  virtual bool wants_prompt_attention() const { return false; }

  // The prompt of a sequence, before its first forward pass.
  virtual void on_prompt(int /*sequence*/, std::span<const int32_t> /*ids*/) {}
  // One token in one layer, prompt tokens included, after its eviction. `plan` is null when nothing was
  // evicted. `inputs` answers for this token and the slots as they were during attention: read it in
  // on_attended.
  virtual void on_attended(int /*sequence*/, int /*layer*/, Pos /*pos*/, const TokenRows& /*rows*/,
                           const SlotTable& /*table*/, LayerInputs& /*inputs*/) {}
  virtual void on_evicted(int /*sequence*/, int /*layer*/, const EvictionPlan& /*plan*/) {}
  virtual void on_step(const StepSummary& /*summary*/) {}
  // The sequence ended; `reason`: "eos", "max_tokens", "context" or "interrupted".
  virtual void on_end(int /*sequence*/, std::string_view /*reason*/) {}
};

}  // namespace kvlapse
