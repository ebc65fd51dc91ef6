// Positions inside the cache: by hand, and against StreamingLLM as the paper writes it (keys without
// rotation, numbered 0, 1, 2 .. in the cache).
#include "core/engine/moved_keys.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/tensor_memory.h"
#include "core/policy/spec.h"

namespace kvlapse {
namespace {

using testing::FloatNear;
using testing::Pointwise;

constexpr double kTheta = 10000;

std::vector<float> random_rows(int n, uint64_t seed) {
  std::vector<float> rows(n);
  for (int i = 0; i < n; ++i) rows[i] = 3 * (unit_float(counter_random({seed, uint64_t(i)})) - 0.5f);
  return rows;
}

// The half-split rotation by `position`.
std::vector<double> rotated(const float* row, int dim, double position) {
  std::vector<double> out(dim);
  for (int j = 0; j < dim / 2; ++j) {
    const double angle = position * std::pow(kTheta, -2.0 * j / dim), c = std::cos(angle),
                 s = std::sin(angle);
    out[j] = c * row[j] - s * row[j + dim / 2];
    out[j + dim / 2] = c * row[j + dim / 2] + s * row[j];
  }
  return out;
}

// One head of one pair, which turns by a radian a position: one sink, three slots, so that token 1 goes after
// token 2, token 2 after 3. The sink's key (1, 0) then stands 1, and 2, positions later.
TEST(MovedKeys, ASinkFollowsTheWindow) {
  const CacheGeometry g{1, 1, 1, 2, 3, DType::f32};
  std::vector<float> q(2 * 5, 0.0f), k(2 * 5, 0.0f), v(2 * 5, 1.0f);
  k[0] = 1;
  TensorMemory memory(g, q, k, v);
  const auto policy = make_policy("streaming_llm:sinks=1:positions=cache");
  CacheSite site(g, 0, *policy, 3, 1, memory, {.rope_theta = kTheta});
  site.append_prompt(Pos{0}, memory.rows(Pos{0}));
  ASSERT_EQ(site.finish_prompt(), nullptr);
  ASSERT_EQ(site.step(Pos{1}, memory.rows(Pos{1})), nullptr);
  for (int t = 2; t < 5; ++t) {
    site.append(Pos{t}, memory.rows(Pos{t}));
    memory.attend(site.table(), Pos{t});
    const double shift = t - 2;
    EXPECT_THAT(memory.keys(0).first(2), Pointwise(FloatNear(1e-6f), {static_cast<float>(std::cos(shift)),
                                                                      static_cast<float>(std::sin(shift))}));
    const EvictionPlan* plan = site.finish(Pos{t});
    ASSERT_NE(plan, nullptr);
    EXPECT_EQ(plan->drops.at(0).pos, Pos{t - 1});
  }
}

struct Case {
  const char* policy;
  int n_prompt, budget;
};

class CachePositions : public testing::TestWithParam<Case> {};

TEST_P(CachePositions, AttendAsIfTheCacheWereNumberedFromZero) {
  constexpr int kHeads = 2, kGroup = 2, kDim = 8, kTokens = 90;
  const CacheGeometry g{1, kHeads * kGroup, kHeads, kDim, kTokens, DType::f32};
  const std::vector<float> q = random_rows(kTokens * kHeads * kGroup * kDim, 1),
                           k = random_rows(kTokens * kHeads * kDim, 2),
                           v = random_rows(kTokens * kHeads * kDim, 3);
  const auto policy = make_policy(GetParam().policy);
  TensorMemory memory(g, q, k, v);
  CacheSite site(g, 0, *policy, GetParam().budget, GetParam().n_prompt, memory, {.rope_theta = kTheta});
  for (int t = 0; t < GetParam().n_prompt; ++t) site.append_prompt(Pos{t}, memory.rows(Pos{t}));
  site.finish_prompt();
  int n_evicted = 0;
  for (int t = GetParam().n_prompt; t < kTokens; ++t) {
    site.append(Pos{t}, memory.rows(Pos{t}));
    memory.attend(site.table(), Pos{t});
    for (int head = 0; head < g.n_q_heads; ++head) {
      const int h = g.kv_head_of(head);
      std::vector<int> held;
      for (Pos pos : site.table().positions(h)) held.push_back(raw(pos));
      std::sort(held.begin(), held.end());
      const float* query = &q[(t * g.n_q_heads + head) * kDim];
      // The query stands at the last index of the cache.
      const std::vector<double> plain = rotated(query, kDim, -t + static_cast<double>(held.size()) - 1);
      double total = 0;
      std::vector<double> output(kDim);
      for (size_t i = 0; i < held.size(); ++i) {
        const std::vector<double> key =
            rotated(&k[(held[i] * kHeads + h) * kDim], kDim, static_cast<double>(i) - held[i]);
        double logit = 0;
        for (int d = 0; d < kDim; ++d) logit += plain[d] * key[d] / std::sqrt(kDim);
        total += std::exp(logit);
        for (int d = 0; d < kDim; ++d) output[d] += std::exp(logit) * v[(held[i] * kHeads + h) * kDim + d];
      }
      for (int d = 0; d < kDim; ++d)
        EXPECT_NEAR(memory.output(head)[d], output[d] / total, 1e-5) << "step " << t << " head " << head;
    }
    if (const EvictionPlan* plan = site.finish(Pos{t})) n_evicted += static_cast<int>(plan->drops.size());
  }
  EXPECT_GT(n_evicted, 20);
}

INSTANTIATE_TEST_SUITE_P(
    StreamingLlm, CachePositions,
    testing::Values(Case{"streaming_llm:positions=cache", 6, 20},
                    Case{"streaming_llm:positions=cache:pin_prompt=1", 9, 24},  // prompt and sinks move
                    Case{"streaming_llm:positions=cache", 40, 16},              // the prompt itself is cut
                    Case{"streaming_llm@kvpress:positions=cache:cadence=8", 6, 20}  // compacted
                    ));

TEST(CachePositions, NeedTheRopeBase) {
  const CacheGeometry g{1, 1, 1, 2, 8, DType::f32};
  std::vector<float> rows(16);
  TensorMemory memory(g, rows, rows, rows);
  const auto policy = make_policy("streaming_llm:sinks=1:positions=cache");
  EXPECT_THROW(CacheSite(g, 0, *policy, 4, 1, memory), Error);
}

}  // namespace
}  // namespace kvlapse
