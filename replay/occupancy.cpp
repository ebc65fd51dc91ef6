#include "replay/occupancy.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"

namespace kvlapse {

Occupancy occupancy(const Policy& policy, int budget, int n_layers, int n_prompt, int n_tokens) {
  const PolicyInfo& info = policy.info();
  Occupancy total;
  double sum = 0;
  for (int layer = 0; layer < n_layers; ++layer) {
    const int slots = policy.layer_budget(layer, n_layers, budget);
    const int target = slots - info.rule.headroom;
    int held = n_prompt;
    if (info.evicts) held = std::min(held, std::max(1, slots - policy.prompt_rule(slots).headroom));
    for (int t = n_prompt; t < n_tokens; ++t) {
      ++held;
      sum += held;
      total.peak = std::max(total.peak, held);
      if (info.evicts && (t + 1) % info.rule.cadence == 0 && held > target + info.rule.slack)
        held = std::max(1, target);
    }
  }
  const int steps = std::max(1, n_tokens - n_prompt);
  total.mean = sum / (static_cast<double>(n_layers) * steps);
  return total;
}

std::string_view budget_match_name(BudgetMatch match) {
  return match == BudgetMatch::peak ? "peak" : match == BudgetMatch::mean ? "mean" : "nominal";
}

BudgetMatch parse_budget_match(std::string_view name) {
  for (BudgetMatch match : {BudgetMatch::nominal, BudgetMatch::peak, BudgetMatch::mean})
    if (budget_match_name(match) == name) return match;
  fail_usage("--match: expected peak, mean or nominal, found '{}'", name);
}

int matched_budget(const Policy& policy, int budget, BudgetMatch match, int n_layers, int n_prompt,
                   int n_tokens) {
  if (match == BudgetMatch::nominal || !policy.info().evicts) return budget;
  // What a cache that is cut to budget - 1 at every step holds.
  double wanted_mean = 0;
  for (int t = n_prompt; t < n_tokens; ++t) wanted_mean += std::min(t + 1, budget);
  wanted_mean /= std::max(1, n_tokens - n_prompt);
  auto excess = [&](int b) {
    const Occupancy o = occupancy(policy, b, n_layers, n_prompt, n_tokens);
    return match == BudgetMatch::peak ? static_cast<double>(o.peak - std::min(budget, n_tokens))
                                      : o.mean - wanted_mean;
  };
  // Occupancy grows with the budget: the largest one that stays within.
  int low = 1, high = budget + policy.info().rule.cadence + 1;
  if (excess(low) > 0)
    fail("policy {}: --match {}: no budget occupies as little as {} slots", policy.info().name,
         budget_match_name(match), budget);
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (excess(middle) > 0 ? high : low) = middle;
  }
  if (match == BudgetMatch::mean && std::abs(excess(low + 1)) < std::abs(excess(low))) ++low;
  return low;
}

}  // namespace kvlapse
