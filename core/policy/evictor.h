// Evictor: the one driver of every policy: is an eviction due, score, choose, validate, plan. Pure in its
// inputs; an instance only holds scratch memory, so one per thread of work.
#pragma once

#include <optional>

#include "core/policy/plan.h"

namespace kvlapse {

// Throws Error when the budget cannot hold what the rule protects.
void check_budget(const Policy& policy, int budget, int n_prompt);

class Evictor {
 public:
  // at.step is the newest token. `prompt_end`: that token ends the prompt, so the prompt's own cut applies.
  std::optional<EvictionPlan> decide(const Policy& policy, const LayerContext& at, LayerInputs& inputs,
                                     const SlotState& state, bool prompt_end);

 private:
  Scores scores_;
  std::vector<Slot> order_;
};

// Moves table and per-slot state as the plan says. K/V rows are the caller's.
void apply_plan(const EvictionPlan& plan, SlotTable& table, SlotState& state);

}  // namespace kvlapse
