#include <gtest/gtest.h>

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
    for (int blocks : {1, 3, 8}) {
      RkvProblem after = before;
      after.shape.blocks = blocks;
      run_rkv_gpu(after);
      EXPECT_EQ(check_rkv(before, after, true).failure, "") << blocks;
    }
  }
}

// Bit for bit; the search takes several rounds, a warp has several tiles.
TEST(GpuRkv, AnyNumberOfBlocksAlike) {
  KVLAPSE_NEEDS_GPU();
  for (auto [n_slots, budget] : {std::pair{1152, 1024}, {3404, 3276}, {8192, 8000}}) {
    const RkvProblem before = make_rkv_problem({1, 4, 1, 128, n_slots, DType::bf16, budget}, {n_slots}, 3);
    RkvProblem one = before;
    one.shape.blocks = 1;
    run_rkv_gpu(one);
    if (n_slots < 8192) {
      EXPECT_EQ(check_rkv(before, one, true).failure, "") << n_slots;
    }
    for (int blocks : {2, 4, 5, 8}) {
      RkvProblem many = before;
      many.shape.blocks = blocks;
      run_rkv_gpu(many);
      EXPECT_EQ(one.order, many.order) << n_slots << " " << blocks;
      EXPECT_EQ(one.scores, many.scores) << n_slots << " " << blocks;
      EXPECT_EQ(one.k, many.k) << n_slots << " " << blocks;
      EXPECT_EQ(one.v, many.v) << n_slots << " " << blocks;
    }
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

}  // namespace
}  // namespace kvlapse
