// PolicyBench: one policy on one small layer whose signals are written down by hand: what a hand-worked
// example needs.
#pragma once

#include <memory>
#include <string_view>
#include <vector>

#include "core/base/error.h"
#include "core/policy/checked_inputs.h"
#include "core/policy/evictor.h"
#include "core/policy/spec.h"

namespace kvlapse {

// Every signal of every head, as the test sets it; rows grow with the slots.
class FakeInputs final : public LayerInputs {
 public:
  explicit FakeInputs(const CacheGeometry& g)
      : logits_of(g.n_q_heads),
        attention_of(g.n_q_heads),
        output_of(g.n_q_heads),
        window_of(g.n_q_heads),
        keys_of(g.n_kv_heads),
        values_of(g.n_kv_heads),
        value_l1_of(g.n_kv_heads) {}
  std::vector<std::vector<float>> logits_of, attention_of, output_of, window_of, keys_of, values_of,
      value_l1_of;
  std::vector<float> queries;

  std::span<const float> logits(int q) override { return logits_of.at(q); }
  std::span<const float> attention(int q) override { return attention_of.at(q); }
  std::span<const float> output(int q) override { return output_of.at(q); }
  std::span<const float> value_l1(int h) override { return value_l1_of.at(h); }
  std::span<const float> keys(int h) override { return keys_of.at(h); }
  std::span<const float> values(int h) override { return values_of.at(h); }
  std::span<const float> window_queries(int) override { return queries; }
  std::span<const float> window_logits(int q, int) override { return window_of.at(q); }
};

class PolicyBench {
 public:
  PolicyBench(std::string_view spec, int n_q_heads, int n_kv_heads, int head_dim, int budget,
              int n_prompt = 0)
      : policy(make_policy(spec)),
        geometry{1, n_q_heads, n_kv_heads, head_dim, 64, DType::f32},
        inputs(geometry),
        table(n_kv_heads, 64),
        state(policy->info().state_columns, n_kv_heads, 64) {
    at.geometry = geometry;
    at.n_prompt = n_prompt;
    at.budget = budget;
    at.rule = policy->info().rule;
    at.rope_theta = 10000;
    at.table = &table;
  }

  // Appends the next token.
  void append() {
    for (int h = 0; h < table.n_kv_heads(); ++h) state.clear(h, table.next_slot(h));
    table.append(Pos{next_});
    at.step = Pos{next_++};
  }
  void append(int n) {
    for (int i = 0; i < n; ++i) append();
  }
  void observe() {
    CheckedInputs checked(inputs, policy->info());
    policy->observe(at, checked, state);
  }
  std::vector<float> score(int row = 0) {
    std::vector<int> counts;
    const bool shared = at.rule.granularity == Granularity::layer;
    for (int h = 0; h < (shared ? 1 : table.n_kv_heads()); ++h) counts.push_back(table.count(h));
    Scores scores;
    scores.reset(static_cast<int>(counts.size()), static_cast<int>(policy->info().score_parts.size()),
                 counts);
    CheckedInputs checked(inputs, policy->info());
    policy->score(at, checked, state, scores);
    return {scores.row(row).begin(), scores.row(row).end()};
  }
  // Positions that the evictor drops now, in the order of its plan.
  std::vector<int> dropped() {
    const EvictionPlan* plan = evictor.decide(*policy, at, inputs, state, false);
    std::vector<int> positions;
    if (plan)
      for (const Drop& drop : plan->drops) positions.push_back(raw(drop.pos));
    return positions;
  }

  std::unique_ptr<Policy> policy;
  CacheGeometry geometry;
  FakeInputs inputs;
  SlotTable table;
  SlotState state;
  LayerContext at;
  Evictor evictor;

 private:
  int next_ = 0;
};

}  // namespace kvlapse
