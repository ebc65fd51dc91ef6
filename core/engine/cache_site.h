// CacheSite: the cache of one sequence in one layer. It is given q, k, v of the next token, appends, attends,
// lets the policy choose, and hands back the attention output. Live decode and offline replay run this same
// code over two implementations of LayerMemory. One thread at a time per site; sites are independent.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "core/engine/moved_keys.h"
#include "core/policy/evictor.h"

namespace kvlapse {

// q [Hq, D] and k, v [H, D] of one token, post-RoPE, fp32 values already rounded to the cache's dtype.
struct TokenRows {
  const float* q = nullptr;
  const float* k = nullptr;
  const float* v = nullptr;
};

// Where K and V of one (sequence, layer) live, and the attention over them. As LayerInputs it answers for the
// newest attended token.
class LayerMemory : public LayerInputs {
 public:
  // Stores the token's rows at table.next_slot(h) of every head; `table` does not hold the token yet.
  virtual void store(const SlotTable& table, Pos pos, const TokenRows& rows) = 0;
  // Makes the newest token the one that LayerInputs answers for; `table` holds it.
  virtual void attend(const SlotTable& table, Pos pos) = 0;
  // Moves rows as the plan says.
  virtual void apply(const EvictionPlan& plan) = 0;
  // Replaces the stored keys of these tokens, after apply(); all that have moved, under a policy that counts
  // positions inside the cache.
  virtual void turn_keys(int kv_head, std::span<const MovedKey> moved) = 0;
};

// What some policies need to know beyond the cache.
struct SiteFacts {
  double rope_theta = 0;           // 0: unknown
  FutureInputs* future = nullptr;  // oracles only
  bool may_select = false;         // a selection policy frees no memory: only a replay runs it
};

class CacheSite {
 public:
  // geometry.n_slots is the capacity: at least peak_slots and the prompt's length. Throws Error
  // (check_budget).
  CacheSite(const CacheGeometry& geometry, int layer, const Policy& policy, int budget, int n_prompt,
            LayerMemory& memory, const SiteFacts& facts = {});

  // One token of the prompt, in order. Attends only when the policy observes, or when `attend` is set.
  void append_prompt(Pos pos, const TokenRows& rows, bool attend = false);
  // After the prompt's last token: the cut of a prompt that exceeds the budget. Null when nothing was
  // evicted.
  const EvictionPlan* finish_prompt();
  // One generated token: append, attend, evict. Null when nothing was evicted. The attention output of a
  // query head is memory.output(head) until the next call.
  const EvictionPlan* step(Pos pos, const TokenRows& rows);

  // The parts of step(), for a driver that attends for many sites at once between them.
  void append(Pos pos, const TokenRows& rows);
  const EvictionPlan* finish(Pos pos);

  // What each kv head attends to at the newest token, under a policy that selects.
  const std::vector<std::vector<Slot>>& select();

  // What a backend that attends may decide for the newest token in the policy's stead; score none: nothing.
  FusedChoice fused_choice() const;

  const SlotTable& table() const { return table_; }
  int budget() const { return context_.budget; }  // of this layer
  const EvictionRule& rule() const { return context_.rule; }
  Evictor& evictor() { return evictor_; }

  // Slots that the fullest head of a layer with that budget needs for a sequence of `total_tokens`.
  static int capacity(const Policy& policy, int layer_budget, int n_kv_heads, int n_prompt, int total_tokens);

 private:
  const EvictionPlan* evict(bool prompt_end);

  const Policy& policy_;
  LayerMemory& memory_;
  SlotTable table_;
  SlotState state_;
  Evictor evictor_;
  LayerContext context_;
  std::optional<MovedKeys> moved_keys_;
};

}  // namespace kvlapse
