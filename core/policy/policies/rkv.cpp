#include <cmath>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/redundancy.h"
#include "core/policy/scoring/window_vote.h"

namespace kvlapse {
namespace {

constexpr float kSimilar = 0.5f;  // cosine above which a later token stands for an earlier one

// Z = lambda I - (1 - lambda) R over the slots before the window, which is the newest `window` slots.
class Rkv final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int window = static_cast<int>(parameter("window")), kernel = static_cast<int>(parameter("kernel"));
    const auto lambda = static_cast<float>(parameter("lambda"));
    std::vector<float> rows;
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), prefix = n - std::min(window, n);
      const int n_rows = window_logits_of(q_heads_of(at, out, r), at.rule.gqa, inputs, window, n, rows);
      std::vector<float> importance(prefix);
      vote(rows, n_rows, n, prefix, /*mean=*/true, importance);
      max_pool(importance, kernel, out.part(0, r).first(prefix));

      std::span<float> redundancy = out.part(1, r);
      std::vector<float> one(out.shared() ? n : 0);
      const HeadRange heads = kv_heads_of(at, out, r);
      for (int h = heads.begin; h < heads.end; ++h) {
        std::span<float> to = out.shared() ? std::span<float>(one) : redundancy;
        forgiving_redundancy(inputs, h, at.geometry.head_dim, kSimilar, to);
        if (out.shared())
          for (int i = 0; i < n; ++i) redundancy[i] += one[i] / static_cast<float>(heads.size());
      }
      for (int i = 0; i < prefix; ++i)
        out.row(r)[i] = out.part(0, r)[i] * lambda - redundancy[i] * (1.0f - lambda);
    }
  }
};

}  // namespace

PolicyInfo rkv_zefan_cai_info() {
  PolicyInfo info;
  info.name = "rkv";
  info.reference = "zefan-cai";
  info.summary = "importance to the last queries minus redundancy among keys, compacted every 128 tokens";
  info.formula =
      "Z = lambda I - (1 - lambda) R; I = maxpool(mean over the window of softmax(max over the group of q.k "
      "/ sqrt(D))) "
      "without the window's own slots; R = softmax_j(mean_i C_ij), C = cosines of keys with a zero diagonal "
      "and, in "
      "each row i, the last C_ij above 0.5 forgiven (slot 0 when there is none)";
  info.paper = "arXiv 2505.24133";
  info.source = "Zefan-Cai/R-KV d15c976, rkv/compression/r1_kv.py and rkv/utils.py";
  info.deviations = {
      "the threshold 0.5 is fixed; similarities below it are kept, as in the code: it only decides which "
      "entry is "
      "forgiven",
      "a row without a similar key forgives slot 0, as in the code (argmax of an empty mask)",
      "lambda is 0.07 as in the code; README and paper say 0.1 (lambda=0.1)",
      "after a compaction slots are in score order and the pool's neighbours are slots, as in the code; "
      "order=position keeps time order instead",
      "the first prefill compacts only when it exceeds the budget; batches use every sequence's own keys "
      "(the code "
      "takes sample 0's)",
      "gqa reduces raw logits before the softmax"};
  info.parameters = {{"lambda", 0.07, 0, 1, "weight of importance against redundancy"},
                     {"window", 8, 1, 1024, "last queries that vote; their tokens are kept"},
                     {"kernel", 7, 1, 255, "width of the max pool, odd"},
                     {"order", 0, 0, 1, "slot order after a compaction", {"score", "position"}}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.gqa = GqaRule::max;
  info.rule.reclaim = Reclaim::compact_by_score;
  info.rule.ties = TieOrder::torch;
  info.signals = Signal::query_window | Signal::keys;
  info.score_parts = {"importance", "redundancy"};
  info.pairwise_similarity = true;
  info.alike_above = kSimilar;
  return info;
}

std::unique_ptr<Policy> make_rkv_zefan_cai(PolicyInfo info) {
  adopt_window(info, info.parameters[1].value);
  if (info.parameters[3].value != 0) info.rule.reclaim = Reclaim::compact;
  return std::make_unique<Rkv>(std::move(info));
}

}  // namespace kvlapse
