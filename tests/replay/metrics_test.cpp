// Every metric of a replay from its definition, in double precision, over the victims that the replay chose.
#include "replay/metrics.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>
#include <set>

#include "replay/comparison.h"
#include "replay/replay_engine.h"
#include "replay/summary.h"
#include "replay/synthetic_rows.h"

namespace kvlapse {
namespace {

constexpr double kTheta = 10000;

// Rows whose RoPE base is known.
class Rotary final : public RowSource {
 public:
  explicit Rotary(MemoryRows rows) : rows_(std::move(rows)) {}
  MemoryRows& memory() { return rows_; }
  const CacheGeometry& geometry() const override { return rows_.geometry(); }
  int layer_begin() const override { return 0; }
  int layer_end() const override { return rows_.layer_end(); }
  int n_sequences() const override { return rows_.n_sequences(); }
  RowSequence sequence(int s) const override { return rows_.sequence(s); }
  double rope_theta() const override { return kTheta; }
  void rows(int s, int layer, RowKind kind, int first, int n, float* out) const override {
    rows_.rows(s, layer, kind, first, n, out);
  }

 private:
  MemoryRows rows_;
};

struct Victim {
  int step, pos;
  bool prompt_cut;
};

// What one configuration held, and what attention was, step by step.
class Definition {
 public:
  Definition(Rotary& rows, const std::string& spec, int budget, ReplayOptions options = {})
      : rows_(rows), g_(rows.geometry()), sequence_(rows.sequence(0)), policy_(make_policy(spec)) {
    victims_.resize(static_cast<size_t>(g_.n_kv_heads));
    last_.assign(static_cast<size_t>(g_.n_kv_heads), std::vector<int>(sequence_.n_tokens, INT32_MAX));
    ReplayEngine(rows, options)
        .decide(0, {{policy_, budget}}, [&](size_t, int layer, const EvictionPlan& plan) {
          if (layer != 0) return;
          for (const Drop& drop : plan.drops)
            for (int h = 0; h < g_.n_kv_heads; ++h) {
              if (drop.kv_head != kWholeLayer && drop.kv_head != h) continue;
              victims_[h].push_back(
                  {raw(plan.step), raw(drop.pos), plan.reason == EvictionReason::prompt_over_budget});
              last_[h][raw(drop.pos)] = raw(plan.step);
            }
        });
  }

  bool held(int h, int pos, int step) const { return pos <= step && last_[h][pos] >= step; }
  std::vector<int> held(int h, int step) const {
    std::vector<int> positions;
    for (int i = 0; i <= step; ++i)
      if (held(h, i, step)) positions.push_back(i);
    return positions;
  }
  const std::vector<Victim>& victims(int h) const { return victims_[h]; }
  const Policy& policy() const { return *policy_; }
  double value(int h, int pos, int d) const {
    return rows_.memory().row(0, 0, RowKind::v, pos)[h * g_.head_dim + d];
  }

  // Full attention.
  const std::vector<double>& alpha(int q, int step) const {
    std::vector<double>& known = alpha_[{q, step}];
    if (!known.empty()) return known;
    std::vector<double> logits;
    for (int i = 0; i <= step; ++i) logits.push_back(logit(q, step, i, 0));
    return known = softmax(logits);
  }
  // The cache's own attention, 0 for what it lost. With positions inside the cache the newest token keeps its
  // place and each key moves by the number of younger tokens that are gone.
  std::vector<double> beta(int q, int step) const {
    const int h = g_.kv_head_of(q);
    std::vector<double> logits(static_cast<size_t>(step) + 1, -INFINITY);
    int gone = 0;
    for (int i = step; i >= 0; --i)
      if (held(h, i, step))
        logits[i] = logit(q, step, i, policy_->info().cache_positions ? gone : 0);
      else
        ++gone;
    return softmax(logits);
  }
  std::vector<double> output(const std::vector<double>& weights, int h) const {
    std::vector<double> out(g_.head_dim);
    for (size_t i = 0; i < weights.size(); ++i)
      for (int d = 0; d < g_.head_dim; ++d) out[d] += weights[i] * value(h, static_cast<int>(i), d);
    return out;
  }

 private:
  double logit(int q, int step, int pos, int shift) const {
    const float* query = rows_.memory().row(0, 0, RowKind::q, step) + q * g_.head_dim;
    const float* key = rows_.memory().row(0, 0, RowKind::k, pos) + g_.kv_head_of(q) * g_.head_dim;
    const int half = g_.head_dim / 2;
    double sum = 0;
    for (int j = 0; j < half; ++j) {
      const double angle = shift == 0 ? 0 : shift * std::pow(kTheta, -2.0 * j / g_.head_dim);
      const double c = std::cos(angle), s = std::sin(angle);
      sum += query[j] * (c * key[j] - s * key[j + half]) + query[j + half] * (c * key[j + half] + s * key[j]);
    }
    return sum / std::sqrt(g_.head_dim);
  }
  static std::vector<double> softmax(std::vector<double> logits) {
    const double most = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (double& l : logits) total += l = std::exp(l - most);
    for (double& l : logits) l /= total;
    return logits;
  }

  Rotary& rows_;
  CacheGeometry g_;
  RowSequence sequence_;
  std::shared_ptr<const Policy> policy_;
  std::vector<std::vector<Victim>> victims_;
  std::vector<std::vector<int>> last_;
  mutable std::map<std::pair<int, int>, std::vector<double>> alpha_;
};

double norm(const std::vector<double>& x) {
  double square = 0;
  for (double v : x) square += v * v;
  return std::sqrt(square);
}

std::vector<double> minus(const std::vector<double>& a, const std::vector<double>& b) {
  std::vector<double> out(a.size());
  for (size_t i = 0; i < a.size(); ++i) out[i] = a[i] - b[i];
  return out;
}

// What two distributions share.
double overlap(const std::vector<double>& a, const std::vector<double>& b, int from = 0) {
  double total_a = 0, total_b = 0, shared = 0;
  for (size_t i = static_cast<size_t>(from); i < a.size(); ++i) total_a += a[i], total_b += b[i];
  if (total_a == 0 || total_b == 0) return 0;
  for (size_t i = static_cast<size_t>(from); i < a.size(); ++i)
    shared += std::min(a[i] / total_a, b[i] / total_b);
  return shared;
}

Rotary some_rows(int n_tokens = 230, int n_prompt = 30, uint64_t seed = 21) {
  return Rotary(synthetic_rows({1, 4, 2, 16, 0, DType::f32}, n_tokens, n_prompt, seed));
}

LayerMetrics replayed(const Rotary& rows, const std::string& spec, int budget, ReplayOptions options = {}) {
  return std::move(ReplayEngine(rows, options).run(0, {{make_policy(spec), budget}})[0][0]);
}

// o~ - o = m / (1 - m) (o - v_E): the definition of the error and the identity, against each other and
// against the replay. With it: recall is what the two distributions share, and KL is -ln of it.
TEST(Metrics, OutputErrorIsTheIdentityOfWhatIsMissing) {
  Rotary rows = some_rows();
  for (const char* spec : {"longflow", "random", "streaming_llm"}) {
    const Definition d(rows, spec, 40);
    const LayerMetrics metrics = replayed(rows, spec, 40);
    for (int q = 0; q < 4; ++q) {
      const int h = q / 2;
      double errors = 0, recalls = 0;
      for (int t = 30; t < 230; ++t) {
        const std::vector<double> alpha = d.alpha(q, t), beta = d.beta(q, t);
        const std::vector<double> o = d.output(alpha, h), cut = d.output(beta, h);
        double missing = 0, divergence = 0;
        std::vector<double> lost(alpha.size());
        for (size_t i = 0; i < alpha.size(); ++i)
          if (!d.held(h, static_cast<int>(i), t)) missing += lost[i] = alpha[i];
        for (size_t i = 0; i < alpha.size(); ++i)
          if (beta[i] > 0) divergence += beta[i] * std::log(beta[i] / alpha[i]);
        EXPECT_NEAR(divergence, -std::log(1 - missing), 1e-12);
        EXPECT_NEAR(overlap(alpha, beta), 1 - missing, 1e-12);
        std::vector<double> by_identity(16);
        const std::vector<double> lost_output = d.output(lost, h);
        for (int k = 0; k < 16; ++k)
          by_identity[k] = missing > 0 ? missing / (1 - missing) * (o[k] - lost_output[k] / missing) : 0;
        EXPECT_LE(norm(minus(minus(cut, o), by_identity)), 1e-12 * norm(o) / (1 - missing));
        errors += norm(minus(cut, o)) / norm(o);
        recalls += 1 - missing;
      }
      EXPECT_NEAR(metrics.q_heads[q].output_error / 200, errors / 200, 2e-5 * (1 + errors / 200)) << spec;
      EXPECT_NEAR(metrics.q_heads[q].recall / 200, recalls / 200, 2e-6) << spec;
    }
  }
}

// Positions inside the cache: error and recall are those of the rotated keys.
TEST(Metrics, MovedKeysCountAsTheyStand) {
  Rotary rows = some_rows();
  for (const char* spec : {"streaming_llm:positions=cache", "streaming_llm:positions=cache:pin_prompt=1",
                           "streaming_llm@zefan-cai:positions=cache:cadence=16"}) {
    const Definition d(rows, spec, 50);
    const LayerMetrics metrics = replayed(rows, spec, 50);
    bool differs = false;
    for (int q = 0; q < 4; ++q) {
      const int h = q / 2;
      double errors = 0, recalls = 0, no_sinks = 0, cosines = 0;
      for (int t = 30; t < 230; ++t) {
        const std::vector<double> alpha = d.alpha(q, t), beta = d.beta(q, t);
        const std::vector<double> o = d.output(alpha, h), cut = d.output(beta, h);
        double dot = 0;
        for (int k = 0; k < 16; ++k) dot += o[k] * cut[k];
        errors += norm(minus(cut, o)) / norm(o);
        cosines += 1 - dot / norm(o) / norm(cut);
        recalls += overlap(alpha, beta);
        no_sinks += overlap(alpha, beta, kSinkTokens);
        double mass = 0;
        for (int i = 0; i <= t; ++i) mass += d.held(h, i, t) ? alpha[i] : 0;
        differs |= std::abs(mass - overlap(alpha, beta)) > 1e-3;
      }
      const QHeadMetrics& m = metrics.q_heads[q];
      EXPECT_NEAR(m.output_error / 200, errors / 200, 3e-5 * (1 + errors / 200)) << spec;
      EXPECT_NEAR(m.cosine_error / 200, cosines / 200, 3e-5) << spec;
      EXPECT_NEAR(m.recall / 200, recalls / 200, 5e-6) << spec;
      EXPECT_NEAR(m.recall_no_sinks / 200, no_sinks / 200, 1e-5) << spec;
    }
    EXPECT_TRUE(differs) << spec << ": the rotation must matter here";
  }
}

// A moved key that then outweighs everything else by far.
TEST(Metrics, AMovedKeyFarAboveTheRow) {
  Rotary rows(synthetic_rows({1, 1, 1, 2, 0, DType::f32}, 60, 4, 2));
  for (int t = 0; t < 60; ++t)
    for (int d = 0; d < 2; ++d) {
      rows.memory().row(0, 0, RowKind::q, t)[d] = d == 1 ? 30.0f : 0.0f;
      rows.memory().row(0, 0, RowKind::k, t)[d] =
          t == 0 && d == 0 ? 30.0f : 0.01f * static_cast<float>(t % 5);
    }
  const char* spec = "streaming_llm:sinks=1:positions=cache";
  const Definition d(rows, spec, 12);
  const QHeadMetrics m = replayed(rows, spec, 12).q_heads[0];
  double errors = 0, recalls = 0;
  for (int t = 4; t < 60; ++t) {
    const std::vector<double> alpha = d.alpha(0, t), beta = d.beta(0, t), o = d.output(alpha, 0);
    errors += norm(minus(d.output(beta, 0), o)) / norm(o);
    recalls += overlap(alpha, beta);
  }
  EXPECT_NEAR(m.output_error / 56, errors / 56, 1e-4 * (1 + errors / 56));
  EXPECT_NEAR(m.recall / 56, recalls / 56, 1e-5);
}

TEST(Metrics, QuantilesAndTheShareOfLowRecall) {
  Rotary rows = some_rows();
  const Definition d(rows, "longflow", 60);
  SequenceResult result{{replayed(rows, "longflow", 60)}, 230, 30, 60};
  std::vector<double> recalls, rests;
  double missing = 0;
  for (int q = 0; q < 4; ++q)
    for (int t = 30; t < 230; ++t) {
      const std::vector<double> alpha = d.alpha(q, t), beta = d.beta(q, t);
      recalls.push_back(overlap(alpha, beta));
      rests.push_back(overlap(alpha, beta, kSinkTokens));
      missing += 1 - recalls.back();
    }
  std::sort(recalls.begin(), recalls.end());
  std::sort(rests.begin(), rests.end());
  const auto values = summarise(rows.geometry(), d.policy().info(), {&result});
  // A sketch gives the middle of a bin of 1 - recall that is 1/32 wide.
  auto at = [](const std::vector<double>& sorted, double share) {
    return sorted[static_cast<size_t>(share * static_cast<double>(sorted.size() - 1))];
  };
  EXPECT_NEAR(value_of(values, "recall_p10"), at(recalls, 0.1), 0.03 * (1 - at(recalls, 0.1)));
  EXPECT_NEAR(value_of(values, "recall_p50"), at(recalls, 0.5), 0.03 * (1 - at(recalls, 0.5)));
  EXPECT_NEAR(value_of(values, "recall_no_sinks_p10"), at(rests, 0.1), 0.03 * (1 - at(rests, 0.1)));
  EXPECT_NEAR(value_of(values, "missing_mass"), missing, 1e-3);
  const auto low = std::count_if(recalls.begin(), recalls.end(), [](double r) { return r < 0.9; });
  EXPECT_GT(low, 0);
  EXPECT_DOUBLE_EQ(value_of(values, "recall_below_90"), static_cast<double>(low) / 800);
}

// What is held: churn, lifetimes by class, survival of the prompt, revival, occupancy.
TEST(Metrics, WhatHappensToTokens) {
  Rotary rows = some_rows();
  for (const auto& [spec, budget] : {std::pair{"longflow", 90}, {"random", 40}, {"streaming_llm", 20}}) {
    const Definition d(rows, spec, budget);
    const LayerMetrics metrics = replayed(rows, spec, budget);
    for (int h = 0; h < 2; ++h) {
      const KvHeadMetrics& m = metrics.kv_heads[h];
      double churn = 0, retained = 0;
      int64_t held_sum = 0;
      int peak = 0;
      for (int t = 30; t < 230; ++t) {
        const std::vector<int> now = d.held(h, t);
        held_sum += static_cast<int64_t>(now.size());
        peak = std::max(peak, static_cast<int>(now.size()));
        retained += static_cast<double>(now.size()) / (t + 1);
        if (t == 30) continue;
        const std::vector<int> before = d.held(h, t - 1);
        std::set<int> either(before.begin(), before.end());
        either.insert(now.begin(), now.end());
        const double both = static_cast<double>(before.size() + now.size() - either.size());
        churn += 1 - both / static_cast<double>(either.size());
      }
      EXPECT_NEAR(m.churn, churn, 1e-9) << spec;
      EXPECT_NEAR(m.retained, retained, 1e-9) << spec;
      EXPECT_EQ(m.held_sum, held_sum) << spec;
      EXPECT_EQ(m.held_peak, peak) << spec;

      std::map<TokenClass, std::pair<int64_t, int64_t>> classes;  // evictions, sum of ages
      int64_t prompt_evictions = 0, revived = 0;
      std::set<int> gone;
      for (const Victim& v : d.victims(h)) {
        const TokenClass c = v.pos < 4             ? TokenClass::sink
                             : v.pos < 30          ? TokenClass::prompt
                             : v.step - v.pos < 64 ? TokenClass::recent
                                                   : TokenClass::think;
        ++classes[c].first;
        classes[c].second += v.step - v.pos;
        prompt_evictions += v.prompt_cut;
        gone.insert(v.pos);
        bool hot = false;
        for (int q = 2 * h; q < 2 * h + 2; ++q)
          for (int t = std::max(30, v.step + 1); t < 230; ++t) hot |= d.alpha(q, t)[v.pos] > 0.01;
        revived += hot;
      }
      EXPECT_EQ(m.evictions, static_cast<int64_t>(d.victims(h).size())) << spec;
      EXPECT_EQ(m.prompt_evictions, prompt_evictions) << spec;
      for (int c = 0; c < kTokenClasses; ++c) {
        EXPECT_EQ(m.evicted_by_class[c], classes[static_cast<TokenClass>(c)].first) << spec;
        EXPECT_EQ(m.lifetime_by_class[c], classes[static_cast<TokenClass>(c)].second) << spec;
      }
      EXPECT_EQ(m.revived, revived) << spec;
      EXPECT_EQ(m.prompt_tokens, 30);
      EXPECT_EQ(m.prompt_kept, 30 - std::count_if(gone.begin(), gone.end(), [](int p) { return p < 30; }));
    }
  }
}

TEST(Metrics, WhatTheRecordingItselfIs) {
  Rotary rows = some_rows();
  const Definition d(rows, "full", 1);
  const LayerMetrics metrics = replayed(rows, "full", 1);
  for (int q = 0; q < 4; ++q) {
    double entropy = 0, cosine = 0;
    for (int t = 30; t < 230; ++t) {
      for (double a : d.alpha(q, t))
        if (a > 0) entropy -= a * std::log(a);
      const float *x = rows.memory().row(0, 0, RowKind::q, t) + q * 16,
                  *y = rows.memory().row(0, 0, RowKind::q, t - 1) + q * 16;
      double xy = 0, xx = 0, yy = 0;
      for (int k = 0; k < 16; ++k) xy += x[k] * y[k], xx += x[k] * x[k], yy += y[k] * y[k];
      cosine += xy / std::sqrt(xx * yy);
    }
    EXPECT_NEAR(metrics.q_heads[q].entropy / 200, entropy / 200, 1e-5);
    EXPECT_NEAR(metrics.q_heads[q].query_cosine / 200, cosine / 200, 1e-5);
  }
}

TEST(Metrics, SeriesAreMeansOverTheirSteps) {
  Rotary rows = some_rows(600, 30, 5);
  const Definition d(rows, "longflow", 50);
  const LayerMetrics metrics = replayed(rows, "longflow", 50);
  for (int q : {0, 3}) {
    std::vector<double> sums(kSeriesBins), counts(kSeriesBins);
    for (int t = 30; t < 600; ++t) {
      sums[t * kSeriesBins / 600] += overlap(d.alpha(q, t), d.beta(q, t));
      counts[t * kSeriesBins / 600] += 1;
    }
    for (int b = 0; b < kSeriesBins; ++b) {
      const float value = metrics.series[static_cast<size_t>(q) * kSeriesBins + b];  // recall comes first
      if (counts[b] == 0)
        EXPECT_TRUE(std::isnan(value)) << b;
      else
        EXPECT_NEAR(value, sums[b] / counts[b], 1e-5) << b;
    }
  }
}

// Rank correlation of a policy's score with what the output would really lose: tokens left out one by one.
TEST(Metrics, ScoresAgainstTheExactLeaveOneOutError) {
  Rotary rows = some_rows(300, 30, 8);
  const Definition d(rows, "longflow", 60);
  const ProbeMetrics probe = replayed(rows, "longflow", 60).probe;
  ASSERT_EQ(probe.correlations, 1);  // one shared row, step 256
  const int t = 256;
  std::vector<float> scores, errors;
  for (int pos : d.held(0, t)) {
    double score = 0, error = 0;
    for (int q = 0; q < 4; ++q) {
      const int h = q / 2;
      const std::vector<double> beta = d.beta(q, t), o = d.output(beta, h);
      std::vector<double> without = beta;
      without[pos] = 0;
      for (double& b : without) b /= 1 - beta[pos];
      error += norm(minus(d.output(without, h), o));
      for (int k = 0; k < 16; ++k) score += beta[pos] * std::abs(d.value(h, pos, k));
    }
    scores.push_back(static_cast<float>(score));
    errors.push_back(static_cast<float>(error));
  }
  EXPECT_NEAR(probe.correlation, spearman(scores, errors), 2e-3);
  EXPECT_GT(probe.correlation, 0.5);
  EXPECT_EQ(probe.victims, 1);
}

// Part of the heads and steps: the same victims, and the metrics of that part alone.
TEST(Metrics, AScopeMeasuresItsPartOnly) {
  Rotary rows = some_rows();
  for (const char* spec : {"longflow", "random", "streaming_llm:positions=cache"}) {
    const Definition d(rows, spec, 40);
    ReplayOptions options;
    options.head_begin = 1, options.head_end = 2, options.step_begin = 97, options.step_end = 150;
    const LayerMetrics part = replayed(rows, spec, 40, options);
    EXPECT_EQ(part.q_heads[0].steps, 0);
    EXPECT_EQ(part.kv_heads[0].evictions, 0);
    for (int q = 2; q < 4; ++q) {
      double recall = 0;
      for (int t = 97; t < 150; ++t) recall += overlap(d.alpha(q, t), d.beta(q, t));
      EXPECT_EQ(part.q_heads[q].steps, 53);
      EXPECT_NEAR(part.q_heads[q].recall / 53, recall / 53, 5e-6) << spec;
    }
    const KvHeadMetrics& m = part.kv_heads[1];
    int64_t evictions = 0;
    double churn = 0;
    for (const Victim& v : d.victims(1)) evictions += v.step >= 97 && v.step < 150;
    for (int t = 97; t < 150; ++t) {
      const std::vector<int> now = d.held(1, t), before = d.held(1, t - 1);
      std::set<int> either(before.begin(), before.end());
      either.insert(now.begin(), now.end());
      churn += 1 - static_cast<double>(before.size() + now.size() - either.size()) /
                       static_cast<double>(either.size());
    }
    EXPECT_EQ(m.evictions, evictions);
    EXPECT_NEAR(m.churn, churn, 1e-9);
    EXPECT_EQ(m.steps, 53);
    for (int t = 0; t < 230; ++t)
      EXPECT_EQ(part.held_by_step[t], t >= 97 && t < 150 ? static_cast<int>(d.held(1, t).size()) : 0);
    SequenceResult result{{part}, 230, 30, 40};
    const auto values = summarise(rows.geometry(), d.policy().info(), {&result});
    EXPECT_EQ(value_of(values, "kv_bytes_peak"),
              40.0 * 2 * 16 * 4);  // one kv head: K and V of 16 fp32 values
    double full = 0;
    for (int t = 97; t < 150; ++t) full += t + 1;
    EXPECT_NEAR(value_of(values, "footprint_ratio"), 40 * 53 / full, 1e-9);
    const auto heads = summarise_heads(0, {&result});
    for (const HeadSummary& head : heads) EXPECT_GE(head.q_head, 2);
    EXPECT_EQ(heads.size(), 2u * 5);
  }
}

TEST(Metrics, AScopeOutsideTheRecordingIsRefused) {
  Rotary rows = some_rows();
  auto with = [&](int head_begin, int head_end, int step_begin, int step_end) {
    ReplayOptions options;
    options.head_begin = head_begin, options.head_end = head_end;
    options.step_begin = step_begin, options.step_end = step_end;
    ReplayEngine engine(rows, options);
  };
  with(0, 2, 0, 230);
  with(1, 2, 30, 31);
  EXPECT_THROW(with(0, 3, -1, -1), Error);
  EXPECT_THROW(with(1, 1, -1, -1), Error);
  EXPECT_THROW(with(-1, -1, 100, 231), Error);
  EXPECT_THROW(with(-1, -1, 5, 20), Error);  // the prompt alone
}

// Results made up so that every answer is known.
ResultCell made_up(const std::string& policy, int slots, const std::vector<double>& missing,
                   const std::vector<double>& errors) {
  ResultCell cell;
  cell.id = policy + std::to_string(slots);
  cell.trace = "t";
  cell.policy = policy;
  cell.budget = std::to_string(slots);
  cell.budget_slots = slots;
  for (size_t s = 0; s < errors.size(); ++s)
    cell.sequences.push_back({{"recall_mean", 1 - missing[s]}, {"output_error_mean", errors[s]}});
  return cell;
}

TEST(Comparison, RegretIsNoneForTheOracleAndOneForChance) {
  Results results;
  results.cells = {made_up("random:pin_prompt=1", 64, {0.3, 0.5}, {1, 1}),
                   made_up("oracle_mass", 64, {0.1, 0.1}, {1, 1}),
                   made_up("longflow@yisunlp", 64, {0.2, 0.2}, {1, 1}),
                   made_up("longflow@yisunlp", 128, {0.2, 0.2}, {1, 1})};
  std::map<std::string, double> regret;
  for (const ComparedRow& row : compare(results)) regret[row.policy + "/" + row.budget] = row.regret;
  EXPECT_DOUBLE_EQ(regret["oracle_mass/64"], 0);
  EXPECT_DOUBLE_EQ(regret["random:pin_prompt=1/64"], 1);
  EXPECT_NEAR(regret["longflow@yisunlp/64"], (0.2 - 0.1) / (0.4 - 0.1), 1e-12);
  EXPECT_TRUE(std::isnan(regret["longflow@yisunlp/128"]));  // nothing to compare with at that budget
}

// A difference that is the same in every sequence is real however far the sequences lie apart; one that
// changes its sign is noise.
TEST(Comparison, DifferencesArePairedAndNoiseIsMarked) {
  std::vector<double> base, better, mixed, none(12, 0.5);
  for (int i = 0; i < 12; ++i) {
    base.push_back(0.2 + 0.05 * i);
    better.push_back(base.back() - 0.01);
    mixed.push_back(better.back() + (i % 2 == 0 ? 0.02 : -0.0199));
  }
  Results results;
  results.cells = {made_up("a", 64, none, base), made_up("b", 64, none, better),
                   made_up("c", 64, none, mixed)};
  std::map<std::string, ComparedMetric> error;
  for (const ComparedRow& row : compare(results)) error[row.policy] = row.output_error;
  EXPECT_TRUE(error["b"].best);
  EXPECT_FALSE(error["a"].in_noise);
  EXPECT_TRUE(error["c"].in_noise);
  EXPECT_LT(error["b"].value.low, error["a"].value.mean);  // though the intervals of the means overlap
  EXPECT_GT(error["b"].value.high, error["a"].value.mean);
}

TEST(Choose, TakesTheSmallestBudgetWhoseUpperEndIsBelow) {
  // Twelve sequences: the mean is below 0.1 from 128 slots on, its 95 % upper end only from 256.
  auto around = [](double mean, double spread) {
    std::vector<double> errors;
    for (int i = 0; i < 12; ++i) errors.push_back(mean + spread * (i % 2 == 0 ? 1 : -1));
    return errors;
  };
  const std::vector<double> none(12, 0.5);
  Results results;
  results.cells = {made_up("a", 64, none, around(0.2, 0.01)), made_up("a", 128, none, around(0.099, 0.04)),
                   made_up("a", 256, none, around(0.05, 0.04)), made_up("b", 64, none, around(0.3, 0.01))};
  const std::vector<Choice> choices = choose_budgets(results, "output_error", 0.1, 0.95);
  ASSERT_EQ(choices.size(), 2u);
  EXPECT_EQ(choices[0].policy, "a");
  EXPECT_EQ(choices[0].budget, "256");
  EXPECT_EQ(choices[0].basis, "sequences");
  EXPECT_LT(choices[0].value.high, 0.1);
  EXPECT_EQ(choices[1].budget, "");  // b never
  // With less confidence the closer one suffices; recall asks for more, not less.
  EXPECT_EQ(choose_budgets(results, "output_error", 0.1, 0.5)[0].budget, "128");
  EXPECT_EQ(choose_budgets(results, "recall", 0.4, 0.95)[0].budget, "64");
  EXPECT_EQ(choose_budgets(results, "recall", 0.6, 0.95)[0].budget, "");
}

}  // namespace
}  // namespace kvlapse
