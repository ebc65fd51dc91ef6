// Occupancy of a cache from counts alone: how many slots a policy's rule holds at each step, whatever it
// keeps. Used to choose budgets that cost the same, where policies fill their budget differently (every step,
// or a saw-tooth).
#pragma once

#include "core/policy/policy.h"

namespace kvlapse {

struct Occupancy {
  double mean = 0;  // slots per kv head that attention sees, mean over generated steps and layers
  int peak = 0;     // largest of any layer; the prompt aside
};
Occupancy occupancy(const Policy& policy, int budget, int n_layers, int n_prompt, int n_tokens);

enum class BudgetMatch : uint8_t { nominal, peak, mean };
std::string_view budget_match_name(BudgetMatch match);
BudgetMatch parse_budget_match(std::string_view name);  // throws UsageError

// The budget at which `policy` occupies what a policy that evicts at every step occupies with `budget`: the
// same peak (the largest budget that does not exceed it) or the same mean (the closest). Throws Error when
// there is none.
int matched_budget(const Policy& policy, int budget, BudgetMatch match, int n_layers, int n_prompt,
                   int n_tokens);

}  // namespace kvlapse
