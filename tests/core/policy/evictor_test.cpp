#include "core/policy/evictor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/rng.h"
#include "core/policy/lowest.h"
#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;

TEST(FindLowest, AgreesWithAPlainSearch) {
  for (uint64_t seed = 0; seed < 400; ++seed) {
    auto draw = [&, i = uint64_t{0}](int below) mutable {
      return static_cast<int>(counter_random({seed, i++}) % static_cast<uint64_t>(below));
    };
    const int n = draw(70);
    std::vector<float> scores(n);
    std::vector<Pos> positions(n);
    for (int s = 0; s < n; ++s) {
      scores[s] = static_cast<float>(draw(8)) - 4;
      positions[s] = Pos{draw(100)};
    }
    const int first = draw(40), last = 40 + draw(70);
    for (bool last_among_equals : {false, true}) {
      Lowest expected{std::numeric_limits<float>::infinity(), std::numeric_limits<float>::infinity(), -1,
                      false};
      std::vector<float> free;
      for (int s = 0; s < n; ++s) {
        if (raw(positions[s]) < first || raw(positions[s]) > last) continue;
        free.push_back(scores[s]);
        if (expected.slot < 0 || scores[s] < expected.score ||
            (last_among_equals && scores[s] == expected.score)) {
          expected.slot = s;
          expected.score = scores[s];
        }
      }
      std::sort(free.begin(), free.end());
      if (free.size() > 1) expected.next = free[1];
      const Lowest found = find_lowest(scores, positions, first, last, last_among_equals);
      EXPECT_EQ(found.slot, expected.slot) << seed;
      EXPECT_EQ(found.score, expected.score) << seed;
      EXPECT_EQ(found.next, expected.next) << seed;
      EXPECT_FALSE(found.has_nan);
    }
  }
}

TEST(FindLowest, SeesNaNAmongCandidatesOnly) {
  for (int n : {3, 40}) {
    std::vector<float> scores(n, 1.0f);
    std::vector<Pos> positions(n);
    for (int s = 0; s < n; ++s) positions[s] = Pos{s};
    scores[1] = std::nanf("");
    EXPECT_TRUE(find_lowest(scores, positions, 0, n, false).has_nan);
    EXPECT_FALSE(find_lowest(scores, positions, 2, n, false).has_nan);
  }
}

PolicyBench tova_bench(const std::string& spec, std::vector<float> attention, int budget) {
  PolicyBench b(spec, 1, 1, 1, budget);
  b.append(static_cast<int>(attention.size()));
  b.inputs.attention_of = {std::move(attention)};
  return b;
}

TEST(Evictor, CountsVictimsThatScoresCannotTellApart) {
  auto tie = tova_bench("tova", {0.25f, 0.25f, 0.5f}, 3);
  const EvictionPlan* plan = tie.evictor.decide(*tie.policy, tie.at, tie.inputs, tie.state, false);
  ASSERT_NE(plan, nullptr);
  EXPECT_EQ(plan->near_ties, 1);
  EXPECT_THAT(plan->threshold, ElementsAre(0.25f));
  auto clear = tova_bench("tova", {0.2f, 0.3f, 0.5f}, 3);
  EXPECT_EQ(clear.evictor.decide(*clear.policy, clear.at, clear.inputs, clear.state, false)->near_ties, 0);
}

TEST(Evictor, TieOrderChoosesAmongEquals) {
  EXPECT_THAT(tova_bench("tova:ties=first", {0.25f, 0.25f, 0.5f}, 3).dropped(), ElementsAre(0));
  EXPECT_THAT(tova_bench("tova:ties=last", {0.25f, 0.25f, 0.5f}, 3).dropped(), ElementsAre(1));
  EXPECT_THAT(tova_bench("tova@kvpress:cadence=1:ties=last", {0.2f, 0.2f, 0.2f, 0.4f}, 2).dropped(),
              ElementsAre(1, 2));
}

TEST(Evictor, MeasuresWhatPrecisionDecides) {
  // The lowest two differ by one unit in the last place: fp16 cannot tell them apart, and the other tie order
  // can only matter after that.
  const float low = 0.1f, next = std::nextafter(low, 1.0f);
  auto b = tova_bench("tova", {next, low, 0.8f}, 3);
  b.evictor.count_sensitivity(true);
  EXPECT_THAT(b.dropped(), ElementsAre(1));
  EXPECT_EQ(b.evictor.sensitivity().victims, 1);
  EXPECT_EQ(b.evictor.sensitivity().fp16, 1);
  EXPECT_EQ(b.evictor.sensitivity().ties, 0);
  // A unit in the last place moves each position up, down or not at all: over many positions of one score
  // each some victim changes, and none where scores lie far apart.
  auto count_ulp = [](float step) {
    std::vector<float> attention(40);
    for (size_t i = 0; i < attention.size(); ++i) attention[i] = 0.01f + step * static_cast<float>(i % 2);
    auto many = tova_bench("tova@kvpress:cadence=1", attention, 10);
    many.evictor.count_sensitivity(true);
    EXPECT_EQ(many.dropped().size(), 30u);
    return many.evictor.sensitivity().ulp;
  };
  EXPECT_GT(count_ulp(0), 0);
  EXPECT_GT(count_ulp(0.001f), 0);  // 20 of the higher score, 10 of which stay
  std::vector<float> apart(40);
  for (size_t i = 0; i < apart.size(); ++i) apart[i] = 0.001f * static_cast<float>(i + 1);
  auto clear = tova_bench("tova@kvpress:cadence=1", apart, 10);
  clear.evictor.count_sensitivity(true);
  EXPECT_EQ(clear.dropped().size(), 30u);
  EXPECT_EQ(clear.evictor.sensitivity().ulp, 0);
  EXPECT_EQ(clear.evictor.sensitivity().fp16, 0);
  auto tie = tova_bench("tova", {0.1f, 0.1f, 0.8f}, 3);
  tie.evictor.count_sensitivity(true);
  tie.dropped();
  EXPECT_EQ(tie.evictor.sensitivity().ties, 1);
}

TEST(Evictor, NaNIsNamed) {
  auto b = tova_bench("tova", {0.1f, std::nanf(""), 0.8f}, 3);
  try {
    b.dropped();
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("policy tova: score is NaN at step 2, layer 0, kv head 0, slot 1"));
  }
}

TEST(CheckBudget, NamesTheProtectedSet) {
  auto policy = make_policy("streaming_llm:sinks=4:recent=10");
  check_budget(*policy, 15, 0);
  try {
    check_budget(*policy, 14, 0);
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                testing::HasSubstr("policy streaming_llm: budget 14 cannot hold its protected set: expected "
                                   "at least 15 slots (4 sinks, 10 recent, 1 for the next token)"));
  }
}

class ValidatePlan : public testing::Test {
 protected:
  ValidatePlan() : table(2, 16) {
    for (int p = 0; p < 6; ++p) table.append(Pos{p});
    at.geometry = {1, 2, 2, 1, 16, DType::f32};
    at.table = &table;
    at.budget = 4;
    at.step = Pos{5};
    rule.headroom = 0;
    rule.sinks = 1;
    rule.reclaim = Reclaim::compact;
    plan.reclaim = Reclaim::compact;
    for (int h = 0; h < 2; ++h) {
      plan.drops.push_back({h, Slot{1}, Pos{1}, 0, {}});
      plan.drops.push_back({h, Slot{3}, Pos{3}, 0, {}});
      plan.keep.push_back({Slot{0}, Slot{2}, Slot{4}, Slot{5}});
    }
  }
  void expect_refused(std::string_view why) {
    try {
      validate_plan(plan, at, rule);
      FAIL() << "accepted: " << why;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), testing::HasSubstr(std::string(why)));
    }
  }
  SlotTable table;
  LayerContext at;
  EvictionRule rule;
  EvictionPlan plan;
};

TEST_F(ValidatePlan, AcceptsASoundOne) {
  validate_plan(plan, at, rule);
}

TEST_F(ValidatePlan, RefusesCorruptedOnes) {
  const EvictionPlan sound = plan;
  std::swap(plan.drops[0], plan.drops[1]);
  expect_refused("sorted and distinct");
  plan = sound;
  plan.drops[1] = plan.drops[0];
  expect_refused("sorted and distinct");
  plan = sound;
  plan.drops[0].slot = Slot{6};
  expect_refused("occupied slot");
  plan = sound;
  plan.drops[0].pos = Pos{2};
  expect_refused("position that the slot holds");
  plan = sound;
  plan.drops[0].slot = Slot{0};
  plan.drops[0].pos = Pos{0};
  expect_refused("unprotected");
  plan = sound;
  plan.drops[0].kv_head = 2;
  expect_refused("head of this layer");
  plan = sound;
  plan.keep[1].pop_back();
  expect_refused("neither dropped nor kept");
  plan = sound;
  plan.keep[1][0] = plan.keep[1][1];
  expect_refused("named twice");
  plan = sound;
  plan.keep.pop_back();
  expect_refused("survivors of 2 heads");
  plan = sound;
  plan.drops.erase(plan.drops.begin());
  plan.keep[0].push_back(Slot{1});
  expect_refused("at most 4 survivors");
  rule.ragged = true;
  expect_refused("at most 8 survivors over all heads");
  plan = sound;
  rule.ragged = false;
  plan.reclaim = Reclaim::fill;
  expect_refused("one victim a head");
}

// Rows tagged with their position survive any sequence of plans.
TEST(ApplyPlan, RowsFollowTheirTokens) {
  for (uint64_t seed = 0; seed < 60; ++seed) {
    auto draw = [&, i = uint64_t{0}](int below) mutable {
      return static_cast<int>(counter_random({seed, i++}) % static_cast<uint64_t>(below));
    };
    constexpr int kHeads = 3, kCapacity = 24;
    SlotTable table(kHeads, kCapacity);
    SlotState state(1, kHeads, kCapacity);
    std::vector<std::vector<int>> rows(kHeads, std::vector<int>(kCapacity, -1));
    auto check = [&] {
      for (int h = 0; h < kHeads; ++h) {
        std::span<const Pos> positions = table.positions(h);
        for (size_t s = 0; s < positions.size(); ++s) {
          ASSERT_EQ(rows[h][s], raw(positions[s]));
          ASSERT_EQ(state.column(0, h)[s], static_cast<float>(raw(positions[s])));
        }
      }
    };
    for (int pos = 0; pos < 200; ++pos) {
      for (int h = 0; h < kHeads; ++h) {
        const Slot slot = table.next_slot(h);
        rows[h][raw(slot)] = pos;
        state.clear(h, slot);
        state.column(0, h)[raw(slot)] = static_cast<float>(pos);
      }
      table.append(Pos{pos});
      for (int h = 0; h < kHeads; ++h) ASSERT_EQ(table.positions(h)[raw(table.newest(h))], Pos{pos});
      check();
      EvictionPlan plan;
      if (table.max_count() == kCapacity || draw(8) == 0) {
        plan.reclaim = Reclaim::compact;
        for (int h = 0; h < kHeads; ++h) {
          std::vector<Slot> order;
          for (int s = 0; s < table.count(h); ++s) order.push_back(Slot{s});
          for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[draw(static_cast<int>(i))]);
          order.resize(1 + draw(static_cast<int>(order.size())));
          if (order.size() == static_cast<size_t>(kCapacity)) order.pop_back();
          std::vector<int> moved(kCapacity, -1);
          for (size_t i = 0; i < order.size(); ++i) moved[i] = rows[h][raw(order[i])];
          rows[h] = moved;
          plan.keep.push_back(order);
        }
        apply_plan(plan, table, state);
        check();
      } else if (draw(2) == 0) {
        for (int h = 0; h < kHeads; ++h)
          if (draw(2) == 0) plan.drops.push_back({h, Slot{draw(table.count(h))}, Pos{0}, 0, {}});
        apply_plan(plan, table, state);
      }
    }
  }
}

}  // namespace
}  // namespace kvlapse
