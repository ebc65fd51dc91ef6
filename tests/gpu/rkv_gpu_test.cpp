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

}  // namespace
}  // namespace kvlapse
