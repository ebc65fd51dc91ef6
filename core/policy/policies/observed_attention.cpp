#include <vector>

#include "core/policy/policies/policies.h"
#include "core/policy/scoring/attention_sum.h"

namespace kvlapse {
namespace {

// Attention received, divided by the number of held rows that see the slot: L - slot, slots in position
// order.
class ObservedAttention final : public AttentionSum {
 public:
  using AttentionSum::AttentionSum;

  void observe(const LayerContext& at, LayerInputs& inputs, SlotState& state) const override {
    if (!recomputes()) AttentionSum::observe(at, inputs, state);
  }

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
             Scores& out) const override {
    for (int r = 0; r < out.n_rows(); ++r) {
      std::span<float> row = out.row(r);
      if (recomputes())
        reduce_heads(q_heads_of(at, out, r), at.rule.gqa, row,
                     [&](int q) { return column_sums(at, inputs, r, q); });
      else
        reduce_state(at, state, 0, out, r);
      const size_t n = row.size();
      for (size_t s = 0; s < n; ++s) row[s] /= static_cast<float>(n - s);
    }
  }

 private:
  bool recomputes() const { return parameter("rows") != 0; }

  // Causal attention among the held tokens, each with its own query, as if they were a prompt.
  std::span<const float> column_sums(const LayerContext& at, LayerInputs& inputs, int row, int q) const {
    thread_local std::vector<float> sums, weights;
    std::span<const Pos> positions = at.positions(row);
    const size_t n = positions.size();
    std::span<const float> logits = inputs.window_logits(q, kAllQueries);
    const int first = raw(at.step) + 1 - static_cast<int>(logits.size() / n);
    sums.assign(n, 0.0f);
    weights.resize(n);
    for (Pos pos : positions) {
      softmax(logits.subspan(static_cast<size_t>(raw(pos) - first) * n, n), weights);
      for (size_t i = 0; i < n; ++i) sums[i] += weights[i];
    }
    return sums;
  }
};

}  // namespace

PolicyInfo observed_attention_info() {
  PolicyInfo info;
  info.name = "observed_attention";
  info.reference = "kvpress";
  info.summary = "mean attention that a token got, compacted every 128 tokens";
  info.formula = "score(i) = sum over rows of attention(i) / (L - slot), mean over the group";
  info.paper = "related to arXiv 2306.14048";
  info.source = "NVIDIA/kvpress 0.5.5, presses/observed_attention_press.py";
  info.deviations = {
      "rows=observed sums the attention of every step as it was, over the cache of its time; rows=recomputed "
      "runs the "
      "held tokens' own queries over the held tokens and so keeps every query",
      "as in the class the divisor is L - slot, not the number of steps since birth",
      "slots stay in position order (DecodingPress leaves them in score order and passes one row)"};
  info.parameters = {{"rows", 0, 0, 1, "whose attention is summed", {"observed", "recomputed"}}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.signals = static_cast<SignalSet>(Signal::attention);
  info.state_columns = 1;
  return info;
}

std::unique_ptr<Policy> make_observed_attention(PolicyInfo info) {
  if (info.parameters[0].value != 0) {
    info.signals = static_cast<SignalSet>(Signal::query_window);
    info.query_window = kAllQueries;
    info.state_columns = 0;
  }
  return std::make_unique<ObservedAttention>(std::move(info));
}

}  // namespace kvlapse
