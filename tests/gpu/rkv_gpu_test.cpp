#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

#include "tests/support/gpu/gpu_decode.h"
#include "tests/support/gpu/gpu_rkv.h"

namespace kvlapse {
namespace {

// Beside the binary when it runs on another machine.
std::string data_folder() {
  const char* given = std::getenv("KVLAPSE_GPU_TEST_DATA");
  return given != nullptr ? given : KVLAPSE_TEST_DATA;
}

TEST(GpuRkv, KeepsWhatTheReferenceKeeps) {
  KVLAPSE_NEEDS_GPU();
  for (const char* name : {"gold_public_a", "gold_public_b"})
    EXPECT_EQ(run_rkv_golden(data_folder() + "/" + name + ".safetensors", 3, run_rkv_gpu), "") << name;
}

// Short enough for compute-sanitizer.
TEST(GpuRkv, SmallCases) {
  KVLAPSE_NEEDS_GPU();
  for (DType dtype : {DType::f32, DType::bf16}) {
    const RkvProblem before = make_rkv_problem({2, 8, 2, 64, 230, dtype, 150}, {230, 149}, 7);
    RkvProblem after = before;
    run_rkv_gpu(after);
    EXPECT_EQ(check_rkv(before, after, true).failure, "");
  }
}

TEST(GpuRkv, EveryTypeAsDefinedAndRepeatable) {
  KVLAPSE_NEEDS_GPU();
  double score_error = 0;
  int near_ties = 0;
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (int head_dim : {32, 64, 128})
      for (int budget : {150, 1024}) {
        const RkvShape shape{4, 8, 2, head_dim, budget + 128, dtype, budget};
        const RkvProblem before = make_rkv_problem(shape, {budget + 128, budget - 1, budget, budget + 77}, 7);
        RkvProblem after = before, again = before;
        run_rkv_gpu(after);
        run_rkv_gpu(again);
        const RkvCheck check = check_rkv(before, after, true);
        EXPECT_EQ(check.failure, "") << dtype_name(dtype) << " " << head_dim << " " << budget;
        score_error = std::max(score_error, check.score_error);
        near_ties += check.near_ties;
        EXPECT_EQ(after.order, again.order);
        EXPECT_EQ(after.k, again.k);
        EXPECT_EQ(after.v, again.v);
        EXPECT_EQ(after.scores, again.scores);
      }
  std::printf("largest score error %.3g of the largest score, near ties %d\n", score_error, near_ties);
  EXPECT_LT(score_error, 5e-6);
}

// Several hundred rows a block; the last one has no cluster of 16 and takes two launches.
TEST(GpuRkv, LongHeads) {
  KVLAPSE_NEEDS_GPU();
  for (const RkvShape& shape : {RkvShape{1, 4, 1, 128, 2176, DType::bf16, 2048},
                                {1, 4, 1, 32, 6000, DType::f16, 5900},
                                {1, 4, 1, 32, 4500, DType::f32, 4400}}) {
    const RkvProblem before = make_rkv_problem(shape, {shape.n_slots}, 5);
    RkvProblem after = before, again = before;
    run_rkv_gpu(after);
    run_rkv_gpu(again);
    EXPECT_EQ(check_rkv(before, after, true).failure, "") << shape.n_slots;
    EXPECT_EQ(after.order, again.order) << shape.n_slots;
    EXPECT_EQ(after.scores, again.scores) << shape.n_slots;
  }
}

// More heads than the device holds at once, each as if it were alone; again after tokens came back.
TEST(GpuRkv, ManyLongHeads) {
  KVLAPSE_NEEDS_GPU();
  constexpr int kCopies = 48;
  for (const auto& [n_slots, budget] : {std::pair{1152, 1024}, {3404, 3276}}) {
    RkvProblem one = make_rkv_problem({1, 8, 2, 128, n_slots, DType::bf16, budget}, {n_slots}, 9);
    RkvShape shape = one.shape;
    shape.batch = kCopies;
    RkvProblem many(shape);
    const auto repeat = [&](auto& to, const auto& from) {
      for (size_t i = 0; i < to.size(); i += from.size())
        std::copy(from.begin(), from.end(), to.begin() + static_cast<ptrdiff_t>(i));
    };
    repeat(many.q, one.q), repeat(many.k, one.k), repeat(many.v, one.v);
    repeat(many.order, one.order), repeat(many.positions, one.positions);
    repeat(many.value_l1, one.value_l1), repeat(many.count, one.count);
    for (int round = 0; round < 3; ++round) {
      const RkvProblem before = one;
      run_rkv_gpu(one);
      run_rkv_gpu(many);
      if (round == 0) {
        EXPECT_EQ(check_rkv(before, one, true).failure, "") << n_slots;
      }
      for (int copy = 0; copy < kCopies; ++copy) {
        const auto same = [&](const auto& all, const auto& alone) {
          return std::equal(alone.begin(), alone.end(),
                            all.begin() + static_cast<ptrdiff_t>(alone.size() * static_cast<size_t>(copy)));
        };
        ASSERT_TRUE(same(many.order, one.order) && same(many.k, one.k) && same(many.v, one.v) &&
                    same(many.positions, one.positions) && same(many.evicted, one.evicted))
            << n_slots << " round " << round << " copy " << copy;
      }
      std::fill(one.count.begin(), one.count.end(), n_slots);
      std::fill(many.count.begin(), many.count.end(), n_slots);
    }
  }
}

}  // namespace
}  // namespace kvlapse
