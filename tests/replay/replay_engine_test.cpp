#include "replay/replay_engine.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <mutex>

#include "core/base/vector_math.h"
#include "replay/summary.h"
#include "replay/synthetic_rows.h"

namespace kvlapse {
namespace {

using Victims = std::vector<std::tuple<int, int, int>>;  // step, kv head, position

std::vector<ReplayConfig> some_configs(std::initializer_list<const char*> specs,
                                       std::initializer_list<int> budgets) {
  std::vector<ReplayConfig> configs;
  for (const char* spec : specs)
    for (int budget : budgets) configs.push_back({make_policy(spec), budget});
  return configs;
}

std::map<std::pair<size_t, int>, Victims> victims_of(const RowSource& rows,
                                                     const std::vector<ReplayConfig>& configs,
                                                     ReplayOptions options) {
  std::map<std::pair<size_t, int>, Victims> victims;
  std::mutex mutex;
  ReplayEngine(rows, options).decide(0, configs, [&](size_t config, int layer, const EvictionPlan& plan) {
    const std::lock_guard lock(mutex);
    for (const Drop& drop : plan.drops)
      victims[{config, layer}].emplace_back(raw(plan.step), drop.kv_head, raw(drop.pos));
  });
  return victims;
}

// Metrics of one layer in double precision, from the definition, given the victims.
struct Naive {
  std::vector<double> recall, no_sinks, error, cosine, topk;  // per q head, mean over the generated steps
  std::vector<double> missed, existing;                       // per kv head: future missed mass
};

Naive naive_metrics(MemoryRows& rows, int layer, const Victims& victims) {
  const CacheGeometry& g = rows.geometry();
  const RowSequence sequence = rows.sequence(0);
  const int n = sequence.n_tokens, dim = g.head_dim;
  std::vector<std::vector<int>> gone(g.n_kv_heads, std::vector<int>(n, n));
  std::vector<std::vector<char>> decided(g.n_kv_heads, std::vector<char>(n));
  for (auto [step, head, pos] : victims)
    for (int h = 0; h < g.n_kv_heads; ++h)
      if (head == kWholeLayer || head == h) gone[h][pos] = step, decided[h][step] = 1;
  Naive out;
  out.missed.resize(g.n_kv_heads);
  out.existing.resize(g.n_kv_heads);
  for (int q = 0; q < g.n_q_heads; ++q) {
    const int h = g.kv_head_of(q);
    double recall = 0, no_sinks = 0, error = 0, cosine = 0, topk = 0;
    for (int t = sequence.n_prompt; t < n; ++t) {
      std::vector<double> alpha(t + 1);
      double most = -1e300, total = 0;
      for (int i = 0; i <= t; ++i) {
        for (int d = 0; d < dim; ++d)
          alpha[i] += static_cast<double>(rows.row(0, layer, RowKind::q, t)[q * dim + d]) *
                      rows.row(0, layer, RowKind::k, i)[h * dim + d];
        alpha[i] /= std::sqrt(dim);
        most = std::max(most, alpha[i]);
      }
      for (double& a : alpha) total += a = std::exp(a - most);
      std::vector<double> full(dim), held(dim);
      double mass = 0, mass_rest = 0, rest = 0;
      for (int i = 0; i <= t; ++i) {
        alpha[i] /= total;
        const bool in = gone[h][i] >= t;
        if (in) mass += alpha[i];
        if (i >= kSinkTokens) rest += alpha[i], mass_rest += in ? alpha[i] : 0;
        for (int d = 0; d < dim; ++d) {
          const double value = alpha[i] * rows.row(0, layer, RowKind::v, i)[h * dim + d];
          full[d] += value;
          if (in) held[d] += value;
        }
        for (int s = i; s < t; ++s)
          if (decided[h][s] && t <= s + kFutureHorizon) {
            out.existing[h] += alpha[i];
            if (gone[h][i] == s) out.missed[h] += alpha[i];
          }
      }
      double ff = 0, hh = 0, fh = 0, dd = 0;
      for (int d = 0; d < dim; ++d) {
        const double o = held[d] / mass;
        ff += full[d] * full[d], hh += o * o, fh += full[d] * o, dd += (o - full[d]) * (o - full[d]);
      }
      std::vector<int> order(t + 1);
      for (int i = 0; i <= t; ++i) order[i] = i;
      const int k = std::min(kTopK, t + 1);
      std::partial_sort(order.begin(), order.begin() + k, order.end(),
                        [&](int a, int b) { return alpha[a] > alpha[b]; });
      int top = 0;
      for (int i = 0; i < k; ++i) top += gone[h][order[i]] >= t;
      recall += mass, no_sinks += mass_rest / rest, error += std::sqrt(dd / ff),
          cosine += 1 - fh / std::sqrt(ff * hh);
      topk += static_cast<double>(top) / k;
    }
    const double steps = n - sequence.n_prompt;
    out.recall.push_back(recall / steps), out.no_sinks.push_back(no_sinks / steps),
        out.error.push_back(error / steps);
    out.cosine.push_back(cosine / steps), out.topk.push_back(topk / steps);
  }
  return out;
}

TEST(ReplayEngine, MetricsEqualTheirDefinitionInDoublePrecision) {
  MemoryRows rows = synthetic_rows({2, 4, 2, 24, 0, DType::f32}, 210, 37, 3);
  const auto configs =
      some_configs({"longflow", "longflow:granularity=kv_head", "streaming_llm", "random"}, {20, 60, 150});
  const auto victims = victims_of(rows, configs, {});
  const std::vector<SequenceMetrics> results = ReplayEngine(rows, {}).run(0, configs);
  for (size_t c = 0; c < configs.size(); ++c)
    for (int layer = 0; layer < 2; ++layer) {
      const Naive naive = naive_metrics(rows, layer, victims.at({c, layer}));
      for (int q = 0; q < 4; ++q) {
        const QHeadMetrics& m = results[c][layer].q_heads[q];
        const auto steps = static_cast<double>(m.steps);
        EXPECT_EQ(m.steps, 210 - 37);
        EXPECT_NEAR(m.recall / steps, naive.recall[q], 2e-6);
        EXPECT_NEAR(m.missing / steps, 1 - naive.recall[q], 2e-6);
        EXPECT_NEAR(m.recall_no_sinks / steps, naive.no_sinks[q], 5e-6);
        EXPECT_NEAR(m.output_error / steps, naive.error[q], 2e-5 * (1 + naive.error[q]));
        EXPECT_NEAR(m.cosine_error / steps, naive.cosine[q], 2e-5);
        EXPECT_NEAR(m.topk_recall / steps, naive.topk[q], 1e-9);
      }
      for (int h = 0; h < 2; ++h) {
        const KvHeadMetrics& m = results[c][layer].kv_heads[h];
        EXPECT_NEAR(m.future_missed, naive.missed[h], 1e-4 * (1 + naive.missed[h]));
        EXPECT_NEAR(m.future_mass, naive.existing[h], 1e-4 * (1 + naive.existing[h]));
      }
    }
}

TEST(ReplayEngine, FullKeepsEverything) {
  MemoryRows rows = synthetic_rows({2, 4, 2, 32, 0, DType::bf16}, 300, 20, 5);
  const auto results = ReplayEngine(rows, {}).run(0, some_configs({"full"}, {300}));
  SequenceResult sequence{results[0], 300, 20, 300};
  const auto values = summarise(rows.geometry(), make_policy("full")->info(), {&sequence});
  EXPECT_EQ(value_of(values, "recall_mean"), 1.0);
  EXPECT_EQ(value_of(values, "recall_p10"), 1.0);
  EXPECT_EQ(value_of(values, "topk_recall"), 1.0);
  EXPECT_LE(value_of(values, "output_error_mean"), 1e-6);
  EXPECT_EQ(value_of(values, "evictions"), 0);
  EXPECT_EQ(value_of(values, "retained_mean"), 1.0);
  EXPECT_EQ(value_of(values, "footprint_ratio"), 1.0);
  // 300 tokens, 2 layers, 2 kv heads, K and V of 32 bf16 values.
  EXPECT_EQ(value_of(values, "kv_bytes_peak"), 300.0 * 2 * 2 * 2 * 32 * 2);
  double tokens = 0;
  for (int t = 20; t < 300; ++t) tokens += t + 1;
  EXPECT_EQ(value_of(values, "kv_byte_steps"), tokens * 2 * 2 * 2 * 32 * 2);
}

TEST(ReplayEngine, BudgetIsKeptAndAllVictimsAreCounted) {
  MemoryRows rows = synthetic_rows({1, 4, 2, 16, 0, DType::f32}, 260, 50, 9);
  const auto configs = some_configs({"longflow", "streaming_llm", "random"}, {33, 64});
  const auto results = ReplayEngine(rows, {}).run(0, configs);
  for (size_t c = 0; c < configs.size(); ++c)
    for (const KvHeadMetrics& m : results[c][0].kv_heads) {
      EXPECT_EQ(m.held_peak, configs[c].budget);
      EXPECT_EQ(m.evictions, 260 - configs[c].budget + 1);  // one slot is free for the next token
    }
}

void expect_same(const SequenceMetrics& a, const SequenceMetrics& b) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t layer = 0; layer < a.size(); ++layer) {
    for (size_t q = 0; q < a[layer].q_heads.size(); ++q) {
      EXPECT_EQ(a[layer].q_heads[q].recall, b[layer].q_heads[q].recall);
      EXPECT_EQ(a[layer].q_heads[q].output_error, b[layer].q_heads[q].output_error);
      EXPECT_EQ(a[layer].q_heads[q].error_sketch.bytes(), b[layer].q_heads[q].error_sketch.bytes());
    }
    for (size_t h = 0; h < a[layer].kv_heads.size(); ++h) {
      EXPECT_EQ(a[layer].kv_heads[h].future_missed, b[layer].kv_heads[h].future_missed);
      EXPECT_EQ(a[layer].kv_heads[h].revived, b[layer].kv_heads[h].revived);
    }
    EXPECT_EQ(a[layer].held_by_step, b[layer].held_by_step);
  }
}

TEST(ReplayEngine, ResultsDependNeitherOnThreadsNorMemoryNorCompany) {
  MemoryRows rows = synthetic_rows({3, 4, 2, 16, 0, DType::f32}, 500, 45, 11);
  const auto configs = some_configs({"longflow", "random"}, {40, 120, 300});
  const auto reference = ReplayEngine(rows, {.threads = 1}).run(0, configs);
  const auto threads = ReplayEngine(rows, {.threads = 4}).run(0, configs);
  const auto little = ReplayEngine(rows, {.threads = 2, .memory_bytes = size_t{5} << 20}).run(0, configs);
  for (size_t c = 0; c < configs.size(); ++c) {
    expect_same(reference[c], threads[c]);
    expect_same(reference[c], little[c]);
    expect_same(reference[c], ReplayEngine(rows, {}).run(0, {configs[c]})[0]);
  }
  const auto middle = ReplayEngine(rows, {.layer_begin = 1, .layer_end = 2}).run(0, configs);
  expect_same({reference[0][1]}, middle[0]);
}

TEST(ReplayEngine, RefusesWhatItCannotDo) {
  MemoryRows rows = synthetic_rows({1, 2, 1, 16, 0, DType::f32}, 200, 20, 1);
  EXPECT_THROW(ReplayEngine(rows, {.layer_begin = 0, .layer_end = 2}), Error);
  EXPECT_THROW(ReplayEngine(rows, {.memory_bytes = 1000}).run(0, some_configs({"longflow"}, {50})), Error);
  EXPECT_THROW(ReplayEngine(rows, {}).run(0, some_configs({"streaming_llm"}, {3})), Error);
  rows.row(0, 0, RowKind::k, 60)[3] = std::nanf("");
  EXPECT_THROW(ReplayEngine(rows, {}).run(0, some_configs({"longflow"}, {50})), Error);
}

// Held tokens whose exponentials underflow against the full maximum: the error stays that of their own
// softmax.
TEST(ReplayEngine, TinyRecallIsComputedAgainstItsOwnMaximum) {
  CacheGeometry g{1, 1, 1, 16, 0, DType::f32};
  MemoryRows rows = synthetic_rows(g, 80, 4, 2);
  for (int t = 0; t < 80; ++t)
    for (int d = 0; d < 16; ++d) {
      rows.row(0, 0, RowKind::q, t)[d] = 10;
      rows.row(0, 0, RowKind::k, t)[d] = t == 5 ? 5.0f : 0.01f * static_cast<float>(t % 7);
    }
  const auto results = ReplayEngine(rows, {}).run(0, some_configs({"streaming_llm:sinks=1"}, {20}));
  const QHeadMetrics& m = results[0][0].q_heads[0];
  EXPECT_TRUE(std::isfinite(m.output_error));
  EXPECT_GT(m.output_error, 0);
}

}  // namespace
}  // namespace kvlapse
