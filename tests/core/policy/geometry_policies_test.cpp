// Hand-worked examples of policies that rank by keys and values.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::Pointwise;

TEST(Knorm, KeepsSmallNorms) {
  PolicyBench b("knorm:cadence=1", 1, 1, 2, 2);
  b.append(3);
  b.inputs.keys_of = {{3, 4, 0, 1, 2, 0}};
  EXPECT_THAT(b.score(), ElementsAre(-5, -1, -2));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(KeyDiff, KeepsKeysUnlikeTheMean) {
  PolicyBench b("keydiff:cadence=1", 1, 1, 2, 2);
  b.append(3);
  b.inputs.keys_of = {{2, 0, 3, 0, 0, 1}};  // unit keys (1,0) (1,0) (0,1): mean (2,1)/3
  const float r = std::sqrt(5.0f);
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {-2 / r, -2 / r, -1 / r}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(LagKv, RanksAPartitionAgainstTheNext) {
  PolicyBench b("lagkv:lag=2:sinks=0:cadence=1", 1, 1, 2, 3),
      raw("lagkv:lag=2:sinks=0:cross=1:cadence=1", 1, 1, 2, 3);
  for (PolicyBench* bench : {&b, &raw}) {
    bench->append(4);
    // The second partition spans [0, 1] in both coordinates. Slot 0 has no spread over D, slot 1 has.
    bench->inputs.keys_of = {{1, 1, 0, 2, 0, 0, 1, 1}};
    bench->inputs.values_of = bench->inputs.keys_of;
  }
  EXPECT_THAT(b.score(), ElementsAre(0, 0.5f, 1, 1));
  const float e = std::exp(std::sqrt(2.0f));  // std of (0, 2), unbiased
  EXPECT_THAT(raw.score(), Pointwise(FloatNear(1e-6f), {1 / (1 + e), e / (1 + e), 1.0f, 1.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(LagKv, AShortCacheKeepsSinksAndRecentTokens) {
  PolicyBench b("lagkv:lag=8:sinks=1:cadence=1", 1, 1, 1, 3);
  b.append(5);
  b.inputs.keys_of = b.inputs.values_of = {{1, 2, 3, 4, 5}};
  EXPECT_THAT(b.score(), ElementsAre(1, 0, 0.25f, 0.5f, 0.75f));
  EXPECT_THAT(b.dropped(), ElementsAre(1, 2));
}

TEST(ExpectedAttention, FollowsTheMeanQuery) {
  PolicyBench b("expected_attention:queries=2:future=1:sinks=0:value_norm=0:cadence=1", 1, 1, 2, 2);
  b.append(3);
  // Two equal unrotated queries (2, 0): no covariance; the mean turned to position 3 is 2 (cos 3, sin 3).
  b.inputs.queries = {2 * std::cos(1.0f), 2 * std::sin(1.0f), 2 * std::cos(2.0f), 2 * std::sin(2.0f)};
  b.inputs.keys_of = {{std::cos(3.0f), std::sin(3.0f), 0, 0, -std::cos(3.0f), -std::sin(3.0f)}};
  const float z = std::sqrt(2.0f), total = std::exp(z) + 1 + std::exp(-z);
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-5f), {std::exp(z) / total, 1 / total, std::exp(-z) / total}));
  EXPECT_THAT(b.dropped(), ElementsAre(2));
}

TEST(AdaKv, OneRankingOverHeadsAboveTheFloor) {
  // Head 0 has the smaller norms: it keeps 3 of 4, head 1 its floor of 1.
  PolicyBench b("adakv:base=knorm:floor=0.5:cadence=1", 2, 2, 1, 2);
  b.append(4);
  b.inputs.keys_of = {{1, 2, 3, 9}, {8, 7, 6, 5}};
  const EvictionPlan* plan = b.evictor.decide(*b.policy, b.at, b.inputs, b.state, false);
  ASSERT_NE(plan, nullptr);
  EXPECT_THAT(plan->keep.at(0), ElementsAre(Slot{0}, Slot{1}, Slot{2}));
  EXPECT_THAT(plan->keep.at(1), ElementsAre(Slot{3}));
}

TEST(AdaKv, TakesTheBasesParameters) {
  auto policy = make_policy("adakv:base=snapkv@kvpress:window=16:floor=0.3");
  EXPECT_EQ(policy->info().query_window, 16);
  EXPECT_EQ(canonical_spec(*policy), "adakv:base=snapkv@kvpress:floor=0.3:window=16");
  EXPECT_EQ(canonical_spec(*make_policy(canonical_spec(*policy))), canonical_spec(*policy));
  EXPECT_THROW(make_policy("adakv:base=knorm:window=16"), UsageError);
  EXPECT_THROW(make_policy("adakv:base=nonsense"), UsageError);
}

}  // namespace
}  // namespace kvlapse
