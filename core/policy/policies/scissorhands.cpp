#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

// Persistence of importance: what the last few hundred queries attended to will be attended to again.
class Scissorhands final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int history = static_cast<int>(parameter("history"));
    const bool counts = parameter("rule") != 0;
    std::vector<float> votes, weights;
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size());
      votes.resize(n);
      weights.resize(n);
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int q) {
        std::span<const float> rows = inputs.window_logits(q, history);
        const int n_rows = static_cast<int>(rows.size()) / n;
        if (!counts) {
          vote(rows, n_rows, n, n, /*mean=*/true, votes);
          return std::span<const float>(votes);
        }
        std::fill(votes.begin(), votes.end(), 0.0f);
        for (int w = 0; w < n_rows; ++w) {
          softmax(rows.subspan(static_cast<size_t>(w) * n, n), weights);
          const float average = 1.0f / static_cast<float>(raw(at.step) + 2 - n_rows + w);  // 1 / tokens seen
          for (int i = 0; i < n; ++i) votes[i] += weights[i] >= average ? 1.0f : 0.0f;
        }
        return std::span<const float>(votes);
      });
    }
  }
};

}  // namespace

PolicyInfo scissorhands_info() {
  PolicyInfo info;
  info.name = "scissorhands";
  info.summary = "attention of the last few hundred queries, and the newest tokens";
  info.formula =
      "score(i) = mean over the last `history` queries of softmax(q.k / sqrt(D)) over the held tokens";
  info.paper = "arXiv 2305.17118";
  info.source = "guozhiyu/vatp (its Scissorhands: mean attention of 400 queries, 10 recent tokens)";
  info.deviations = {
      "rule=count is the paper's: in how many of these steps the weight was at least 1/t; integers tie often",
      "attention of earlier queries is taken over the tokens held now",
      "compacts every 128 tokens instead of when a buffer is full"};
  info.parameters = {{"history", 400, 1, 4096, "last queries that vote"},
                     {"rule", 0, 0, 1, "what a query adds", {"mean", "count"}}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.rule.recent = 10;
  info.signals = static_cast<SignalSet>(Signal::query_window);
  return info;
}

std::unique_ptr<Policy> make_scissorhands(PolicyInfo info) {
  info.query_window = static_cast<int>(info.parameters[0].value);
  return std::make_unique<Scissorhands>(std::move(info));
}

}  // namespace kvlapse
