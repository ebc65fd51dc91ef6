#include "tests/support/kernels/host_policy.h"

#include <algorithm>
#include <cmath>
#include <map>

#include "core/base/error.h"
#include "core/base/vector_math.h"
#include "core/policy/evictor.h"
#include "core/policy/spec.h"

namespace kvlapse {
namespace {

// Attention of the problem's query over its cache, in the host's arithmetic.
class ProblemInputs final : public LayerInputs {
 public:
  ProblemInputs(const DecodeProblem& p, int b, int n) : n_(n), group_(p.shape.group()) {
    const size_t D = p.shape.head_dim, S = p.shape.n_slots;
    keys_.resize(p.shape.n_kv_heads), values_.resize(p.shape.n_kv_heads), norms_.resize(p.shape.n_kv_heads);
    for (int h = 0; h < p.shape.n_kv_heads; ++h) {
      const size_t first = (static_cast<size_t>(b) * p.shape.n_kv_heads + h) * S * D;
      for (size_t i = 0; i < n * D; ++i) {
        keys_[h].push_back(p.to_float(p.k[first + i]));
        values_[h].push_back(p.to_float(p.v[first + i]));
      }
      for (int i = 0; i < n; ++i) norms_[h].push_back(l1_norm({values_[h].data() + i * D, D}));
    }
    for (int head = 0; head < p.shape.n_q_heads; ++head) {
      std::vector<float> q(D), logits(n);
      for (size_t d = 0; d < D; ++d)
        q[d] = p.to_float(p.q[(static_cast<size_t>(b) * p.shape.n_q_heads + head) * D + d]);
      for (int i = 0; i < n; ++i)
        logits[i] = dot(q.data(), keys_[head / group_].data() + i * D, D) / std::sqrt(static_cast<float>(D));
      logits_.push_back(logits);
      softmax(logits, logits);
      std::vector<float>& output = outputs_.emplace_back(D, 0.0f);
      for (int i = 0; i < n; ++i) add_scaled(logits[i], {values_[head / group_].data() + i * D, D}, output);
      attention_.push_back(std::move(logits));
    }
  }

  std::span<const float> logits(int q_head) override { return logits_[q_head]; }
  std::span<const float> attention(int q_head) override { return attention_[q_head]; }
  std::span<const float> output(int q_head) override { return outputs_[q_head]; }
  std::span<const float> value_l1(int kv_head) override { return norms_[kv_head]; }
  std::span<const float> keys(int kv_head) override { return keys_[kv_head]; }
  std::span<const float> values(int kv_head) override { return values_[kv_head]; }
  std::span<const float> window_queries(int) override {
    fail("decode tests: no fused policy reads past queries");
  }
  std::span<const float> window_logits(int, int) override {
    fail("decode tests: no fused policy reads past queries");
  }

 private:
  int n_, group_;
  std::vector<std::vector<float>> keys_, values_, norms_, logits_, attention_, outputs_;
};

// A table that holds the problem's positions: every position is appended, then each head keeps its own.
SlotTable table_of(const DecodeProblem& p, int b, int n) {
  std::map<int, int> index;
  const size_t S = p.shape.n_slots, first = static_cast<size_t>(b) * p.shape.n_kv_heads * S;
  for (int h = 0; h < p.shape.n_kv_heads; ++h)
    for (int i = 0; i < n; ++i) index[p.positions[first + h * S + i]] = 0;
  SlotTable table(p.shape.n_kv_heads, static_cast<int>(index.size()));
  int next = 0;
  for (auto& [pos, slot] : index) {
    table.append(Pos{pos});
    slot = next++;
  }
  for (int h = 0; h < p.shape.n_kv_heads; ++h) {
    std::vector<Slot> order;
    for (int i = 0; i < n; ++i) order.push_back(Slot{index[p.positions[first + h * S + i]]});
    table.compact(h, order);
  }
  return table;
}

}  // namespace

DecodeCase case_of_policy(std::string_view policy_spec) {
  const std::unique_ptr<Policy> policy = make_policy(policy_spec);
  const PolicyInfo& info = policy->info();
  DecodeCase c;
  c.shape = {2, 8, 2, 64, 100, DType::bf16};
  c.shape.leave_one_out = info.fused == FusedScore::leave_one_out;
  c.score = info.fused;
  c.tokens = {300, 400};
  c.recent = info.rule.recent_slots(c.shape.n_slots);
  c.shared = info.rule.granularity == Granularity::layer;
  return c;
}

HostVictims host_policy_victims(const DecodeProblem& p, int b, std::string_view policy_spec) {
  const std::unique_ptr<Policy> policy = make_policy(policy_spec);
  const SlotTable table = table_of(p, b, p.budget);
  ProblemInputs inputs(p, b, p.budget);
  LayerContext at;
  at.geometry = {1, p.shape.n_q_heads, p.shape.n_kv_heads, p.shape.head_dim, table.capacity(), p.shape.dtype};
  at.step = Pos{p.step_pos[b]};
  at.budget = p.budget;
  at.rule = policy->info().rule;
  at.table = &table;
  const SlotState state(policy->info().state_columns, p.shape.n_kv_heads, table.capacity());

  HostVictims result;
  const int n_rows = at.rule.granularity == Granularity::layer ? 1 : p.shape.n_kv_heads;
  Scores scores;
  scores.reset(n_rows, static_cast<int>(policy->info().score_parts.size()),
               std::vector<int>(n_rows, p.budget));
  policy->score(at, inputs, state, scores);
  for (int r = 0; r < n_rows; ++r) result.scores.emplace_back(scores.row(r).begin(), scores.row(r).end());

  Evictor evictor;
  const EvictionPlan* plan = evictor.decide(*policy, at, inputs, state, /*prompt_end=*/false);
  if (plan == nullptr) fail("decode tests: {}: expected an eviction at {} slots", policy_spec, p.budget);
  result.slots.assign(n_rows, -1);
  for (const Drop& drop : plan->drops)
    result.slots[drop.kv_head == kWholeLayer ? 0 : drop.kv_head] = raw(drop.slot);
  return result;
}

int device_victim(const DecodeProblem& p, int b, int row) {
  const uint64_t* keys =
      &p.victim_keys[(static_cast<size_t>(b) * p.shape.n_kv_heads + row) * kMaxDecodeSplits];
  const uint64_t key = *std::min_element(keys, keys + p.n_splits);
  return key == ~uint64_t{0} ? -1 : static_cast<int>(static_cast<uint32_t>(key));
}

}  // namespace kvlapse
