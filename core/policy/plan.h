// EvictionPlan: the outcome of one decision of one (sequence, layer): what is recorded, replayed and drawn.
#pragma once

#include <array>
#include <vector>

#include "core/base/position.h"
#include "core/policy/policy.h"

namespace kvlapse {

enum class EvictionReason : uint8_t { over_budget, prompt_over_budget };

inline constexpr int kWholeLayer = -1;  // Drop::kv_head when all kv heads of the layer share the victim

struct Drop {
  int kv_head = kWholeLayer;
  Slot slot{0};
  Pos pos{0};
  float score = 0;
  std::array<float, 2> parts{};  // PolicyInfo::score_parts, in that order
};

struct EvictionPlan {
  Pos step{0};  // newest token when the decision was taken
  EvictionReason reason = EvictionReason::over_budget;
  Reclaim reclaim = Reclaim::fill;
  std::vector<Drop> drops;  // sorted by (kv_head, slot)
  // Survivors of each kv head in their new slot order; empty when reclaim is fill.
  std::vector<std::vector<Slot>> keep;
  // Per score row: the lowest score that was kept, and how many of the drops lie within 1e-6 (relative) of
  // it, so that another order of summation could have chosen otherwise.
  std::vector<float> threshold;
  int near_ties = 0;
};

}  // namespace kvlapse
