// Hand-worked examples of policies that rank by position, by the last queries or by chance.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::IsEmpty;
using testing::Pointwise;

TEST(Window, DropsTheOldest) {
  PolicyBench b("window", 1, 1, 1, 4);
  b.append(3);
  EXPECT_THAT(b.dropped(), IsEmpty());
  b.append();
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(StreamingLlm, DropsTheOldestBehindTheSinks) {
  PolicyBench b("streaming_llm:sinks=2", 1, 1, 1, 5);
  b.append(5);
  EXPECT_THAT(b.dropped(), ElementsAre(2));
  PolicyBench periodic("streaming_llm@zefan-cai:sinks=1:cadence=4", 1, 1, 1, 3);
  periodic.append(7);
  EXPECT_THAT(periodic.dropped(), IsEmpty());
  periodic.append();
  EXPECT_THAT(periodic.dropped(), ElementsAre(1, 2, 3, 4, 5));
}

TEST(Random, DrawsBySeedHeadStepAndPosition) {
  PolicyBench a("random:seed=1", 2, 2, 1, 8), same("random:seed=1", 2, 2, 1, 8),
      other("random:seed=2", 2, 2, 1, 8);
  for (PolicyBench* b : {&a, &same, &other}) b->append(6);
  EXPECT_EQ(a.score(0), same.score(0));
  EXPECT_NE(a.score(0), a.score(1));
  EXPECT_NE(a.score(0), other.score(0));
  PolicyBench pinned("random:pin_prompt=1", 1, 1, 1, 6, /*n_prompt=*/4);
  pinned.append(6);
  EXPECT_GE(pinned.dropped().at(0), 4);
}

TEST(SnapKv, PoolsTheVotesOfTheWindow) {
  // One query over 4 older slots and its own; softmax of the older ones alone is (1, 1, 4, 2) / 8.
  PolicyBench b("snapkv:window=1:kernel=3:cadence=1", 1, 1, 1, 4);
  b.append(5);
  b.inputs.window_of = {{0, 0, std::log(4.0f), std::log(2.0f), 9}};
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.125f, 0.5f, 0.5f, 0.5f, 0.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(SnapKv, TakesTheMaximumOfRawLogitsOverTheGroup) {
  PolicyBench b("snapkv:window=1:kernel=1:cadence=1", 2, 1, 1, 3);
  b.append(4);
  b.inputs.window_of = {{1, 0, 0, 0}, {0, 0, 1, 0}};
  const float e = std::exp(1.0f);
  EXPECT_THAT(b.score(),
              Pointwise(FloatNear(1e-6f), {e / (2 * e + 1), 1 / (2 * e + 1), e / (2 * e + 1), 0.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(SnapKv, KvpressCountsTheWindowInTheSoftmaxAndAverages) {
  PolicyBench b("snapkv@kvpress:window=1:kernel=3:cadence=1", 1, 1, 1, 3);
  b.append(4);
  b.inputs.window_of = {{0, 0, std::log(4.0f), std::log(2.0f)}};  // (1, 1, 4, 2) / 8, the last column dropped
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {2.0f / 24, 6.0f / 24, 5.0f / 24, 0.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(PyramidKv, BudgetsFallWithDepthAndAverageToTheBudget) {
  auto policy = make_policy("pyramidkv:window=8:beta=20");
  // 100 - 8 = 92: last 92/20 = 4.6, first 2 * 92 - 4.6 = 179.4; plus the window, rounded down.
  EXPECT_EQ(policy->layer_budget(0, 5, 100), 187);
  EXPECT_EQ(policy->layer_budget(2, 5, 100), 100);
  EXPECT_EQ(policy->layer_budget(4, 5, 100), 12);
  EXPECT_EQ(policy->layer_budget(0, 1, 100), 100);
}

TEST(Rkv, WeighsImportanceAgainstRedundancy) {
  PolicyBench b("rkv:window=1:kernel=1:lambda=0.5:cadence=1", 1, 1, 2, 3);
  b.append(4);
  b.inputs.keys_of = {{1, 0, 1, 0, 0, 1, 0, 1}};  // slots 0 and 1 alike, 2 and 3 alike
  b.inputs.window_of = {{0, 0, 0, 0}};
  // Cosines without the diagonal: rows 0 and 1 each forgive their only match (1 and 0), rows 2 and 3
  // likewise; all means are 0, so R = 1/4 everywhere and I = 1/3.
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {1.0f / 24, 1.0f / 24, 1.0f / 24, 0.0f}));

  // Three copies and a stranger: row 0 forgives 2, row 1 forgives 2, row 2 forgives 1, row 3 has no match and
  // forgives slot 0. Column sums: 0: 1 + 1 (rows 1 and 2), 1: 1 (row 0), 2: 0, 3: 0.
  b.inputs.keys_of = {{1, 0, 1, 0, 1, 0, 0, 1}};
  const float a = std::exp(0.5f), c = std::exp(0.25f), total = a + c + 2;
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {1.0f / 6 - a / total / 2, 1.0f / 6 - c / total / 2,
                                                      1.0f / 6 - 1 / total / 2, 0.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(Rkv, ARowWithoutASimilarKeyForgivesSlotZero) {
  PolicyBench b("rkv:window=1:kernel=1:lambda=0:cadence=1", 1, 1, 2, 3);
  b.append(4);
  // Cosine 0.4 with everything else: below the threshold, so each row forgives its entry of slot 0.
  const float s = std::sqrt(1 - 0.16f);
  b.inputs.keys_of = {{1, 0, 0.4f, s, 0.4f, -s, 0.4f, s}};
  b.inputs.window_of = {{0, 0, 0, 0}};
  std::vector<float> score = b.score();
  // Column 0 lost rows 2 (rows 1 and 3 match each other); it keeps 0.4 twice.
  // Rows 1: forgives 3; 3: forgives 1; 0 and 2: forgive slot 0.
  const float cross = 0.16f - s * s;  // between slots 1 and 2
  const float c0 = (0.4f + 0.4f) / 4, c1 = (0.4f + cross) / 4, c2 = (0.4f + cross + cross) / 4;
  const float total = std::exp(c0) + std::exp(c1) * 2 + std::exp(c2);
  EXPECT_NEAR(score[0], -std::exp(c0) / total, 1e-6);
  EXPECT_NEAR(score[1], -std::exp(c1) / total, 1e-6);
  EXPECT_NEAR(score[2], -std::exp(c2) / total, 1e-6);
}

TEST(Rkv, SurvivorsStandInScoreOrderAndTheWindowBehind) {
  PolicyBench b("rkv:window=1:kernel=1:lambda=1:cadence=1", 1, 1, 1, 3);
  b.append(4);
  b.inputs.keys_of = {{1, 1, 1, 1}};
  b.inputs.window_of = {{1, 0, 2, 0}};
  const EvictionPlan* plan = b.evictor.decide(*b.policy, b.at, b.inputs, b.state, false);
  ASSERT_NE(plan, nullptr);
  EXPECT_THAT(plan->keep.at(0), ElementsAre(Slot{2}, Slot{0}, Slot{3}));
  PolicyBench sorted("rkv:window=1:kernel=1:lambda=1:cadence=1:order=position", 1, 1, 1, 3);
  sorted.append(4);
  sorted.inputs = b.inputs;
  plan = sorted.evictor.decide(*sorted.policy, sorted.at, sorted.inputs, sorted.state, false);
  EXPECT_THAT(plan->keep.at(0), ElementsAre(Slot{0}, Slot{2}, Slot{3}));
}

TEST(Gkv, ImportanceFadesFromOneCompactionToTheNext) {
  PolicyBench b("gkv:window=1:weight=1:fade=0.5:cadence=1", 1, 1, 1, 8);
  b.append(4);
  b.inputs.window_of = {{std::log(1.0f), std::log(4.0f), std::log(2.0f), 0}};
  b.inputs.keys_of = {{1, 1, 1, 1}};
  b.observe();
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.25f, 1.0f, 0.5f, 0.0f}));
  b.inputs.window_of = {{std::log(4.0f), std::log(1.0f), std::log(1.0f), 0}};
  b.observe();
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {1.0f, 0.5f, 0.25f, 0.0f}));
}

TEST(Vase, KeepsTheWidestValuesAndDrawsTheRest) {
  PolicyBench b("vase:window=1:kernel=1:share=0.25:cadence=1", 1, 1, 2, 4);
  b.append(6);
  b.inputs.window_of = {{0, 0, 0, 0, 0, 0}};
  b.inputs.values_of = {{0, 1, 5, -5, 0, 0, 1, 2, 0, 0, 0, 0}};  // ranges 1 10 0 1 0
  std::vector<float> score = b.score();
  for (int i : {0, 2, 3, 4}) EXPECT_GT(score[1], score[i] + 100);
  EXPECT_EQ(b.dropped().size(), 2u);
}

TEST(Scissorhands, MeansOrCountsTheHistory) {
  PolicyBench mean("scissorhands:history=2:cadence=1:recent=1", 1, 1, 1, 2);
  mean.append(3);
  const float none = -INFINITY;
  mean.inputs.window_of = {{0, 0, none, 0, 0, 0}};
  EXPECT_THAT(mean.score(), Pointwise(FloatNear(1e-6f), {5.0f / 12, 5.0f / 12, 1.0f / 6}));
  PolicyBench count("scissorhands:history=2:rule=count:cadence=1:recent=1", 1, 1, 1, 2);
  count.append(3);
  count.inputs.window_of = {
      {std::log(3.0f), 0, none, 0, 0, 9}};  // (0.75, 0.25) of 2, then only the newest of 3
  EXPECT_THAT(count.score(), ElementsAre(1, 0, 1));
  EXPECT_THAT(count.dropped(), ElementsAre(1));
}

TEST(RkvLongFlow, FiresAboveBudgetLessFourAndFallsByFar) {
  auto policy = make_policy("rkv@longflow");
  EXPECT_EQ(policy->info().rule.peak_slots(304), 301);
  EXPECT_THROW(check_budget(*policy, 259, 0), Error);
  check_budget(*policy, 260, 0);
}

}  // namespace
}  // namespace kvlapse
