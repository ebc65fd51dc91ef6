#include "replay/device_replay.h"

#include <gtest/gtest.h>

#include <limits>

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
    EXPECT_EQ(check_device_victims(*device, at, {"h2o", "longflow", "vatp:sinks=2:granularity=layer"}, {13}),
              "")
        << group;
    EXPECT_EQ(check_device_victims(*small, at, {"tova", "longflow:granularity=kv_head"}, {29}), "") << group;
  }
}
// Enough threads for some to sum exponentials while the others take them.
TEST(DeviceReplay, VictimsOfManyThreads) {
  const std::vector<std::string> specs = {"h2o", "h2o:gqa=max:granularity=layer", "longflow",
                                          "vatp:sinks=2:granularity=layer", "tova:ties=last"};
  EXPECT_EQ(check_device_victims(*emulated({200000, true, 160}), {5, 1, 12, 90, 10, 6}, specs, {48, 70}), "");
  EXPECT_EQ(check_device_victims(*emulated({200000, true, 256}), {16, 8, 8, 34, 10, 7},
                                 {"longflow", "h2o:gqa=max:granularity=layer"}, {24}),
            "");
  EXPECT_EQ(
      check_device_victims(*emulated({5000, true, 128}), {3, 1, 8, 140, 110, 8}, {"h2o", "tova"}, {120}), "");
}
TEST(DeviceReplay, MetricsOfEveryPolicy) {
  const auto device = emulated();
  EXPECT_EQ(check_device_metrics(*device, {4, 2, 20, 110, 40, 3}, device_policies(), {30, 64}), "");
}
// Groups that do not fill their lanes, several columns of outputs, part of the steps.
TEST(DeviceReplay, MetricsOfOtherShapes) {
  const auto device = emulated();
  const std::vector<std::string> specs = {"longflow", "h2o", "streaming_llm"};
  EXPECT_EQ(check_device_metrics(*device, {7, 1, 136, 100, 20, 3}, specs, {30}), "");
  EXPECT_EQ(check_device_metrics(*device, {6, 3, 72, 100, 20, 4}, specs, {40}, 30, 77), "");
  EXPECT_EQ(check_device_metrics(*device, {1, 1, 6, 70, 1, 5, 0.5f}, specs, {20}), "");
}

// The sizes that have kernels of their own.
TEST(DeviceReplay, VictimsOfCommonSizes) {
  const auto device = emulated();
  for (int dim : {64, 128})
    EXPECT_EQ(check_device_victims(*device, {8, 2, dim, 90, 10, 9}, {"h2o", "longflow"}, {48}), "") << dim;
}
// More tokens than a list or a walk takes at a time; steps from the middle of a tile on.
TEST(DeviceReplay, MetricsOfManyTokens) {
  const auto device = emulated();
  EXPECT_EQ(check_device_metrics(*device, {4, 1, 8, 4300, 4230, 10}, {"random"}, {3000, 900}, 4250, 4290),
            "");
}

// More configurations than a block of masses takes.
TEST(DeviceReplay, MetricsOfManyConfigurations) {
  const auto device = emulated();
  std::vector<int> budgets;
  for (int budget = 10; budget < 43; ++budget) budgets.push_back(budget);
  EXPECT_EQ(check_device_metrics(*device, {2, 1, 8, 50, 5, 11}, {"random"}, budgets), "");
}

// Nearly all weight on what was dropped.
TEST(DeviceReplay, MetricsOfRowsWithLittleHeld) {
  EmulatedGpuCounts counts;
  GpuReplay device(make_emulated_gpu(&counts, {200000, true, 64}), size_t{64} << 10);
  EXPECT_EQ(check_device_metrics(device, {2, 1, 16, 100, 20, 3, 0, 3}, {"window", "random"}, {10}), "");
  EXPECT_GT(counts.repairs, 0);
}

TEST(DeviceReplay, RefusesWhatItCannotServe) {
  const auto device = emulated();
  for (const char* spec : {"rkv", "tova@kvpress", "streaming_llm:positions=cache", "full", "h2o:cast=fp16",
                           "quest", "random:cadence=64", "vatp@longflow:value_norm=1"})
    EXPECT_FALSE(DeviceReplayer::supports(*make_policy(spec))) << spec;
  for (const std::string& spec : device_policies())
    EXPECT_TRUE(DeviceReplayer::supports(*make_policy(spec))) << spec;
  const MemoryRows rows = synthetic_rows({1, 2, 1, 8, 0, DType::f32}, 40, 8, 1);
  const DeviceReplayer replayer(rows, {}, *device);
  EXPECT_THROW(replayer.run(0, {{make_policy("rkv"), 16}}), Error);
}

TEST(DeviceReplay, RefusesValuesBeyondHalfPrecision) {
  const auto device = emulated();
  MemoryRows rows = synthetic_rows({1, 2, 1, 8, 0, DType::f32}, 40, 8, 1);
  const DeviceReplayer replayer(rows, {}, *device);
  rows.row(0, 0, RowKind::v, 30)[3] = -65504.0f;
  EXPECT_NO_THROW(replayer.run(0, {{make_policy("window"), 16}}));
  rows.row(0, 0, RowKind::v, 30)[3] = -65600.0f;
  EXPECT_THROW(replayer.run(0, {{make_policy("window"), 16}}), Error);
}

TEST(DeviceReplay, RefusesLogitsThatAreNotFinite) {
  const auto device = emulated();
  MemoryRows rows = synthetic_rows({1, 2, 1, 8, 0, DType::f32}, 60, 8, 1);
  rows.row(0, 0, RowKind::k, 30)[3] = std::numeric_limits<float>::infinity();
  EXPECT_THROW(DeviceReplayer(rows, {}, *device).run(0, {{make_policy("window"), 16}}), Error);
}

}  // namespace
}  // namespace kvlapse
