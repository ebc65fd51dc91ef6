// Hand-worked examples of policies that rank by attention.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;
using testing::FloatNear;
using testing::Pointwise;

TEST(LongFlow, ScoresTheMeanContributionOverQueryHeadsAndDimensions) {
  PolicyBench b("longflow", 2, 1, 4, 4);
  b.append(4);
  b.inputs.attention_of = {{0.1f, 0.2f, 0.3f, 0.4f}, {0.4f, 0.3f, 0.2f, 0.1f}};
  b.inputs.value_l1_of = {{8, 2, 1, 4}};
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-7f), {0.5f, 0.125f, 0.0625f, 0.25f}));
  EXPECT_THAT(b.dropped(), ElementsAre(2));
}

TEST(LongFlow, Fp16CastTurnsSmallScoresIntoTies) {
  // 1e-8 and 2e-8 are both 0 in fp16: the first slot goes although the second scores less.
  PolicyBench exact("longflow", 1, 1, 1, 3), cast("longflow:cast=fp16", 1, 1, 1, 3);
  for (PolicyBench* b : {&exact, &cast}) {
    b->append(3);
    b->inputs.attention_of = {{2e-8f, 1e-8f, 1}};
    b->inputs.value_l1_of = {{1, 1, 1}};
  }
  EXPECT_THAT(exact.dropped(), ElementsAre(1));
  EXPECT_THAT(cast.dropped(), ElementsAre(0));
}

TEST(LongFlow, PerKvHeadVictimsDiffer) {
  PolicyBench b("longflow:granularity=kv_head", 2, 2, 1, 3);
  b.append(3);
  b.inputs.attention_of = {{0.1f, 0.5f, 0.4f}, {0.5f, 0.4f, 0.1f}};
  b.inputs.value_l1_of = {{1, 1, 1}, {1, 1, 1}};
  EXPECT_THAT(b.dropped(), ElementsAre(0, 2));
}

TEST(H2o, AccumulatesSinceBirthAndKeepsTheRecentHalf) {
  PolicyBench b("h2o", 2, 1, 1, 4);
  b.append(3);
  b.inputs.attention_of = {{0.6f, 0.2f, 0.2f}, {0.2f, 0.6f, 0.2f}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.1f, 0.2f, 0.3f, 0.4f}, {0.1f, 0.2f, 0.3f, 0.4f}};
  b.observe();
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.5f, 0.6f, 0.5f, 0.4f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));  // positions 2 and 3 are recent
}

TEST(H2o, LongFlowsPortForgetsThePast) {
  PolicyBench b("h2o@longflow", 1, 1, 1, 4);
  b.append(5);
  b.inputs.attention_of = {{0.3f, 0.1f, 0.2f, 0.2f, 0.2f}};
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(Tova, LeastAttentionOfAllHeads) {
  PolicyBench b("tova", 2, 2, 1, 4);
  b.append(4);
  b.inputs.attention_of = {{0.1f, 0.3f, 0.3f, 0.3f}, {0.5f, 0.1f, 0.3f, 0.1f}};
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.3f, 0.2f, 0.3f, 0.2f}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));  // first of the two lowest
}

TEST(Tova, KvpressProtectsTheNewestToken) {
  PolicyBench b("tova@kvpress:cadence=1", 1, 1, 1, 2);
  b.append(3);
  b.inputs.attention_of = {{0.5f, 0.3f, 0.2f}};
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(ObservedAttention, DividesByTheRowsThatSeeTheSlot) {
  PolicyBench b("observed_attention:cadence=1", 1, 1, 1, 2);
  b.append();
  b.inputs.attention_of = {{1}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.5f, 0.5f}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.5f, 0.3f, 0.2f}};
  b.observe();
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {2.0f / 3, 0.4f, 0.2f}));
  EXPECT_THAT(b.dropped(), ElementsAre(2));
}

TEST(Vatp, AccumulatedAttentionTimesValueNorm) {
  PolicyBench b("vatp:sinks=0:recent=1", 1, 1, 2, 3);
  b.append(3);
  b.inputs.attention_of = {{0.5f, 0.3f, 0.2f}};
  b.inputs.value_l1_of = {{1, 2, 9}};
  b.observe();
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.5f, 0.6f, 1.8f}));
  EXPECT_THAT(b.dropped(), ElementsAre(0));
}

TEST(Vatp, LongFlowsPortIgnoresTheValueNormUnlessAsked) {
  PolicyBench plain("vatp@longflow:recent=1", 1, 1, 1, 2),
      meant("vatp@longflow:value_norm=1:recent=1", 1, 1, 1, 2);
  for (PolicyBench* b : {&plain, &meant}) {
    b->inputs.values_of = {{1, 5, 1}};
    for (int i = 0; i < 3; ++i) {
      b->append();
      b->observe();
    }
    b->inputs.attention_of = {{0.4f, 0.2f, 0.4f}};
  }
  EXPECT_THAT(plain.dropped(), ElementsAre(1));  // 0.4 0.2
  EXPECT_THAT(meant.dropped(), ElementsAre(0));  // 0.4 * 1 against 0.2 * 5
}

TEST(LazyEviction, TokensThatComeBackStay) {
  PolicyBench b("lazy_eviction:window=1:cadence=1:threshold=0.25", 1, 1, 1, 2);
  // Token 0 is used at 0 and 2 (gap 2), token 1 only at its birth.
  b.append();
  b.inputs.attention_of = {{1}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.2f, 0.8f}};
  b.observe();
  b.append();
  b.inputs.attention_of = {{0.5f, 0.2f, 0.3f}};
  b.observe();
  // 0: 2 sigmoid(0) + 2 sigmoid(-1/2) = 1 + 0.7551; 1: never back; 2: just born.
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-4f), {1.7551f, 0.0f, 1.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(CrystalKv, HitsFadeWithTime) {
  PolicyBench b("crystal_kv:decay=0.5:nucleus=0.5", 1, 1, 1, 3);
  b.append(2);
  b.inputs.attention_of = {{0.9f, 0.1f}};
  b.observe();  // hit: 0
  b.append();
  b.inputs.attention_of = {{0.1f, 0.3f, 0.6f}};
  b.observe();  // hit: 2
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {0.5f, 0.0f, 1.0f}));
  b.inputs.attention_of = {{0.6f, 0.3f, 0.1f}};
  b.observe();  // hit: 0 again, 0.5 * 1 + 1
  EXPECT_THAT(b.score(), Pointwise(FloatNear(1e-6f), {1.5f, 0.0f, 1.0f}));
  EXPECT_THAT(b.dropped(), ElementsAre(1));
}

TEST(Raas, OldestStampGoesAndThePromptStays) {
  PolicyBench b("raas:page=1:share=0.34", 1, 1, 1, 4, /*n_prompt=*/1);
  b.append(3);
  b.inputs.attention_of = {{0.1f, 0.2f, 0.7f}};
  b.observe();  // page 2
  b.append();
  b.inputs.attention_of = {{0.1f, 0.5f, 0.3f, 0.1f}};
  b.observe();  // page 1, and 3 is new
  EXPECT_THAT(b.score(), ElementsAre(0, 3, 2, 3));
  EXPECT_THAT(b.dropped(), ElementsAre(2));
}

TEST(Caote, ScoresTheExactMoveOfTheOutput) {
  // w = (0.5, 0.25, 0.25), v = (0, 4, -4): o = 0. Without token 1: -4/3, moved by 4/3.
  PolicyBench exact("caote", 1, 1, 1, 3), fast("fastcaote", 1, 1, 1, 3);
  for (PolicyBench* b : {&exact, &fast}) {
    b->append(3);
    b->inputs.attention_of = {{0.5f, 0.25f, 0.25f}};
    b->inputs.values_of = {{0, 4, -4}};
    b->inputs.output_of = {{0}};
  }
  EXPECT_THAT(exact.score(), Pointwise(FloatNear(1e-6f), {0.0f, 4.0f / 3, 4.0f / 3}));
  EXPECT_THAT(fast.score(), Pointwise(FloatNear(1e-6f), {0.0f, 4.0f / 3, 4.0f / 3}));
  fast.inputs.values_of = {{3, 4, -4}};  // mean 1
  EXPECT_THAT(fast.score(), Pointwise(FloatNear(1e-6f), {2.0f, 1.0f, 5.0f / 3}));
}

TEST(Caote, ATokenWithAllTheWeightIsNotWorthless) {
  // In fp32 the output is its value and 1 - w is 0; without it the others' mean, (4 - 2 * 4) / 3, is left.
  PolicyBench b("caote", 1, 1, 1, 3);
  b.append(3);
  b.inputs.attention_of = {{1, 1e-9f, 2e-9f}};
  b.inputs.values_of = {{5, 4, -4}};
  b.inputs.output_of = {{5}};
  const std::vector<float> score = b.score();
  EXPECT_NEAR(score[0], 19.0 / 3, 1e-5);
  EXPECT_NEAR(score[1], 1e-9, 1e-15);
  EXPECT_NEAR(score[2], 18e-9, 1e-14);
  EXPECT_THAT(b.dropped(), ElementsAre(1));
  b.inputs.attention_of = {{1, 0, 0}};  // nothing is left: the whole value is lost
  EXPECT_THAT(b.score(), ElementsAre(5, 0, 0));
}

TEST(Caote, ADeviceMayChooseTheMeanOverTheGroupAlone) {
  EXPECT_EQ(PolicyBench("caote", 2, 1, 1, 3).policy->info().fused, FusedScore::leave_one_out);
  EXPECT_EQ(PolicyBench("caote:gqa=max", 2, 1, 1, 3).policy->info().fused, FusedScore::none);
  EXPECT_EQ(PolicyBench("fastcaote", 2, 1, 1, 3).policy->info().fused, FusedScore::none);
}

TEST(Keyformer, AddsTheSameNoisySoftmaxToAllQueryHeadsOfAGroup) {
  PolicyBench b("keyformer:seed=7", 2, 1, 1, 8), other("keyformer:seed=8", 2, 1, 1, 8);
  for (PolicyBench* bench : {&b, &other}) {
    bench->append(3);
    bench->inputs.logits_of = {{0, 0, 0}, {0, 0, 0}};
    bench->observe();
  }
  std::vector<float> s = b.score();
  EXPECT_NEAR(s[0] + s[1] + s[2], 1, 1e-6);
  EXPECT_NE(s[0], s[1]);
  EXPECT_NE(s, other.score());
  b.observe();
  EXPECT_NEAR(b.score()[0], 2 * s[0], 1e-6)
      << "the draw is a function of seed, layer, head, step and position";
}

}  // namespace
}  // namespace kvlapse
