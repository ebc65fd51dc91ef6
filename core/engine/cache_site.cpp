#include "core/engine/cache_site.h"

#include <algorithm>

#include "core/policy/checked_inputs.h"

namespace kvlapse {

CacheSite::CacheSite(const CacheGeometry& geometry, int layer, const Policy& policy, int budget, int n_prompt,
                     LayerMemory& memory)
    : policy_(policy),
      memory_(memory),
      table_(geometry.n_kv_heads, geometry.n_slots),
      state_(policy.info().state_columns, geometry.n_kv_heads, geometry.n_slots) {
  check_budget(policy, budget, n_prompt);
  context_.geometry = geometry;
  context_.layer = layer;
  context_.n_prompt = n_prompt;
  context_.budget = policy.layer_budget(layer, geometry.n_layers, budget);
  context_.rule = policy.info().rule;
  context_.table = &table_;
}

void CacheSite::append(Pos pos, const TokenRows& rows) {
  memory_.store(table_, pos, rows);
  for (int h = 0; h < table_.n_kv_heads(); ++h) state_.clear(h, table_.next_slot(h));
  table_.append(pos);
  context_.step = pos;
}

void CacheSite::append_prompt(Pos pos, const TokenRows& rows, bool attend) {
  append(pos, rows);
  const bool observes = policy_.info().state_columns > 0;
  if (observes || attend) memory_.attend(table_, pos);
  if (observes) {
    CheckedInputs inputs(memory_, policy_.info());
    policy_.observe(context_, inputs, state_);
  }
}

const EvictionPlan* CacheSite::finish_prompt() {
  const int target = context_.budget - policy_.info().rule.headroom;
  if (!policy_.info().evicts || table_.max_count() <= target) return nullptr;
  memory_.attend(table_, context_.step);
  return evict(/*prompt_end=*/true);
}

const EvictionPlan* CacheSite::step(Pos pos, const TokenRows& rows) {
  append(pos, rows);
  memory_.attend(table_, pos);
  return finish(pos);
}

const EvictionPlan* CacheSite::finish(Pos) {
  if (policy_.info().state_columns > 0) {
    CheckedInputs inputs(memory_, policy_.info());
    policy_.observe(context_, inputs, state_);
  }
  return evict(/*prompt_end=*/false);
}

const EvictionPlan* CacheSite::evict(bool prompt_end) {
  plan_ = evictor_.decide(policy_, context_, memory_, state_, prompt_end);
  if (!plan_) return nullptr;
  memory_.apply(*plan_);
  apply_plan(*plan_, table_, state_);
  return &*plan_;
}

int CacheSite::capacity(const Policy& policy, int budget, int n_prompt, int total_tokens) {
  if (!policy.info().evicts) return total_tokens;
  int peak = budget;
  peak = policy.info().rule.peak_slots(peak);
  return std::min(total_tokens, std::max(n_prompt, peak));
}

}  // namespace kvlapse
