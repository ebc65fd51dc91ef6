#include "core/engine/cache_site.h"

#include <algorithm>

#include "core/base/error.h"
#include "core/policy/checked_inputs.h"

namespace kvlapse {

CacheSite::CacheSite(const CacheGeometry& geometry, int layer, const Policy& policy, int budget, int n_prompt,
                     LayerMemory& memory, const SiteFacts& facts)
    : policy_(policy),
      memory_(memory),
      table_(geometry.n_kv_heads, geometry.n_slots),
      state_(policy.info().state_columns, geometry.n_kv_heads, geometry.n_slots) {
  const PolicyInfo& info = policy.info();
  if ((contains(info.signals, Signal::rope) || info.cache_positions) && facts.rope_theta <= 0)
    fail("policy {}: needs the RoPE base of the model, which is unknown here", info.name);
  if (contains(info.signals, Signal::future) && !facts.future)
    fail("policy {}: is an oracle and needs a finished trace: it can be replayed, not decoded", info.name);
  if (info.selects && !facts.may_select)
    fail("policy {}: selects from a full cache and frees no memory: it can be replayed, not decoded",
         info.name);
  policy.check_model(geometry, facts.rope_theta);
  check_budget(policy, policy.layer_budget(layer, geometry.n_layers, budget), n_prompt);
  context_.geometry = geometry;
  context_.layer = layer;
  context_.n_prompt = n_prompt;
  context_.budget = policy.layer_budget(layer, geometry.n_layers, budget);
  context_.rule = policy.info().rule;
  context_.rope_theta = facts.rope_theta;
  context_.future = facts.future;
  context_.table = &table_;
  if (info.cache_positions) moved_keys_.emplace(geometry, facts.rope_theta);
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
  const int target = context_.budget - policy_.prompt_rule(context_.budget).headroom;
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

FusedChoice CacheSite::fused_choice() const {
  const PolicyInfo& info = policy_.info();
  if (fused_score(info) == FusedScore::none) return {};
  const Protection protection(context_, info.rule);
  return {info.fused, info.rule.granularity == Granularity::layer, protection.first_free,
          protection.last_free};
}

const std::vector<std::vector<Slot>>& CacheSite::select() {
  return evictor_.select(policy_, context_, memory_, state_);
}

const EvictionPlan* CacheSite::evict(bool prompt_end) {
  const EvictionPlan* plan = evictor_.decide(policy_, context_, memory_, state_, prompt_end);
  if (!plan) return nullptr;
  if (moved_keys_) moved_keys_->apply(*plan, table_, memory_);
  memory_.apply(*plan);
  apply_plan(*plan, table_, state_);
  if (moved_keys_)
    for (int h = 0; h < table_.n_kv_heads(); ++h) memory_.turn_keys(h, moved_keys_->of(h));
  return plan;
}

int CacheSite::capacity(const Policy& policy, int layer_budget, int n_kv_heads, int n_prompt,
                        int total_tokens) {
  if (!policy.info().evicts) return total_tokens;
  const EvictionRule& rule = policy.info().rule;
  int peak = rule.peak_slots(layer_budget);
  if (rule.ragged) {  // one head may hold what the others give up, down to their floor
    const int floor_slots = static_cast<int>(rule.ragged_floor * layer_budget);
    peak += (n_kv_heads - 1) * std::max(0, layer_budget - rule.headroom - floor_slots);
  }
  return std::min(total_tokens, std::max(n_prompt, peak));
}

}  // namespace kvlapse
