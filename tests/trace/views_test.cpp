// Views that the dashboard draws: numbers against ones that can be counted by hand.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"
#include "trace/views/falls.h"
#include "trace/views/kernel_view.h"
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
  write_synthetic_trace(folder / "a.kvl", small_process());
  test::add_gpu_rows(folder / "a.kvl", 2);
  const TraceReader reader(folder / "a.kvl");
  const int n_timed = static_cast<int>(reader.steps(0, 0, 200).size()), first = 200 - n_timed;

  const KernelSummary all = read_kernels(reader);
  ASSERT_EQ(all.rows.size(), 2);
  const KernelRow& attention = all.rows[0].name == "fused_decode" ? all.rows[0] : all.rows[1];
  EXPECT_EQ(attention.name, "fused_decode");
  EXPECT_EQ(attention.launches, 2 * n_timed);
  EXPECT_DOUBLE_EQ(attention.modelled_bytes, test::kAttentionBytes);
  EXPECT_EQ(attention.counted, 2);
  EXPECT_NEAR(attention.bytes_ratio, test::kBytesRatio, 1e-9);

  const TimeSpan span = step_span(reader, 0, first + 10, first + 15);
  EXPECT_EQ(read_kernels(reader, span).rows[0].launches, 10);
  EXPECT_EQ(read_launches(reader, span, 100).launches.size(), 20);
  EXPECT_TRUE(read_launches(reader, span, 5).cut);
  EXPECT_THAT(counted_steps(reader, 0), testing::ElementsAre(first + 3));

  const DramTimeline dram = read_dram(reader, 0);
  ASSERT_EQ(dram.mib.size(), static_cast<size_t>(n_timed));
  EXPECT_NEAR(dram.mib[20], static_cast<double>(test::kSampleBytes) / (1 << 20), 0.05);

  const Roofline roofline = read_roofline(reader, 0);
  ASSERT_EQ(roofline.points.size(), 4);  // three of the steps, one counted kernel
  EXPECT_TRUE(roofline.points.back().counted);
  // 1.02 MB in 1 us at half of the peak.
  EXPECT_NEAR(roofline.ceiling_gbps, 2 * test::kBytesRatio * 1e3, 1);
}

}  // namespace
}  // namespace kvlapse
