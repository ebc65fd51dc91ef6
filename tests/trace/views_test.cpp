// Views that the dashboard draws: numbers against ones that can be counted by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"
#include "trace/views/falls.h"
#include "trace/views/kernel_view.h"
#include "trace/views/lane_top.h"
#include "trace/views/layer_life.h"
#include "trace/views/recording_pair.h"
#include "trace/views/roofline.h"

namespace kvlapse {
namespace {

using testing::HasSubstr;
using testing::IsEmpty;

test::SyntheticProcess small_process() {
  test::SyntheticProcess process;
  process.n_steps = 200;
  process.n_prompt = 30;
  process.budget = 40;
  return process;
}

TEST(Falls, FindsTheStepAndNothingInNoise) {
  std::vector<float> values;
  for (int i = 0; i < 400; ++i) values.push_back(0.9F + 0.01F * static_cast<float>((i * 7919) % 13 - 6) / 6);
  EXPECT_THAT(find_falls(values, 10, 8), IsEmpty());
  for (int i = 250; i < 400; ++i) values[i] -= 0.3F;
  const std::vector<Fall> falls = find_falls(values, 10, 8);
  ASSERT_EQ(falls.size(), 1);
  EXPECT_EQ(falls[0].index, 250);
  EXPECT_NEAR(falls[0].drop, 0.3F, 0.02F);
  EXPECT_THAT(find_falls(std::vector<float>(400, NAN), 10, 8), IsEmpty());
  EXPECT_THAT(find_falls(std::vector<float>(8, 1.0F), 10, 8), IsEmpty());
}

TEST(RecordingPair, AlignsByToken) {
  const std::vector<int32_t> a = {1, 2, 3, 4, 5}, b = {1, 2, 3, 9}, start = {1, 2};
  EXPECT_EQ(align_tokens(a, b).n_common, 3);
  EXPECT_EQ(align_tokens(a, b).first_divergence, 3);
  EXPECT_EQ(align_tokens(a, start).n_common, 2);
  EXPECT_EQ(align_tokens(a, start).first_divergence, -1);
  // After step 3 of four positions: a lost 0 at step 1, b lost 0 and 1.
  const std::vector<int32_t> lost_a = {1, kHeldToEnd, kHeldToEnd, kHeldToEnd}, lost_b = {2, 3, kHeldToEnd, 9};
  const KeepDifference kept = compare_kept(lost_a, lost_b, 4, 3);
  EXPECT_EQ(kept.both, 2);
  EXPECT_EQ(kept.only_a, 1);
  EXPECT_EQ(kept.only_b, 0);
  EXPECT_EQ(kept.neither, 1);
  EXPECT_DOUBLE_EQ(kept.jaccard(), 2.0 / 3);
}

TEST(LayerLife, EvictedAtAloneIsTheSame) {
  const test::TemporaryFolder folder;
  write_synthetic_trace(folder / "a.kvl", small_process());
  const TraceReader reader(folder / "a.kvl");
  EXPECT_EQ(read_evicted_at(reader, 0, 1), read_layer_life(reader, 0, 1).evicted_at);
}

TEST(LaneTop, IsTheHighestValueUnlessRarePeaksPressTheRest) {
  std::vector<float> values(1000);
  for (size_t i = 0; i < values.size(); ++i) values[i] = 1.0f + static_cast<float>(i % 10) / 10;
  EXPECT_FLOAT_EQ(lane_top(values), 1.9f);
  values[0] = 400;
  EXPECT_FLOAT_EQ(lane_top(values), 1.25f * 1.9f);
  for (size_t i = 0; i < 100; ++i) values[i] = 400;  // no rarity
  EXPECT_FLOAT_EQ(lane_top(values), 400);
  EXPECT_FLOAT_EQ(lane_top(std::vector<float>{NAN, 0, 0, 5}), 5);
  EXPECT_FLOAT_EQ(lane_top({}), 0);
}

TEST(KernelView, SaysWhyThereIsNothing) {
  const test::TemporaryFolder folder;
  write_synthetic_trace(folder / "a.kvl", small_process());
  const TraceReader reader(folder / "a.kvl");
  EXPECT_THAT(read_kernels(reader).absence, HasSubstr("--counters"));
  EXPECT_THAT(read_dram(reader, 0).absence, HasSubstr("--counters"));
  EXPECT_THAT(read_launches(reader, {}, 10).launches, IsEmpty());
  EXPECT_THAT(counted_steps(reader, 0), IsEmpty());
}

TEST(KernelView, CountsKernelsBytesAndSteps) {
  const test::TemporaryFolder folder;
  test::SyntheticProcess process = small_process();
  process.geometry.head_dim = 128;  // enough bytes for a share of the memory's peak
  write_synthetic_trace(folder / "a.kvl", test::with_gpu(process));
  const TraceReader reader(folder / "a.kvl");
  const std::vector<TraceStep> steps = reader.steps(0, 0, 200);
  const int n_timed = static_cast<int>(steps.size()), first = 200 - n_timed;
  const auto held = [&](int step) {  // of a kv head, before the step's eviction
    const TraceStep& row = steps[static_cast<size_t>(step - first)];
    return static_cast<int64_t>((row.held_tokens + row.evicted_tokens) / 4);
  };

  const KernelSummary all = read_kernels(reader);
  ASSERT_EQ(all.rows.size(), test::kGpuKernelsOfLayer);
  const auto found = std::ranges::find(all.rows, "fused_decode", &KernelRow::name);
  ASSERT_NE(found, all.rows.end());
  EXPECT_EQ(found->launches, 2 * n_timed);
  double bytes = 0;
  for (int step = first; step < 200; ++step)
    bytes += static_cast<double>(test::synthetic_attention_bytes(process, held(step)));
  EXPECT_NEAR(found->modelled_bytes, bytes / n_timed, 1e-6 * bytes / n_timed);
  EXPECT_EQ(found->counted, 2);
  EXPECT_NEAR(found->bytes_ratio, test::kBytesRatio, 1e-9);

  const TimeSpan span = step_span(reader, 0, first + 10, first + 15);
  EXPECT_EQ(read_kernels(reader, span).rows[0].launches, 10);
  EXPECT_EQ(read_launches(reader, span, 100).launches.size(), 10 * test::kGpuKernelsOfLayer);
  EXPECT_TRUE(read_launches(reader, span, 5).cut);
  EXPECT_THAT(counted_steps(reader, 0), testing::ElementsAre(first + test::kCountedStep));

  // The time of attention is that of its kernels, not what the host's clock says.
  const std::vector<int64_t> attention = phase_times(reader, steps, StepPhase::attention);
  ASSERT_EQ(attention.size(), steps.size());
  for (int step = first; step < 200; ++step) {
    const double ns = process.geometry.n_layers * test::synthetic_attention_ns(process, held(step));
    ASSERT_NEAR(static_cast<double>(attention[static_cast<size_t>(step - first)]), ns, 0.01 * ns + 4) << step;
  }

  const DramTimeline dram = read_dram(reader, 0);
  ASSERT_EQ(dram.mib.size(), static_cast<size_t>(n_timed));
  // Every launch's bytes, a counted share more than modelled.
  double modelled = 0;
  for (const KernelLaunch& launch : read_launches(reader, step_span(reader, 0, 150, 151), 100).launches)
    modelled += launch.modelled_bytes;
  EXPECT_NEAR(dram.mib[static_cast<size_t>(150 - first)], test::kBytesRatio * modelled / (1 << 20),
              0.01 * modelled / (1 << 20));

  const Roofline roofline = read_roofline(reader, 0);
  ASSERT_EQ(roofline.points.size(), 4);  // three of the steps, one counted kernel
  EXPECT_TRUE(roofline.points.back().counted);
  EXPECT_NEAR(roofline.memory_gbps.value, test::kPeakGbps, 1);
  EXPECT_EQ(roofline.memory_gbps.origin, Ceiling::Origin::counted);
  // 132 multiprocessors of 128 lanes at 1.98 GHz, a multiply and an add each.
  EXPECT_NEAR(roofline.compute_gflops.value, 132 * 128 * 2 * 1.98, 1);
  EXPECT_EQ(roofline.compute_gflops.origin, Ceiling::Origin::derived);
}

TEST(Roofline, TakesCeilingsFromTheDeviceName) {
  const test::TemporaryFolder folder;
  const auto roofline_of = [&](const char* name, const char* device) {
    const test::SyntheticProcess process = small_process();
    TraceHeader header = process.header();
    header.meta["device"] = device;
    TraceWriter writer(folder / name, header);
    test::SyntheticRun run(writer, process);
    while (run.step()) {
    }
    run.end("eos");
    writer.finish(false);
    return read_roofline(TraceReader(folder / name), 0);
  };
  const Roofline gpu = roofline_of("gpu.kvl", "cuda NVIDIA H100 80GB HBM3, driver 13.0");
  EXPECT_EQ(gpu.memory_gbps.origin, Ceiling::Origin::data_sheet);
  EXPECT_EQ(gpu.memory_gbps.value, 3350);
  EXPECT_EQ(gpu.compute_gflops.value, 66'900);
  EXPECT_EQ(gpu.cpu_threads, 0);
  const Roofline cpu = roofline_of("cpu.kvl", "cpu AVX2, 2 threads, int16 products");
  EXPECT_FALSE(cpu.memory_gbps.known());
  EXPECT_FALSE(cpu.compute_gflops.known());
  EXPECT_EQ(cpu.cpu_threads, 2);
  EXPECT_THAT(cpu.compute_gflops.from, HasSubstr("cpu AVX2"));
}

}  // namespace
}  // namespace kvlapse
