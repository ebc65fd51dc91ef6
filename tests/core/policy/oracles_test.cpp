#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "core/engine/tensor_memory.h"
#include "tests/support/core/policy_bench.h"

namespace kvlapse {
namespace {

using testing::ElementsAre;

// Answers are written down by position; notes what was asked.
struct WrittenFuture final : FutureInputs {
  std::vector<float> by_position;
  int horizon = -1, block = -1;
  float threshold = -1;
  void answer(std::span<const Pos> positions, std::span<float> out) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = by_position.at(raw(positions[i]));
  }
  void mass(int, Pos, int h, std::span<const Pos> positions, std::span<float> out) override {
    horizon = h;
    answer(positions, out);
  }
  void peak(int, Pos, int h, int b, std::span<const Pos> positions, std::span<float> out) override {
    horizon = h;
    block = b;
    answer(positions, out);
  }
  void next_use(int, Pos, int h, float t, std::span<const Pos> positions, std::span<float> out) override {
    horizon = h;
    threshold = t;
    answer(positions, out);
  }
  void error(int, Pos, int h, std::span<const Pos> positions, std::span<float> out) override {
    horizon = h;
    answer(positions, out);
  }
};

TEST(Oracles, DropWhatTheFutureNeedsLeast) {
  WrittenFuture future;
  for (const char* name : {"oracle_mass", "oracle_max", "oracle_error"}) {
    PolicyBench b(std::string(name) + ":horizon=64", 1, 1, 1, 4);
    b.append(4);
    b.at.future = &future;
    future.by_position = {3, 1, 2, 5};
    EXPECT_THAT(b.dropped(), ElementsAre(1)) << name;
    EXPECT_EQ(future.horizon, 64) << name;
  }
  EXPECT_EQ(future.block, 32);
}

TEST(Oracles, NextUseDropsTheFarthestAndFirstOfAllTheUnused) {
  WrittenFuture future;
  PolicyBench b("oracle_next_use:threshold=0.25", 1, 1, 1, 4);
  b.append(4);
  b.at.future = &future;
  future.by_position = {3, 100, 2, 5};
  EXPECT_THAT(b.dropped(), ElementsAre(1));
  EXPECT_EQ(future.threshold, 0.25f);
  future.by_position[3] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(b.dropped(), ElementsAre(3));
}

TEST(OracleTopB, SelectsTheMostAttendedTokens) {
  PolicyBench b("oracle_topb", 2, 1, 1, 2);
  b.append(4);
  b.inputs.attention_of = {{0.1f, 0.5f, 0.1f, 0.3f}, {0.5f, 0.3f, 0.1f, 0.1f}};
  EXPECT_THAT(b.evictor.select(*b.policy, b.at, b.inputs, b.state),
              ElementsAre(ElementsAre(Slot{0}, Slot{1})));
  EXPECT_THAT(b.dropped(), ::testing::IsEmpty());
}

TEST(Quest, SelectsThePagesOfHighestBound) {
  PolicyBench b("quest:page=2:least_pages=1:dense_layers=0", 1, 1, 2, 4);
  b.append(6);
  b.inputs.queries = {1, -1};
  // Bounds: page 0: 1 * max(1, 0) - min(0, 0) = 1; page 1: 3 + 2 = 5 though no key reaches it; page 2 is the
  // newest.
  b.inputs.keys_of = {{1, 0, 0, 0, 3, 3, -3, -2, 0, 0, 0, 0}};
  EXPECT_THAT(b.score(),
              ElementsAre(1, 1, 5, 5, std::numeric_limits<float>::max(), std::numeric_limits<float>::max()));
  EXPECT_THAT(b.evictor.select(*b.policy, b.at, b.inputs, b.state),
              ElementsAre(ElementsAre(Slot{2}, Slot{3}, Slot{4}, Slot{5})));
  EXPECT_EQ(make_policy("quest")->layer_budget(2, 6, 100), 96);
  EXPECT_EQ(make_policy("quest")->layer_budget(2, 6, 20), 48);
}

TEST(Oracles, CannotBeDecoded) {
  CacheGeometry geometry{1, 1, 1, 1, 8, DType::f32};
  std::vector<float> rows(8, 1.0f);
  TensorMemory memory(geometry, rows, rows, rows);
  auto policy = make_policy("oracle_mass");
  EXPECT_THROW(CacheSite(geometry, 0, *policy, 4, 0, memory), Error);
  EXPECT_THROW(CacheSite(geometry, 0, *make_policy("quest"), 4, 0, memory), Error);
}

}  // namespace
}  // namespace kvlapse
