// Evictor: the one driver of every policy: is an eviction due, score, choose, validate, plan. Pure in its
// inputs; an instance only holds scratch memory and the last plan, so one per thread of work. A hole-filling
// decision allocates nothing once the scratch has grown.
#pragma once

#include <span>
#include <vector>

#include "core/policy/lowest.h"
#include "core/policy/plan.h"

namespace kvlapse {

// Throws Error when the budget cannot hold what the rule protects.
void check_budget(const Policy& policy, int budget, int n_prompt);

// Throws Error when applying the plan would break an invariant: drops sorted, distinct, held and unprotected;
// survivors exactly the rest; no head (or layer, when ragged) left above the budget.
void validate_plan(const EvictionPlan& plan, const LayerContext& at, const EvictionRule& rule);

// A protected token is never evicted: attention sinks, a pinned prompt, the newest `recent` tokens.
struct Protection {
  int first_free = 0;  // positions below are protected
  int last_free = 0;   // positions above are protected
  Protection(const LayerContext& at, const EvictionRule& rule);
  bool holds(Pos pos) const { return raw(pos) < first_free || raw(pos) > last_free; }
};

class Evictor {
 public:
  // How many victims would differ if scores were compared in fp16, moved by up to one unit in the last place,
  // or equal ones taken in the other order. Only counted when asked for: it selects three times more.
  struct Sensitivity {
    int64_t victims = 0, fp16 = 0, ulp = 0, ties = 0;
  };

  // at.step is the newest token. `prompt_end`: that token ends the prompt, so the prompt's own cut applies.
  // The plan is the evictor's until the next call; null when nothing is due.
  const EvictionPlan* decide(const Policy& policy, const LayerContext& at, LayerInputs& inputs,
                             const SlotState& state, bool prompt_end);
  // Of a policy that selects: the slots that each kv head attends to, the `budget` of highest score and the
  // protected ones, in slot order. The evictor's until the next call.
  const std::vector<std::vector<Slot>>& select(const Policy& policy, const LayerContext& at,
                                               LayerInputs& inputs, const SlotState& state);
  // Scores of the last decision, before any cast.
  const Scores& scores() const { return scores_; }

  void count_sensitivity(bool on) { counts_sensitivity_ = on; }
  const Sensitivity& sensitivity() const { return sensitivity_; }

 private:
  struct Candidate {
    float score;
    int row;
    Slot slot;
  };

  void choose_lowest(const LayerContext& at, const EvictionRule& rule, int row, int kv_head);
  void take_lowest(const LayerContext& at, int row, int kv_head, const Lowest& lowest, float score);
  void choose_many(const LayerContext& at, const EvictionRule& rule);
  void collect(const LayerContext& at, const EvictionRule& rule);
  void split_drops(const LayerContext& at, const EvictionRule& rule);
  void arrange(std::span<Candidate> row, int drops, const EvictionRule& rule);
  void measure_sensitivity(const LayerContext& at, const EvictionRule& rule);
  float ranked(float score, const EvictionRule& rule, Pos pos) const;
  [[noreturn]] void fail_nan(const LayerContext& at, int row, int slot) const;

  Scores scores_;
  EvictionPlan plan_;
  std::string_view policy_;  // name, for messages
  std::vector<int> counts_, drops_, row_begin_;
  std::vector<Candidate> candidates_, all_;
  std::vector<std::pair<float, int64_t>> queue_;  // torch.topk's
  std::vector<float> cast_;
  std::vector<Slot> order_;
  std::vector<char> gone_;
  std::vector<std::vector<Slot>> selected_;
  bool counts_sensitivity_ = false, perturb_ = false;
  Sensitivity sensitivity_;
};

// Moves table and per-slot state as the plan says. K/V rows are the caller's.
void apply_plan(const EvictionPlan& plan, SlotTable& table, SlotState& state);

}  // namespace kvlapse
