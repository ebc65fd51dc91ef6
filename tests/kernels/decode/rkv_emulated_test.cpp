#include <gtest/gtest.h>

#include "core/base/error.h"
#include "tests/support/kernels/emulated_rkv.h"

namespace kvlapse {
namespace {

TEST(RkvKernels, KeepWhatTheReferenceKeeps) {
  for (const char* name : {"gold_public_a", "gold_public_b"}) {
    uint64_t seed = 1;
    EXPECT_EQ(run_rkv_golden(std::string(KVLAPSE_TEST_DATA) + "/" + name + ".safetensors", 1,
                             [&](RkvProblem& p) { run_rkv_emulated(p, seed++); }),
              "")
        << name;
  }
}

TEST(RkvKernels, EveryTypeAsDefinedAndRepeatable) {
  for (auto [dtype, head_dim] : {std::pair{DType::f32, 32}, {DType::f16, 64}, {DType::bf16, 128}}) {
    RkvShape shape{3, 4, 2, head_dim, 230, dtype, 150};
    // One that must fall by the most, one that stays below the budget, one that is only ranked anew.
    const RkvProblem before = make_rkv_problem(shape, {230, 149, 150}, 7);
    RkvProblem after = before, again = before;
    run_rkv_emulated(after, 1);
    run_rkv_emulated(again, 2);
    const RkvCheck check = check_rkv(before, after, true);
    EXPECT_EQ(check.failure, "") << dtype_name(dtype) << " " << head_dim;
    EXPECT_LT(check.score_error, 5e-6);
    EXPECT_EQ(after.order, again.order);
    EXPECT_EQ(after.k, again.k);
    EXPECT_EQ(after.scores, again.scores);
  }
}

// Bit for bit, whatever shared memory holds.
TEST(RkvKernels, AnyNumberOfBlocksAlike) {
  for (DType dtype : {DType::f32, DType::bf16}) {
    RkvShape shape{2, 4, 2, 64, 330, dtype, 250};
    const RkvProblem before = make_rkv_problem(shape, {330, 251}, 5);
    RkvProblem one = before;
    one.shape.blocks = 1;
    run_rkv_emulated(one, 1);
    EXPECT_EQ(check_rkv(before, one, true).failure, "");
    for (int blocks : {2, 3, 8}) {
      RkvProblem many = before;
      many.shape.blocks = blocks;
      run_rkv_emulated(many, static_cast<uint64_t>(blocks));
      EXPECT_EQ(one.order, many.order) << blocks;
      EXPECT_EQ(one.scores, many.scores) << blocks;
      EXPECT_EQ(one.evicted, many.evicted) << blocks;
      EXPECT_EQ(one.k, many.k) << blocks;
      EXPECT_EQ(one.v, many.v) << blocks;
    }
  }
}

// Sorts that leave a warp, several rows of a lane, and a search over all tiles.
TEST(RkvKernels, ManySlots) {
  for (auto [n_slots, budget] : {std::pair{1200, 1050}, {2100, 2000}}) {
    const RkvShape shape{1, 2, 1, 32, n_slots, DType::bf16, budget};
    const RkvProblem before = make_rkv_problem(shape, {n_slots}, 11);
    RkvProblem after = before;
    run_rkv_emulated(after, 3);
    const RkvCheck check = check_rkv(before, after, true);
    EXPECT_EQ(check.failure, "") << n_slots;
    EXPECT_LT(check.score_error, 5e-6);
  }
}

// Equal scores, which one bucket of the sort holds, stay in the order of ranks.
TEST(RkvKernels, AllAlike) {
  const RkvShape shape{1, 2, 1, 32, 200, DType::bf16, 120};
  const RkvProblem before = [&] {
    RkvProblem p = make_rkv_problem(shape, {200}, 9);
    for (size_t i = 0; i < p.k.size() / 2; ++i) p.set(p.k, i, 0.5f);
    return p;
  }();
  RkvProblem after = before;
  run_rkv_emulated(after, 4);
  const int kept = shape.budget - shape.window;
  for (int i = 0; i < shape.n_slots - shape.budget; ++i)
    EXPECT_EQ(after.evicted[static_cast<size_t>(i)],
              before.positions[static_cast<size_t>(before.order[static_cast<size_t>(kept + i)])]);
  for (int i = 0; i + shape.window < shape.budget; ++i)
    EXPECT_EQ(after.positions[static_cast<size_t>(after.order[static_cast<size_t>(i)])],
              before.positions[static_cast<size_t>(before.order[static_cast<size_t>(i)])]);
}

TEST(RkvKernels, WindowsAndGroups) {
  for (auto [heads, window, kernel] : {std::tuple{2, 1, 1}, {8, 8, 3}, {16, 8, 7}, {6, 4, 5}}) {
    RkvShape shape{1, heads, 2, 64, 140, DType::bf16, 100};
    shape.window = window, shape.kernel = kernel, shape.lambda = 0.5f;
    const RkvProblem before = make_rkv_problem(shape, {140}, 3);
    RkvProblem after = before;
    run_rkv_emulated(after, 5);
    EXPECT_EQ(check_rkv(before, after, true).failure, "") << heads << " " << window;
  }
}

TEST(RkvKernels, RefuseWhatDoesNotFit) {
  RkvArgs args{};
  EXPECT_THROW(set_rkv_scalars(args, {1, 4, 2, 48, 100, DType::f16, 50}), Error);
  EXPECT_THROW(set_rkv_scalars(args, {1, 64, 2, 64, 100, DType::f16, 50}), Error);
  EXPECT_THROW(set_rkv_scalars(args, {1, 4, 2, 64, 100, DType::f8e4m3, 50}), Error);
  EXPECT_THROW(set_rkv_scalars(args, {1, 4, 2, 64, 100, DType::f16, 8}), Error);
  EXPECT_THROW(set_rkv_scalars(args, {1, 4, 2, 64, 9000, DType::f16, 8000}), Error);
}

// Many slots cost a search half of its keys before they cost the second block of a multiprocessor.
TEST(RkvKernels, PairsOfBlocksFitWithFewerKeys) {
  constexpr int kHalfOfH200 = 233472 / 2 - 1024;
  const auto fit = [](int slots, RkvArgs& args) {
    set_rkv_scalars(args, {64, 32, 8, 128, slots, DType::bf16, slots - 128});
    return fit_rkv_pair(args, 128, 2, kHalfOfH200);
  };
  for (const auto& [slots, keys] : {std::pair{1152, 128}, {3404, 128}, {3700, 64}, {4300, 64}}) {
    RkvArgs args{};
    ASSERT_TRUE(fit(slots, args)) << slots;
    EXPECT_EQ(args.key_rows >= 128, keys == 128) << slots;
    EXPECT_GE(args.key_rows, keys) << slots;
    EXPECT_LE(rkv_layout(args, 128, 2).bytes, kHalfOfH200) << slots;
  }
  RkvArgs args{};
  EXPECT_FALSE(fit(4500, args));
}

}  // namespace
}  // namespace kvlapse
