#include <cmath>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

constexpr float kLeastRest = 1e-12f;       // of 1 - weight, so that a weight of 1 stays finite
constexpr float kLeastOthers = 0x1p-100f;  // weight of all others together; below it they count as nothing

// The error of leaving `token` out as w |o' - v|_2, o' the mean of the others by their weights; zero when
// they weigh nothing. The same number as w / (1 - w) |o - v|_2, which fp32 cannot tell when w is near 1: both
// differences cancel, and a token with all the weight would look worthless.
float error_without(size_t token, std::span<const float> weights, std::span<const float> values,
                    std::span<float> others) {
  const size_t d = others.size();
  std::fill(others.begin(), others.end(), 0.0f);
  float rest = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (i == token) continue;
    rest += weights[i];
    add_scaled(weights[i], values.subspan(i * d, d), others);
  }
  const float scale = rest > kLeastOthers ? 1 / rest : 0;
  for (size_t j = 0; j < d; ++j) others[j] = others[j] * scale - values[token * d + j];
  return weights[token] * std::sqrt(dot(others.data(), others.data(), d));
}

// The output's move when one token is left out, exactly: o' - o = w / (1 - w) (o - v). FastCAOTE puts the
// mean of the held values in the place of o.
class Caote final : public Policy {
 public:
  Caote(PolicyInfo info, bool exact) : Policy(std::move(info)), exact_(exact) {}

  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const size_t d = at.geometry.head_dim;
    thread_local std::vector<float> error, center, difference, distance;
    center.resize(d);
    difference.resize(d);
    for (int r = 0; r < out.n_rows(); ++r) {
      const size_t n = out.row(r).size();
      error.resize(n);
      distance.resize(n);
      int centered = -1;
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, out.row(r), [&](int q) {
        const int h = at.geometry.kv_head_of(q);
        std::span<const float> values = inputs.values(h);
        if (exact_ || centered != h) {
          if (exact_) {
            std::span<const float> output = inputs.output(q);
            center.assign(output.begin(), output.end());
          } else {
            std::fill(center.begin(), center.end(), 0.0f);
            for (size_t i = 0; i < n; ++i)
              add_scaled(1.0f / static_cast<float>(n), values.subspan(i * d, d), center);
          }
          for (size_t i = 0; i < n; ++i) {
            for (size_t j = 0; j < d; ++j) difference[j] = center[j] - values[i * d + j];
            distance[i] = std::sqrt(dot(difference.data(), difference.data(), d));
          }
          centered = h;
        }
        std::span<const float> weights = inputs.attention(q);
        for (size_t i = 0; i < n; ++i)
          error[i] = exact_ && weights[i] > 0.5f
                         ? error_without(i, weights, values, difference)
                         : weights[i] / std::max(1.0f - weights[i], kLeastRest) * distance[i];
        return std::span<const float>(error);
      });
    }
  }

 private:
  bool exact_;
};

}  // namespace

PolicyInfo caote_info() {
  PolicyInfo info;
  info.name = "caote";
  info.version = 2;
  info.summary = "the exact change of the current output when one token is left out";
  info.formula = "score(i) = w_i / (1 - w_i) |o - v_i|_2, mean over the group";
  info.paper = "arXiv 2504.14051";
  info.source = "the paper's formula";
  info.deviations = {"every step, per kv head; reads all values at each step"};
  info.signals = Signal::attention | Signal::output | Signal::values;
  return info;
}

std::unique_ptr<Policy> make_caote(PolicyInfo info) {
  if (info.rule.gqa == GqaRule::mean) info.fused = FusedScore::leave_one_out;
  return std::make_unique<Caote>(std::move(info), true);
}

PolicyInfo fastcaote_info() {
  PolicyInfo info;
  info.name = "fastcaote";
  info.summary = "CAOTE with the mean of the held values in place of the output";
  info.formula = "score(i) = w_i / (1 - w_i) |mean_j v_j - v_i|_2, mean over the group";
  info.paper = "arXiv 2504.14051";
  info.source = "the paper's formula";
  info.deviations = {"every step, per kv head; reads all values at each step"};
  info.signals = Signal::attention | Signal::values;
  return info;
}

std::unique_ptr<Policy> make_fastcaote(PolicyInfo info) {
  return std::make_unique<Caote>(std::move(info), false);
}

}  // namespace kvlapse
