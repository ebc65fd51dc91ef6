#include <algorithm>
#include <numeric>
#include <vector>

#include "core/base/rng.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

// A quarter of the budget goes to the values of widest range, the rest is drawn in proportion to SnapKV's
// score.
class Vase final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int window = static_cast<int>(parameter("window")), kernel = static_cast<int>(parameter("kernel"));
    const size_t d = at.geometry.head_dim;
    std::vector<float> rows, range, one;
    std::vector<int> order;
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), prefix = n - std::min(window, n);
      const int n_rows = window_logits_of(q_heads_of(at, out, r), at.rule.gqa, inputs, window, n, rows);
      std::vector<float> importance(prefix), pooled(prefix);
      vote(rows, n_rows, n, prefix, /*mean=*/true, importance);
      max_pool(importance, kernel, pooled);

      range.resize(prefix);
      one.resize(prefix);
      reduce_heads(kv_heads_of(at, out, r), GqaRule::mean, range, [&](int h) {
        std::span<const float> values = inputs.values(h);
        for (int i = 0; i < prefix; ++i) {
          auto [low, high] = std::minmax_element(&values[i * d], &values[(i + 1) * d]);
          one[i] = *high - *low;
        }
        return std::span<const float>(one);
      });

      const uint64_t key =
          counter_random({static_cast<uint64_t>(parameter("seed")), static_cast<uint64_t>(at.layer),
                          static_cast<uint64_t>(r), static_cast<uint64_t>(raw(at.step))});
      std::span<float> row = out.row(r);
      std::span<const Pos> positions = at.positions(r);
      for (int i = 0; i < prefix; ++i) {
        const auto noise = gumbel(mix64(key ^ static_cast<uint64_t>(raw(positions[i]))));
        row[i] = static_cast<float>(fixed_log(std::max(pooled[i], kLeast))) + noise;
      }
      const int wide = std::min(prefix, static_cast<int>(parameter("share") * at.budget));
      order.resize(prefix);
      std::iota(order.begin(), order.end(), 0);
      std::partial_sort(order.begin(), order.begin() + wide, order.end(),
                        [&](int a, int b) { return range[a] != range[b] ? range[a] > range[b] : a < b; });
      for (int i = 0; i < wide; ++i) row[order[i]] = kAlways + range[order[i]];
    }
  }

 private:
  static constexpr float kLeast = 1e-30f;  // weight of a token that nothing attends to
  static constexpr float kAlways = 1024;   // above every log weight plus noise
};

}  // namespace

PolicyInfo vase_info() {
  PolicyInfo info;
  info.name = "vase";
  info.summary = "a quarter for the values of widest range, the rest drawn in proportion to SnapKV's score";
  info.formula =
      "the share B tokens of largest max(v) - min(v) stay; the rest by log(SnapKV score) + gumbel(seed, "
      "layer, kv head, "
      "step, position)";
  info.paper = "arXiv 2606.03928";
  info.source = "the paper's description";
  info.deviations = {"SnapKV's score is the decode form of snapkv@zefan-cai", "rounds of 128 tokens"};
  info.parameters = {{"share", 0.25, 0, 1, "of the budget that goes by value range"},
                     {"window", 8, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"kernel", 7, 1, 255, "width of the max pool, odd"},
                     {"seed", 0, 0, 4294967295.0, "key of the draws"}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact;
  info.signals = Signal::query_window | Signal::values;
  return info;
}

std::unique_ptr<Policy> make_vase(PolicyInfo info) {
  adopt_window(info, info.parameters[1].value);
  return std::make_unique<Vase>(std::move(info));
}

}  // namespace kvlapse
