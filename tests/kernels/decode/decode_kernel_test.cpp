// The CUDA decode kernel's own text, run thread by thread on the CPU emulator and judged by fp64. What this
// cannot show (caches, memory order, speed) the tests labelled gpu do.
#include <gtest/gtest.h>

#include <algorithm>

#include "core/base/error.h"
#include "tests/support/kernels/decode_cases.h"
#include "tests/support/kernels/emulated_decode.h"
#include "tests/support/kernels/host_policy.h"

namespace kvlapse {
namespace {

DecodeLimits limits(bool bulk) {
  DecodeLimits l;
  l.n_multiprocessors = 6;  // few persistent CTAs, so that items follow each other
  l.clusters = bulk;
  l.max_splits = 16;
  l.resident_clusters = [](int n, int, int) { return n > 4 ? 1 : 6 / n; };
  return l;
}

class EmulatedDecode : public testing::TestWithParam<bool> {};

void expect_as_defined(const std::vector<NamedDecodeCase>& cases, bool bulk) {
  // The two paths differ in the copies and the exchange only: every third case serves the second.
  for (size_t i = 0; i < cases.size(); i += bulk ? 1 : 3) {
    const NamedDecodeCase& c = cases[i];
    DecodeLimits l = limits(bulk);
    if (c.splits == 8) l.n_multiprocessors = 8;
    // Alternately one block and two with half the consumers each.
    const DecodePlan plan = plan_decode(
        c.decode.shape, l,
        {.splits = c.splits,
         .blocks_per_multiprocessor = c.decode.shape.head_dim < 256 ? static_cast<int>(1 + i % 2) : 1,
         .ahead = i % 3 == 0 ? ReadAhead::no : ReadAhead::yes});
    const DecodeProblem before = make_decode_problem(c.decode, plan.n_splits);
    DecodeProblem after = before;
    ASSERT_NO_THROW(run_decode_emulated(after, plan, 2)) << c.name;
    const DecodeCheck check = check_decode_step(before, after);
    EXPECT_EQ(check.failure, "") << c.name;
    EXPECT_EQ(after.arrivals, before.arrivals) << c.name;
  }
}
TEST_P(EmulatedDecode, EveryCaseAsDefined) {
  expect_as_defined(decode_cases(/*small=*/true), GetParam());
}
TEST_P(EmulatedDecode, EveryCaseWithFp8AsDefined) {
  expect_as_defined(fp8_decode_cases(/*small=*/true), GetParam());
}

TEST_P(EmulatedDecode, EveryErrorOfLeavingASlotOutAsDefined) {
  expect_as_defined(leave_one_out_cases(/*small=*/true), GetParam());
}
TEST_P(EmulatedDecode, EveryErrorOfLeavingASlotOutWithFp8AsDefined) {
  std::vector<NamedDecodeCase> all = fp8_cases(leave_one_out_cases(/*small=*/true)), half;
  for (size_t i = 0; i < all.size(); i += 2) half.push_back(all[i]);
  expect_as_defined(half, GetParam());
}

TEST_P(EmulatedDecode, ResultDoesNotDependOnTheOrderOfEvents) {
  for (FusedScore score : {FusedScore::contribution, FusedScore::leave_one_out})
    for (int splits : {1, 3}) {
      DecodeCase c;
      c.score = score;
      c.shape = {3, 4, 2, 64, 300, DType::bf16};
      c.shape.leave_one_out = score == FusedScore::leave_one_out;
      c.tokens = {1000, 200, 999};
      c.recent = 3;
      c.shared = true;
      // Few stages: the ring is always full. Three groups of consumers, then two.
      const int blocks = splits == 1 ? 1 : 2;
      const DecodePlan plan =
          plan_decode(c.shape, limits(GetParam()),
                      {.splits = splits, .stages = 4 - blocks, .blocks_per_multiprocessor = blocks});
      ASSERT_EQ(plan.n_groups, 4 - blocks);
      const DecodeProblem before = make_decode_problem(c, splits);
      DecodeProblem first = before;
      run_decode_emulated(first, plan, 1);
      EXPECT_EQ(check_decode_step(before, first).failure, "");
      for (uint64_t seed = 2; seed < 4; ++seed) {
        DecodeProblem again = before;
        run_decode_emulated(again, plan, seed);
        EXPECT_EQ(again.out, first.out) << splits;
        EXPECT_EQ(again.victim_keys, first.victim_keys) << splits;
        EXPECT_EQ(again.k, first.k) << splits;
        EXPECT_EQ(again.v, first.v) << splits;
        EXPECT_EQ(again.protect, first.protect) << splits;
      }
    }
}

// Waiting for a barrier's phase is by parity. Were a stage shared by both groups, one could wait for the
// phase after one that the other has not seen, and be let through at once; copies that land out of order show
// it.
TEST(DecodePlan, AStageBelongsToOneGroup) {
  for (int slots : {64, 1000, 3276, 9000, 16384, 32768})
    for (int group : {1, 4, 8})
      for (int blocks : {1, 2})
        for (int stages : {0, 5, 7}) {
          const DecodePlan plan = plan_decode(
              {8, 8 * group, 8, 128, slots, DType::bf16}, {.max_splits = 16, .resident_clusters = {}},
              {.stages = stages, .blocks_per_multiprocessor = slots > 9000 ? 1 : blocks});
          EXPECT_EQ(plan.n_stages % plan.n_groups, 0);
          EXPECT_GE(plan.n_stages, 4);
          EXPECT_LE(plan.smem_bytes, 232448);
        }
}

// Of items that fill the device once, fp8 ones alone are halves of two blocks a multiprocessor.
TEST(DecodePlan, Fp8ItemsThatFillTheDeviceAreHalved) {
  const auto expect_splits = [](DecodeShape shape, int splits, int ctas) {
    const DecodePlan plan = plan_decode(shape, {.resident_clusters = {}});
    EXPECT_EQ(plan.n_splits, splits) << shape.batch << " x " << shape.n_slots;
    EXPECT_EQ(plan.n_ctas, ctas) << shape.batch << " x " << shape.n_slots;
  };
  expect_splits({16, 32, 8, 128, 3276, DType::f8e4m3}, 2, 256);
  expect_splits({16, 32, 8, 128, 3276, DType::bf16}, 1, 128);
  expect_splits({16, 32, 8, 128, 4608, DType::f8e4m3}, 1, 128);  // long
  expect_splits({32, 32, 8, 128, 3276, DType::f8e4m3}, 1, 128);  // more than once
}

// Consumers of each of two blocks: what their registers allow.
TEST(DecodePlan, PairedBlocksHaveAsManyGroupsAsTheirRegistersAllow) {
  const auto groups = [](int dim, DType dtype, bool leave_one_out = false) {
    DecodeShape shape{16, 16, 8, dim, 1024, dtype};
    shape.leave_one_out = leave_one_out;
    return plan_decode(shape, {.resident_clusters = {}}, {.blocks_per_multiprocessor = 2}).n_groups;
  };
  EXPECT_EQ(groups(128, DType::f8e4m3), 3);
  EXPECT_EQ(groups(128, DType::bf16), 2);
  EXPECT_EQ(groups(256, DType::f8e4m3), 2);
  EXPECT_EQ(groups(128, DType::f8e4m3, true), 2);
}

// Short launches leave the memory idle for the first loads of the next one; of others those would be in the
// way.
TEST(DecodePlan, TheNextKernelStartsEarlyBehindShortLaunches) {
  const auto early = [](int batch, int slots, DType dtype) {
    return plan_decode({batch, 32, 8, 128, slots, dtype}, {.resident_clusters = {}}).next_early;
  };
  EXPECT_TRUE(early(1, 3276, DType::bf16));
  EXPECT_TRUE(early(8, 1024, DType::f8e4m3));
  EXPECT_FALSE(early(8, 1024, DType::bf16));
  EXPECT_FALSE(early(1, 16384, DType::bf16));
}

TEST(Divisor, QuotientsAndRemaindersAreExact) {
  for (int divisor : {1, 2, 3, 5, 7, 8, 9, 16, 40, 333, 1024, 65535, 1 << 20, 2147483647}) {
    const Divisor by = divisor_of(divisor);
    for (int64_t near : {int64_t{0}, int64_t{divisor}, int64_t{2} * divisor, int64_t{1000} * divisor,
                         int64_t{1} << 30, int64_t{2147483647}})
      for (int64_t x : {near - 1, near, near + 1}) {
        if (x < 0 || x > 2147483647) continue;
        EXPECT_EQ(quotient(static_cast<int>(x), by), x / divisor) << x << " / " << divisor;
        EXPECT_EQ(remainder(static_cast<int>(x), by), x % divisor) << x << " % " << divisor;
      }
  }
  EXPECT_EQ(divisor_of(0).divisor, 0);
}

// Kernels count slots of all heads in 32 bits.
TEST(DecodePlan, RefusesMoreSlotsThanAreCounted) {
  EXPECT_THROW(plan_decode({4096, 256, 32, 32, 16384, DType::bf16}, {.resident_clusters = {}}), Error);
}

TEST(DecodePlan, LeavingOutFitsBesideTheRingAndReadsVTwice) {
  for (int dim : {32, 64, 128, 256})
    for (int group : {1, 4, 8})
      for (int slots : {1, 200, 3276, 12000}) {
        const DecodeShape plain{8, 8 * group, 8, dim, slots, DType::bf16};
        DecodeShape shape = plain;
        shape.leave_one_out = true;
        const DecodePlan plan = plan_decode(shape, {.max_splits = 16, .resident_clusters = {}});
        EXPECT_EQ(plan.n_stages % plan.n_groups, 0);
        EXPECT_GE(plan.n_stages, 4);
        EXPECT_LE(plan.smem_bytes, 232448);
        // Partial sums begin behind the logits of the longest split.
        const int tiles = (slots + 63) / 64, most = (tiles + plan.n_splits - 1) / plan.n_splits;
        EXPECT_EQ(plan.partial_offset, plan.n_groups * kDecodeTileWarps * plan.warp_bytes);
        EXPECT_GE(plan.partial_offset, most * 64 * ((group + 1) / 2) * 8);
        EXPECT_EQ(decode_bytes(shape, slots, FusedScore::leave_one_out, false),
                  decode_bytes(plain, slots, FusedScore::attention, false) + plain.kv_bytes(slots) / 2);
      }
}

// With the clusters that an H100 holds.
TEST(DecodePlan, ShapesThatWereMeasured) {
  const auto plan = [](int batch, int slots) {
    DecodeLimits h100;
    h100.max_splits = 16;
    h100.resident_clusters = [](int n, int n_threads, int) {
      const int at_once[] = {0, 132, 66, 44, 31, 26, 22, 18, 15, 13, 5, 5, 4, 4, 4, 4, 4};
      return at_once[n] * (n_threads <= 160 ? 2 : 1);
    };
    return plan_decode({batch, 32, 8, 128, slots, DType::bf16}, h100);
  };
  struct Row {
    int batch, slots, splits, groups;
  };
  for (const Row& row : {Row{1, 1024, 8, 2},
                         {1, 3276, 9, 2},
                         {1, 16384, 9, 5},
                         {8, 1024, 2, 2},
                         {8, 3276, 2, 4},
                         {8, 16384, 2, 5},
                         {16, 1024, 1, 4},
                         {16, 3276, 1, 5},
                         {32, 1024, 1, 2},
                         {32, 3276, 1, 5},
                         {64, 1024, 1, 2},
                         {128, 1024, 1, 2},
                         {128, 3276, 1, 5}}) {
    EXPECT_EQ(plan(row.batch, row.slots).n_splits, row.splits) << row.batch << " " << row.slots;
    EXPECT_EQ(plan(row.batch, row.slots).n_groups, row.groups) << row.batch << " " << row.slots;
    const bool long_items = row.slots / row.splits > 1024;
    EXPECT_EQ(plan(row.batch, row.slots).state_ahead, !long_items) << row.batch << " " << row.slots;
  }
}

// Every state that a step leaves is what the next one needs.
TEST_P(EmulatedDecode, ClosedLoopStaysAsDefined) {
  struct Loop {
    bool shared;
    DType dtype;
    FusedScore score;
  };
  for (auto [shared, dtype, score] : {Loop{false, DType::f16, FusedScore::accumulated_contribution},
                                      {true, DType::f16, FusedScore::contribution},
                                      {false, DType::f8e4m3, FusedScore::accumulated_contribution},
                                      {true, DType::f8e4m3, FusedScore::contribution},
                                      {false, DType::bf16, FusedScore::leave_one_out},
                                      {true, DType::f8e4m3, FusedScore::leave_one_out}}) {
    DecodeCase c;
    c.shape = {2, 4, 2, 32, 70, dtype, DType::f16};
    c.shape.leave_one_out = score == FusedScore::leave_one_out;
    c.tokens = {57, 90};
    c.budget = 66, c.recent = 5, c.pinned = 2, c.shared = shared;
    c.score = score;
    const DecodePlan plan = plan_decode(c.shape, limits(GetParam()), {.splits = 2});
    DecodeProblem p = make_decode_problem(c, plan.n_splits);
    for (uint64_t step = 0; step < 16; ++step) {
      draw_decode_token(p, c, step);
      const DecodeProblem before = p;
      run_decode_emulated(p, plan, 2 * step);
      const DecodeCheck check = check_decode_step(before, p);
      ASSERT_EQ(check.failure, "") << "step " << step;
      for (int32_t& pos : p.step_pos) ++pos;
    }
    EXPECT_EQ(p.flags[0], 0u);
  }
}

INSTANTIATE_TEST_SUITE_P(Paths, EmulatedDecode, testing::Bool(), [](const auto& i) {
  return i.param ? "bulk_copy_and_clusters" : "cp_async_and_memory";
});

// The host's policy and evictor are the definition of a victim.
TEST(EmulatedDecode, VictimsOfTheHostPolicies) {
  for (const char* spec : {"longflow:recent=4", "longflow:recent=4:granularity=kv_head", "caote:recent=4",
                           "caote:recent=4:granularity=layer"}) {
    DecodeCase c = case_of_policy(spec);
    const DecodePlan plan = plan_decode(c.shape, limits(true), {.splits = 2});
    DecodeProblem p = make_decode_problem(c, 2);
    for (uint64_t step = 0; step < 4; ++step) {
      draw_decode_token(p, c, step);
      run_decode_emulated(p, plan, 2 * step);
      for (int b = 0; b < c.shape.batch; ++b) {
        const HostVictims host = host_policy_victims(p, b, spec);
        for (size_t row = 0; row < host.slots.size(); ++row)
          EXPECT_EQ(device_victim(p, b, static_cast<int>(row)), host.slots[row]) << spec << " step " << step;
      }
      for (int32_t& pos : p.step_pos) ++pos;
    }
  }
}

TEST(EmulatedDecode, AllProtectedTakesTheOldestAndSaysSo) {
  for (FusedScore score : {FusedScore::contribution, FusedScore::leave_one_out}) {
    DecodeCase c;
    c.score = score;
    c.shape = {1, 2, 1, 32, 40, DType::f16};
    c.shape.leave_one_out = score == FusedScore::leave_one_out;
    c.tokens = {100};
    c.recent = 40;
    const DecodePlan plan = plan_decode(c.shape, limits(true), {.splits = 1});
    DecodeProblem p = make_decode_problem(c, 1);
    ASSERT_EQ(p.victim_keys[0], ~uint64_t{0});
    run_decode_emulated(p, plan, 1);
    EXPECT_EQ(p.flags[0], kFlagNoCandidate);
    EXPECT_EQ(p.victim_keys[0], ~uint64_t{0});
    EXPECT_EQ(std::count(p.positions.begin(), p.positions.end(), 100), 1);
    EXPECT_EQ(std::count(p.positions.begin(), p.positions.end(), 60), 0);
  }
}

}  // namespace
}  // namespace kvlapse
