// What a backend that chooses a step's victim itself is told and answers (the fused decode step). The host's
// policy stays the definition; a backend that cannot compute a score leaves the choice to it.
#pragma once

#include <cstdint>

namespace kvlapse {

// What a slot's score is made of, p its probability in this step, summed over the query heads that decide.
enum class FusedScore : int32_t {  // as wide as what a device compares
  none,                      // plain attention, no victim
  attention,                 // p (TOVA)
  contribution,              // p * ||v||_1 (LongFlow)
  accumulated,               // sum of p over the steps since the slot was written (H2O)
  accumulated_contribution,  // that, * ||v||_1 (VATP)
  leave_one_out,             // p / (1 - p) * ||o - v||_2 of every head (CAOTE)
};

// What a slot's score is made of where a device may take every decision of a replay in the policy's stead.
// Sums run over heads in ascending order, as in core/policy/scoring/reduce.h.
enum class DeviceScore : uint8_t {
  none,
  position,                  // the token's position: older ones go first
  random,                    // uniform in (seed, layer, row, step, position); the seed is parameter 0
  attention,                 // p, reduced over the query heads by the rule's gqa
  attention_mean,            // p, mean over the query heads whatever the rule says
  contribution,              // sum of p * ||v||_1 / (query heads * D); a prompt is cut by its own score
  accumulated,               // sum over steps of p reduced over the group; then over kv heads by gqa
  accumulated_contribution,  // that sum * ||v||_1
};

// The two lowest scores among the slots of a head, or of a layer that shares its victim, that may be evicted.
struct Lowest {
  float score = 0;  // +inf: no candidate
  float next = 0;   // second lowest, equal to `score` when two tie; +inf: no second candidate, NaN: unknown
  int slot = -1;    // first (or last) slot with `score`; -1: no candidate
  bool has_nan = false;
};

// Which victim of a step is asked for: positions below first_free or above last_free are protected.
struct FusedChoice {
  FusedScore score = FusedScore::none;
  bool shared = false;  // one victim for the layer's heads
  int first_free = 0, last_free = 0;
};

}  // namespace kvlapse
