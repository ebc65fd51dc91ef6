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

TEST(Oracles, CannotBeDecoded) {
  CacheGeometry geometry{1, 1, 1, 1, 8, DType::f32};
  std::vector<float> rows(8, 1.0f);
  TensorMemory memory(geometry, rows, rows, rows);
  auto policy = make_policy("oracle_mass");
  EXPECT_THROW(CacheSite(geometry, 0, *policy, 4, 0, memory), Error);
}

}  // namespace
}  // namespace kvlapse
