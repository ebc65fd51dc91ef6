#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/redundancy.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

constexpr int kWindow = 9;    // 8 stored queries and the new one
constexpr int kKernel = 5;    // max pool
constexpr int kRecent = 128;  // protected
constexpr int kReserve = 4;

// Softmax attention of each query head summed over the window, pooled, against its kv head's redundancy; the
// mean over all query heads decides for the layer.
class RkvLongFlow final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const auto lambda = static_cast<float>(parameter("lambda"));
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), prefix = n - std::min(kRecent, n);
      std::vector<float> votes(prefix), pooled(prefix), redundancy(prefix);
      const HeadRange heads = q_heads_of(at, out, r);
      const float scale = 1.0f / static_cast<float>(heads.size());
      int redundancy_of = -1;
      for (int q = heads.begin; q < heads.end; ++q) {
        std::span<const float> rows = inputs.window_logits(q, kWindow);
        vote(rows, static_cast<int>(rows.size()) / n, n, prefix, /*mean=*/false, votes);
        max_pool(votes, kKernel, pooled);
        const int h = at.geometry.kv_head_of(q);
        if (h != redundancy_of)
          plain_redundancy(inputs.keys(h).first(static_cast<size_t>(prefix) * at.geometry.head_dim),
                           at.geometry.head_dim, redundancy);
        redundancy_of = h;
        for (int i = 0; i < prefix; ++i) {
          out.part(0, r)[i] += pooled[i] * scale;
          out.part(1, r)[i] += redundancy[i] * scale;
          out.row(r)[i] += (lambda * pooled[i] - (1.0f - lambda) * redundancy[i]) * scale;
        }
      }
    }
  }
};

}  // namespace

PolicyInfo rkv_longflow_info() {
  PolicyInfo info;
  info.name = "rkv";
  info.reference = "longflow";
  info.summary = "the LongFlow repository's port of R-KV, its baseline: another algorithm";
  info.formula =
      "mean over all query heads of lambda maxpool5(sum over 9 queries of softmax(q.k / sqrt(D))) - (1 - "
      "lambda) "
      "softmax_j(mean_i n_i.n_j), n = k / |k|^2, both over the slots before the last 128; the last 128 "
      "tokens are kept";
  info.paper = "arXiv 2603.11504 (as a baseline); compare arXiv 2505.24133";
  info.source = "yisunlp/LongFlow 89a68d3, models/rkv.py";
  info.deviations = {
      "against rkv@zefan-cai: keys divided by their squared norm, nothing forgiven, attention summed instead "
      "of averaged "
      "(importance weighs 9 times more), pool 5, shared by the layer, 128 recent tokens",
      "fires when more than B - 4 tokens are held and falls to B - 132: occupancy is below the budget on "
      "average by 68",
      "the port evicts before the step's attention, here after it: the same victims"};
  info.parameters = {{"lambda", 0.1, 0, 1, "weight of importance against redundancy"}};
  info.rule.cadence = 1;
  info.rule.headroom = kRecent + kReserve;
  info.rule.slack = kRecent;
  info.rule.granularity = Granularity::layer;
  info.rule.reclaim = Reclaim::compact_by_score;
  info.rule.ties = TieOrder::torch;
  info.rule.recent = kRecent;
  info.signals = Signal::query_window | Signal::keys;
  info.query_window = kWindow;
  info.score_parts = {"importance", "redundancy"};
  info.pairwise_similarity = true;
  return info;
}

std::unique_ptr<Policy> make_rkv_longflow(PolicyInfo info) {
  info.rule.recent = std::max<double>(info.rule.recent, kRecent);
  return std::make_unique<RkvLongFlow>(std::move(info));
}

}  // namespace kvlapse
