#include <cmath>
#include <vector>

#include "core/base/vector_math.h"
#include "core/policy/policies/policies.h"
#include "core/policy/scoring/reduce.h"

namespace kvlapse {
namespace {

// Half-split rotation: coordinate j turns with j + D/2 by position * theta^(-2j/D).
double angle(double theta, int j, int d, double position) {
  return position * std::exp(-std::log(theta) * (2.0 * j / d));
}

// Gaussian queries: mean and covariance of the last queries with their rotation undone, turned by the mean
// rotation of the coming positions; the expected exp(q.k) of each key follows in closed form.
class ExpectedAttention final : public Policy {
 public:
  using Policy::Policy;
  void score(const LayerContext& at, LayerInputs& inputs, const SlotState&, Scores& out) const override {
    const int d = at.geometry.head_dim, sinks = static_cast<int>(parameter("sinks"));
    const auto epsilon = static_cast<float>(parameter("epsilon"));
    Statistics stats(at, static_cast<int>(parameter("future")));
    std::vector<float> weights, product(d);
    for (int r = 0; r < out.n_rows(); ++r) {
      const int n = static_cast<int>(out.row(r).size()), first = std::min(sinks, n);
      std::span<float> row = out.row(r).subspan(first);
      weights.resize(row.size());
      reduce_heads(q_heads_of(at, out, r), at.rule.gqa, row, [&](int q) {
        std::span<const float> keys = inputs.keys(at.geometry.kv_head_of(q));
        stats.fit(at, inputs, q, info().query_window, sinks);
        for (size_t i = 0; i < row.size(); ++i) {
          const float* k = &keys[(first + i) * d];
          for (int a = 0; a < d; ++a) product[a] = dot(&stats.covariance[static_cast<size_t>(a) * d], k, d);
          weights[i] = dot(stats.mean.data(), k, d) / std::sqrt(static_cast<float>(d)) +
                       dot(product.data(), k, d) / static_cast<float>(d) / 2.0f;
        }
        softmax(weights, weights);
        return std::span<const float>(weights);
      });
      if (parameter("value_norm") == 0) continue;
      std::fill(weights.begin(), weights.end(), 0.0f);
      const HeadRange heads = kv_heads_of(at, out, r);
      for (int h = heads.begin; h < heads.end; ++h) {
        std::span<const float> values = inputs.values(h);
        for (size_t i = 0; i < row.size(); ++i)
          weights[i] += std::sqrt(dot(&values[(first + i) * d], &values[(first + i) * d], d)) /
                        static_cast<float>(heads.size());
      }
      for (size_t i = 0; i < row.size(); ++i) row[i] = (row[i] + epsilon) * weights[i];
    }
  }

 private:
  struct Statistics {
    std::vector<float> mean;        // [D]
    std::vector<float> covariance;  // [D, D]
    std::vector<double> cos, sin;   // [D/2], mean over the coming positions

    Statistics(const LayerContext& at, int future) : cos(at.geometry.head_dim / 2), sin(cos.size()) {
      const int d = at.geometry.head_dim;
      for (int j = 0; j < d / 2; ++j) {
        for (int f = 1; f <= future; ++f) {
          cos[j] += std::cos(angle(at.rope_theta, j, d, raw(at.step) + f));
          sin[j] += std::sin(angle(at.rope_theta, j, d, raw(at.step) + f));
        }
        cos[j] /= future;
        sin[j] /= future;
      }
    }

    // x <- R x with R the mean rotation.
    void turn(std::vector<double>& x) const {
      const size_t half = cos.size();
      for (size_t j = 0; j < half; ++j) {
        const double a = x[j], b = x[j + half];
        x[j] = cos[j] * a - sin[j] * b;
        x[j + half] = cos[j] * b + sin[j] * a;
      }
    }

    void fit(const LayerContext& at, LayerInputs& inputs, int q_head, int window, int sinks) {
      const int d = at.geometry.head_dim, half = d / 2, stride = at.geometry.n_q_heads * d;
      std::span<const float> queries = inputs.window_queries(window);
      const int rows = static_cast<int>(queries.size()) / stride, first = raw(at.step) + 1 - rows;
      std::vector<std::vector<double>> plain;  // queries without rotation
      for (int r = std::max(0, std::min(sinks - first, rows - 1)); r < rows; ++r) {
        const float* q = &queries[static_cast<size_t>(r) * stride + static_cast<size_t>(q_head) * d];
        std::vector<double> x(d);
        for (int j = 0; j < half; ++j) {
          const double phi = angle(at.rope_theta, j, d, first + r), c = std::cos(phi), s = std::sin(phi);
          x[j] = c * q[j] + s * q[j + half];
          x[j + half] = c * q[j + half] - s * q[j];
        }
        plain.push_back(std::move(x));
      }
      std::vector<double> mu(d, 0.0);
      for (const auto& x : plain)
        for (int j = 0; j < d; ++j) mu[j] += x[j] / static_cast<double>(plain.size());
      // R cov R^T is the covariance of the turned deviations.
      std::vector<double> cov(static_cast<size_t>(d) * d, 0.0);
      for (auto& x : plain) {
        for (int j = 0; j < d; ++j) x[j] -= mu[j];
        turn(x);
        for (int a = 0; a < d; ++a)
          for (int b = 0; b < d; ++b)
            cov[static_cast<size_t>(a) * d + b] += x[a] * x[b] / static_cast<double>(plain.size());
      }
      turn(mu);
      mean.assign(mu.begin(), mu.end());
      covariance.assign(cov.begin(), cov.end());
    }
  };
};

}  // namespace

PolicyInfo expected_attention_info() {
  PolicyInfo info;
  info.name = "expected_attention";
  info.reference = "kvpress";
  info.summary =
      "attention expected from Gaussian future queries, times the value's norm, compacted every 128 tokens";
  info.formula =
      "z = k.Rm / sqrt(D) + k'(R C R')k / (2 D), m and C mean and covariance of unrotated queries, R the "
      "mean rotation "
      "of the next `future` positions; score = (mean over the group of softmax(z) + epsilon) |v|_2";
  info.paper = "arXiv 2510.00636";
  info.source = "NVIDIA/kvpress 0.5.5, presses/expected_attention_press.py";
  info.deviations = {
      "statistics of the last `queries` queries (0: of all, which keeps every query); DecodingPress has "
      "those since the "
      "last compaction, the paper 128",
      "queries of the sink positions are left out, and the mean rotation starts at the next position: "
      "DecodingPress "
      "counts both from its buffer"};
  info.parameters = {{"queries", 128, 0, 65536, "queries behind mean and covariance; 0: all"},
                     {"future", 512, 1, 65536, "coming positions that are averaged"},
                     {"sinks", 4, 0, 4096, "first positions that are never evicted"},
                     {"epsilon", 0, 0, 1, "added before the value norm"},
                     {"value_norm", 1, 0, 1, "1: multiply by the value's norm"}};
  info.rule.cadence = 128;
  info.rule.headroom = 0;
  info.rule.reclaim = Reclaim::compact;
  info.rule.sinks = 4;
  info.signals = Signal::query_window | Signal::keys | Signal::values | Signal::rope;
  return info;
}

std::unique_ptr<Policy> make_expected_attention(PolicyInfo info) {
  const int queries = static_cast<int>(info.parameters[0].value);
  info.query_window = queries > 0 ? queries : kAllQueries;
  info.rule.sinks = static_cast<int>(info.parameters[2].value);
  return std::make_unique<ExpectedAttention>(std::move(info));
}

}  // namespace kvlapse
