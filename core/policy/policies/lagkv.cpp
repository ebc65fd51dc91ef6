#include <cmath>
#include <numeric>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// A partition of `lag` slots is judged against the range of the next one, coordinate by coordinate.
class LagKv final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    std::vector<float> scores;
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int h) {
        score_head(at, inputs, h, scores);
        return std::span<const float>(scores);
      });
  }

 private:
  void score_head(const LayerContext& at, LayerInputs& inputs, int h, std::vector<float>& scores) const {
    const int sinks = static_cast<int>(parameter("sinks")), lag = static_cast<int>(parameter("lag"));
    const int n = at.count(h), d = at.geometry.head_dim;
    scores.assign(n, 1.0f);  // sinks, the last whole partition and the tail behind it
    if (n < sinks + 2 * lag) {
      for (int i = sinks; i < n; ++i)
        scores[i] = static_cast<float>(i - sinks) / static_cast<float>(n - sinks);
      return;
    }
    const int partitions = (n - sinks) / lag;
    std::vector<float> spread(lag), total(lag);
    std::vector<int> order(lag);
    for (int p = 0; p + 1 < partitions; ++p) {
      const int begin = sinks + p * lag;
      std::fill(total.begin(), total.end(), 0.0f);
      for (std::span<const float> rows : {inputs.keys(h), inputs.values(h)}) {
        relative_spread(rows.subspan(static_cast<size_t>(begin) * d, static_cast<size_t>(2 * lag) * d), lag,
                        d, spread);
        softmax(spread, spread);
        for (int i = 0; i < lag; ++i) total[i] += spread[i];
      }
      for (int i = 0; i < lag; ++i) scores[begin + i] = total[i] / 2;
      if (parameter("cross") != 0) continue;
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return total[a] < total[b]; });
      for (int rank = 0; rank < lag; ++rank)
        scores[begin + order[rank]] = static_cast<float>(rank) / static_cast<float>(lag);
    }
  }

  // Standard deviation over D of (x - min) / (max - min), range taken over the second `lag` rows.
  static void relative_spread(std::span<const float> rows, int lag, int d, std::span<float> spread) {
    std::vector<float> low(d), high(d);
    for (int j = 0; j < d; ++j) {
      low[j] = high[j] = rows[static_cast<size_t>(lag) * d + j];
      for (int i = lag + 1; i < 2 * lag; ++i) {
        low[j] = std::min(low[j], rows[static_cast<size_t>(i) * d + j]);
        high[j] = std::max(high[j], rows[static_cast<size_t>(i) * d + j]);
      }
    }
    std::vector<float> scaled(d);
    for (int i = 0; i < lag; ++i) {
      double mean = 0, square = 0;
      for (int j = 0; j < d; ++j) {
        const float range = high[j] - low[j];
        scaled[j] = range > 0 ? (rows[static_cast<size_t>(i) * d + j] - low[j]) / range : 0.0f;
        mean += scaled[j];
      }
      mean /= d;
      for (int j = 0; j < d; ++j) square += (scaled[j] - mean) * (scaled[j] - mean);
      spread[i] = static_cast<float>(std::sqrt(square / (d - 1)));
    }
  }
};

}  // namespace

PolicyInfo lagkv_info() {
  PolicyInfo info;
  info.name = "lagkv";
  info.reference = "kvpress";
  info.summary =
      "keeps keys and values that stand out against the next partition, compacted every 128 tokens";
  info.formula =
      "per partition of `lag` slots behind the sinks: mean of k and v of softmax_tokens(std_d((x - min) / "
      "(max - min))) "
      "with the range of the next partition; then the rank within the partition / lag";
  info.paper = "arXiv 2504.04704";
  info.source = "NVIDIA/kvpress 0.5.5, presses/lagkv_press.py";
  info.deviations = {
      "a cache shorter than sinks + 2 lag keeps sinks and recent tokens, as in the class",
      "a coordinate that is constant in the next partition counts 0 (the class divides by zero)",
      "ranks tie across partitions: among equals the earlier slot goes first",
      "slots stay in position order (DecodingPress leaves them in score order)"};
  info.parameters = {{"lag", 128, 2, 8192, "tokens in a partition"},
                     {"sinks", 4, 0, 4096, "first positions that are never evicted"},
                     {"cross", 0, 0, 1, "1: compare raw scores across partitions instead of ranks"}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.rule.sinks = 4;
  info.signals = Signal::keys | Signal::values;
  return info;
}

std::unique_ptr<Policy> make_lagkv(PolicyInfo info) {
  info.rule.sinks = static_cast<int>(info.parameters[1].value);
  return std::make_unique<LagKv>(std::move(info));
}

}  // namespace kvlapse
