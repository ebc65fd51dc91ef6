#include <gtest/gtest.h>

#include "kernels/choice/gpu.h"
#include "tests/support/gpu/gpu_decode.h"
#include "tests/support/replay/device_cases.h"

namespace kvlapse {
namespace {

TEST(GpuReplay, SmallCases) {
  KVLAPSE_NEEDS_GPU();
  const auto device = make_cuda_replay(0);
  EXPECT_EQ(check_device_victims(*device, {4, 2, 20, 200, 40, 3}, device_policies(), {33, 64}), "");
  EXPECT_EQ(check_device_victims(*device, {4, 2, 8, 150, 60, 5, 0.5f}, device_policies(), {40}), "");  // ties
  for (int group = 1; group <= 8; ++group)
    EXPECT_EQ(check_device_victims(*device, {3 * group, 3, 18, 100, 8, static_cast<uint64_t>(group)},
                                   {"h2o", "longflow", "vatp:sinks=2:granularity=layer"}, {33}),
              "")
        << group;
  EXPECT_EQ(check_device_metrics(*device, {4, 2, 20, 300, 40, 3}, device_policies(), {30, 100}), "");
}

TEST(GpuReplay, VictimsOfTheCpu) {
  KVLAPSE_NEEDS_GPU();
  const auto device = make_cuda_replay(0);
  for (int n_kv : {1, 4, 8})
    EXPECT_EQ(
        check_device_victims(*device, {4 * n_kv, n_kv, 128, 2500, 100, 11}, device_policies(), {250, 900}),
        "")
        << n_kv;
  // A prompt over the budget, and more slots than a block's shared memory holds.
  EXPECT_EQ(check_device_victims(*device, {14, 2, 128, 2500, 1200, 12}, device_policies(), {1000}), "");
  EXPECT_EQ(check_device_victims(*device, {8, 1, 32, 9000, 7500, 13}, {"h2o", "longflow", "random"}, {8000}),
            "");
}

TEST(GpuReplay, MetricsOfTheCpu) {
  KVLAPSE_NEEDS_GPU();
  const auto device = make_cuda_replay(0);
  EXPECT_EQ(check_device_metrics(*device, {8, 2, 128, 2000, 100, 14}, device_policies(), {400}), "");
  EXPECT_EQ(check_device_metrics(*device, {14, 2, 64, 1500, 400, 15}, {"longflow", "h2o", "random"}, {300}),
            "");
  EXPECT_EQ(check_device_metrics(*device, {8, 2, 256, 1500, 400, 16}, {"longflow", "h2o", "random"}, {300},
                                 700, 1200),
            "");
}

}  // namespace
}  // namespace kvlapse
