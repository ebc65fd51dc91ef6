#include <cmath>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

constexpr float kNormEpsilon = 1e-12f, kCosineEpsilon = 1e-8f;  // torch's normalize and cosine_similarity

class KeyDiff final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const size_t d = at.geometry.head_dim;
    std::vector<float> scores, norms, anchor(d);
    std::vector<double> total(d);
    for (int r = 0; r < out.n_rows(); ++r)
      reduce_heads(kv_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int h) {
        std::span<const float> keys = inputs.keys(h);
        const size_t n = keys.size() / d;
        norms.resize(n);
        scores.resize(n);
        std::fill(total.begin(), total.end(), 0.0);
        for (size_t i = 0; i < n; ++i) {
          norms[i] = std::sqrt(dot(&keys[i * d], &keys[i * d], d));
          for (size_t j = 0; j < d; ++j) total[j] += keys[i * d + j] / std::max(norms[i], kNormEpsilon);
        }
        for (size_t j = 0; j < d; ++j) anchor[j] = static_cast<float>(total[j] / static_cast<double>(n));
        const float length = std::sqrt(dot(anchor.data(), anchor.data(), d));
        for (size_t i = 0; i < n; ++i)
          scores[i] = -dot(&keys[i * d], anchor.data(), d) /
                      (std::max(norms[i], kCosineEpsilon) * std::max(length, kCosineEpsilon));
        return std::span<const float>(scores);
      });
  }
};

}  // namespace

PolicyInfo keydiff_info() {
  PolicyInfo info;
  info.name = "keydiff";
  info.reference = "kvpress";
  info.summary = "keeps keys unlike the mean key, compacted every 128 tokens";
  info.formula = "score(i) = -cos(k_i, mean_j k_j / |k_j|)";
  info.paper = "arXiv 2504.15364";
  info.source = "NVIDIA/kvpress 0.5.5, presses/keydiff_press.py";
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.signals = static_cast<SignalSet>(Signal::keys);
  return info;
}

std::unique_ptr<Policy> make_keydiff(PolicyInfo info) {
  return std::make_unique<KeyDiff>(std::move(info));
}

}  // namespace kvlapse
