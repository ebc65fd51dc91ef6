#include "replay/device_replay.h"

#include <gtest/gtest.h>

#include "kernels/gpu/gpu_replay.h"
#include "replay/synthetic_rows.h"
#include "tests/support/kernels/emulated_gpu.h"
#include "tests/support/replay/device_cases.h"

namespace kvlapse {
namespace {

std::unique_ptr<ReplayDevice> emulated(DeviceApi::Limits limits = {200000, true, 64}) {
  return std::make_unique<GpuReplay>(make_emulated_gpu(nullptr, limits), size_t{64} << 10);
}

TEST(DeviceReplay, VictimsOfEveryPolicy) {
  const auto device = emulated();
  EXPECT_EQ(check_device_victims(*device, {4, 2, 20, 70, 10, 3}, device_policies(), {16, 33}), "");
}

// A prompt longer than the budget, every number of query heads a kv head, blocks without clusters.
TEST(DeviceReplay, VictimsBehindLongPrompts) {
  const auto device = emulated();
  EXPECT_EQ(check_device_victims(*device, {4, 2, 20, 90, 60, 5}, device_policies(), {40}), "");
}
TEST(DeviceReplay, VictimsWithTies) {
  const auto device = emulated({200000, false, 64});
  EXPECT_EQ(check_device_victims(*device, {4, 2, 8, 80, 40, 5, 0.5f}, device_policies(), {24}), "");
}
TEST(DeviceReplay, VictimsOfEveryGroup) {
  const auto device = emulated(), small = emulated({5000, true, 32});
  for (int group = 1; group <= 8; ++group) {
    const DeviceCase at{3 * group, 3, 18, 50, 8, static_cast<uint64_t>(group)};
    EXPECT_EQ(check_device_victims(*device, at, {"h2o", "longflow", "vatp:sinks=2:granularity=layer"}, {13}), "")
        << group;
    EXPECT_EQ(check_device_victims(*small, at, {"tova", "longflow:granularity=kv_head"}, {29}), "") << group;
  }
}
TEST(DeviceReplay, Metrics) {
  const auto device = emulated();
  EXPECT_EQ(check_device_metrics(*device, {4, 2, 20, 150, 40, 3}, {"window", "random", "h2o", "longflow"}, {30, 64}),
            "");
}

}  // namespace
}  // namespace kvlapse
