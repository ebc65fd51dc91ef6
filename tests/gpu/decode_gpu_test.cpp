#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <memory>
#include <tuple>

#include "core/base/error.h"
#include "kernels/cuda/decode_step.h"
#include "tests/support/gpu/gpu_decode.h"
#include "tests/support/kernels/decode_cases.h"
#include "tests/support/kernels/host_policy.h"

namespace kvlapse {
namespace {

void expect_same_bits(const DecodeProblem& a, const DecodeProblem& b, const std::string& what) {
  EXPECT_EQ(a.out, b.out) << what;
  EXPECT_EQ(a.victim_keys, b.victim_keys) << what;
  EXPECT_EQ(a.k, b.k) << what;
  EXPECT_EQ(a.v, b.v) << what;
  EXPECT_EQ(a.k_scale.empty() || std::memcmp(a.k_scale.data(), b.k_scale.data(), a.k_scale.size() * 4) == 0,
            true)
      << what;
  EXPECT_EQ(a.protect, b.protect) << what;
  EXPECT_EQ(a.positions, b.positions) << what;
  EXPECT_EQ(a.arrivals, b.arrivals) << what;
}

class GpuDecodePath : public testing::TestWithParam<DecodePath> {
 protected:
  void SetUp() override {
    KVLAPSE_NEEDS_GPU();
    int major = 0;
    KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
    if (GetParam() == DecodePath::bulk && major != 9) GTEST_SKIP() << "no compute capability 9.0";
  }
};

void expect_as_defined_and_repeatable(const std::vector<NamedDecodeCase>& cases, DecodePath path) {
  double output_error = 0, score_error = 0;
  int near_ties = 0;
  for (const NamedDecodeCase& c : cases) {
    std::fprintf(stderr, "%s\n", c.name.c_str());  // names the case that hangs
    const DecodeKernel kernel(c.decode.shape, path, {.splits = c.splits});
    const DecodeProblem before = make_decode_problem(c.decode, kernel.plan().n_splits);
    DecodeProblem after = before, again = before;
    Stream stream;
    GpuDecode first(kernel, before), second(kernel, before);
    first.launch(stream.get());
    second.launch(stream.get());
    ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess) << c.name;
    first.download(after);
    second.download(again);
    const DecodeCheck check = check_decode_step(before, after);
    EXPECT_EQ(check.failure, "") << c.name << ", splits " << kernel.plan().n_splits;
    expect_same_bits(after, again, c.name);
    output_error = std::max(output_error, check.output_error);
    score_error = std::max(score_error, check.score_error);
    near_ties += check.near_ties;
  }
  std::printf("largest output error %.3g, score error %.3g; near ties %d\n", output_error, score_error,
              near_ties);
}
TEST_P(GpuDecodePath, EveryCaseAsDefinedAndRepeatable) {
  expect_as_defined_and_repeatable(decode_cases(/*small=*/false), GetParam());
}
TEST_P(GpuDecodePath, WithFp8AsDefinedAndRepeatable) {
  expect_as_defined_and_repeatable(fp8_decode_cases(/*small=*/false), GetParam());
}

TEST_P(GpuDecodePath, LeaveOneOutAsDefinedAndRepeatable) {
  expect_as_defined_and_repeatable(leave_one_out_cases(/*small=*/false), GetParam());
  expect_as_defined_and_repeatable(fp8_cases(leave_one_out_cases(/*small=*/true)), GetParam());
}

// One launch each, without repeats.
void expect_as_defined_once(const std::vector<NamedDecodeCase>& cases, DecodePath path) {
  for (const NamedDecodeCase& c : cases) {
    const DecodeKernel kernel(c.decode.shape, path, {.splits = c.splits});
    const DecodeProblem before = make_decode_problem(c.decode, kernel.plan().n_splits);
    DecodeProblem after = before;
    Stream stream;
    GpuDecode gpu(kernel, before);
    gpu.launch(stream.get());
    ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess) << c.name;
    gpu.download(after);
    EXPECT_EQ(check_decode_step(before, after).failure, "") << c.name;
  }
}
// Short enough for compute-sanitizer's memcheck.
TEST_P(GpuDecodePath, SmallCases) {
  std::vector<NamedDecodeCase> cases = decode_cases(/*small=*/true), fp8 = fp8_decode_cases(/*small=*/true);
  const std::vector<NamedDecodeCase> left_out = leave_one_out_cases(/*small=*/true);
  for (size_t i = 0; i < fp8.size(); i += 2) cases.push_back(fp8[i]);
  for (size_t i = 0; i < left_out.size(); i += 2) cases.push_back(left_out[i]);
  expect_as_defined_once(cases, GetParam());
}

// What threads and blocks hand each other, a case for each way; short enough for racecheck.
TEST_P(GpuDecodePath, CasesOfExchange) {
  std::vector<NamedDecodeCase> cases;
  const auto add = [&](const std::vector<NamedDecodeCase>& from, std::initializer_list<const char*> names) {
    for (const char* name : names) {
      const auto at = std::find_if(from.begin(), from.end(), [&](const auto& c) { return c.name == name; });
      ASSERT_NE(at, from.end()) << name;
      cases.push_back(*at);
    }
  };
  add(decode_cases(/*small=*/true), {"plain", "shared four splits", "growing, splits", "filling up"});
  add(fp8_decode_cases(/*small=*/true), {"shared one split, fp8", "ragged heads, fp8"});
  add(leave_one_out_cases(/*small=*/true), {"protected, shared", "steep, three splits 15"});
  expect_as_defined_once(cases, GetParam());
}

// What only a tuned plan chooses: split counts that are no power of two, every ring depth, two blocks a
// multiprocessor.
TEST_P(GpuDecodePath, TunedPlansAsDefined) {
  auto check = [&](const DecodeCase& c, const DecodeTuning& tuning) {
    const std::string what = "S " + std::to_string(c.shape.n_slots) + " splits " +
                             std::to_string(tuning.splits) + " stages " + std::to_string(tuning.stages) +
                             " blocks " + std::to_string(tuning.blocks_per_multiprocessor);
    std::fprintf(stderr, "%s\n", what.c_str());
    std::unique_ptr<DecodeKernel> kernel;
    try {
      kernel = std::make_unique<DecodeKernel>(c.shape, GetParam(), tuning);
    } catch (const Error& e) {
      std::printf("%s: not planned: %s\n", what.c_str(), e.what());
      return;
    }
    const DecodeProblem before = make_decode_problem(c, kernel->plan().n_splits);
    DecodeProblem after = before;
    Stream stream;
    GpuDecode gpu(*kernel, before);
    gpu.launch(stream.get());
    ASSERT_EQ(cudaStreamSynchronize(stream.get()), cudaSuccess) << what;
    gpu.download(after);
    EXPECT_EQ(check_decode_step(before, after).failure, "") << what;
  };
  DecodeCase c;
  c.shape = {1, 32, 8, 128, 3276, DType::bf16};
  c.tokens = {4000};
  c.recent = 1;
  for (int splits = 1; splits <= 16; ++splits)
    for (int blocks : {1, 2}) check(c, {.splits = splits, .blocks_per_multiprocessor = blocks});
  for (int stages : {4, 6, 8, 10}) check(c, {.splits = 2, .stages = stages});
  for (int groups : {1, 3, 5}) check(c, {.splits = 3, .groups = groups});
  c.score = FusedScore::leave_one_out, c.shape.leave_one_out = true;
  for (int splits = 1; splits <= 16; splits += 3)
    for (int blocks : {1, 2}) check(c, {.splits = splits, .blocks_per_multiprocessor = blocks});
  c.score = FusedScore::contribution;
  c.shape = {20, 32, 8, 128, 1024, DType::bf16};
  c.tokens.assign(20, 1500);
  for (int splits : {1, 2, 3}) check(c, {.splits = splits, .blocks_per_multiprocessor = 2});
  c.shape = {60, 32, 8, 128, 500, DType::bf16};  // items follow each other in a block
  c.tokens.assign(60, 900);
  c.tokens[7] = 20;
  for (ReadAhead ahead : {ReadAhead::no, ReadAhead::yes})
    check(c, {.splits = 1, .blocks_per_multiprocessor = 1, .ahead = ahead});
}

// 1000 steps, each compared slot by slot with fp64 from the state that the step before left.
TEST_P(GpuDecodePath, ThousandStepsClosedLoop) {
  for (auto [shared, dtype, left_out] : {std::tuple{false, DType::bf16, false},
                                         {true, DType::bf16, false},
                                         {true, DType::f8e4m3, false},
                                         {false, DType::bf16, true},
                                         {true, DType::f16, true}}) {
    DecodeCase c;
    c.shape = {3, 8, 2, 64, 150, dtype};
    c.tokens = {0, 90, 400};
    c.budget = 140, c.recent = 16, c.pinned = 4, c.shared = shared;
    c.score = left_out ? FusedScore::leave_one_out
              : shared ? FusedScore::contribution
                       : FusedScore::accumulated_contribution;
    c.shape.leave_one_out = left_out;
    const DecodeKernel kernel(c.shape, GetParam(), {.splits = 2});
    DecodeProblem p = make_decode_problem(c, kernel.plan().n_splits);
    Stream stream;
    GpuDecode gpu(kernel, p);
    int near_ties = 0;
    for (uint64_t step = 0; step < 1000; ++step) {
      draw_decode_token(p, c, step);
      gpu.upload_token(p);
      const DecodeProblem before = p;
      gpu.launch(stream.get());
      launch_advance_positions(stream.get(), gpu.step_pos(), c.shape.batch);
      gpu.download(p);
      DecodeProblem after = p;
      after.step_pos = before.step_pos;
      const DecodeCheck check = check_decode_step(before, after);
      ASSERT_EQ(check.failure, "") << "step " << step;
      near_ties += check.near_ties;
    }
    EXPECT_EQ(p.flags[0], 0u);
    EXPECT_LE(near_ties, 2);
  }
}

TEST_P(GpuDecodePath, GraphReplaysEqualLaunches) {
  for (bool left_out : {false, true}) {
    DecodeCase c;
    c.shape = {2, 16, 4, 128, 300, DType::bf16};
    c.tokens = {250, 1000};
    c.recent = 8, c.shared = true;
    c.shape.leave_one_out = left_out;
    if (left_out) c.score = FusedScore::leave_one_out;
    const DecodeKernel kernel(c.shape, GetParam(), {.splits = 4});
    const DecodeProblem start = make_decode_problem(c, 4);
    DecodeProblem launched = start, replayed = start;
    Stream stream;
    GpuDecode direct(kernel, start), graphed(kernel, start);
    const Graph graph(stream, [&] {
      graphed.launch(stream.get());
      launch_advance_positions(stream.get(), graphed.step_pos(), c.shape.batch);
    });
    for (int step = 0; step < 200; ++step) {
      direct.launch(stream.get());
      launch_advance_positions(stream.get(), direct.step_pos(), c.shape.batch);
      graph.launch(stream);
    }
    direct.download(launched);
    graphed.download(replayed);
    expect_same_bits(launched, replayed, "graph");
    EXPECT_EQ(launched.flags[0], 0u);
  }
}

// A chain of launches over layers of their own, each starting before the one in front has ended.
TEST_P(GpuDecodePath, OverlappingLaunchesEqualPlainOnes) {
  constexpr int kLayers = 12;
  for (bool left_out : {false, true}) {
    DecodeCase c;
    c.shape = {4, 32, 8, 128, 700, DType::f16};
    c.tokens = {5000, 6000, 650, 7000};
    c.recent = 8;
    c.shape.leave_one_out = left_out;
    if (left_out) c.score = FusedScore::leave_one_out;
    const DecodeKernel kernel(c.shape, GetParam());
    std::vector<std::unique_ptr<GpuDecode>> plain, early;
    std::vector<DecodeProblem> problems;
    for (int layer = 0; layer < kLayers; ++layer) {
      c.seed = layer + 1;
      problems.push_back(make_decode_problem(c, kernel.plan().n_splits));
      plain.push_back(std::make_unique<GpuDecode>(kernel, problems.back()));
      early.push_back(std::make_unique<GpuDecode>(kernel, problems.back()));
    }
    Stream stream;
    const Graph graph(stream, [&] {
      for (auto& layer : early) layer->launch(stream.get(), /*early_state=*/true);
    });
    for (int step = 0; step < 20; ++step) {
      for (auto& layer : plain) layer->launch(stream.get());
      graph.launch(stream);
    }
    for (int layer = 0; layer < kLayers; ++layer) {
      DecodeProblem a = problems[layer], b = problems[layer];
      plain[layer]->download(a);
      early[layer]->download(b);
      expect_same_bits(a, b, "layer " + std::to_string(layer));
    }
  }
}

// The host's policy and evictor are the definition of a victim.
TEST_P(GpuDecodePath, VictimsOfTheHostPolicies) {
  int decisions = 0, differ = 0;
  for (const char* spec : {"longflow:recent=4", "longflow:recent=4:granularity=kv_head", "caote:recent=4",
                           "caote:recent=4:granularity=layer"}) {
    const DecodeCase c = case_of_policy(spec);
    const float within = c.shape.leave_one_out ? 1e-4f : 1e-5f;
    const DecodeKernel kernel(c.shape, GetParam(), {.splits = 2});
    DecodeProblem p = make_decode_problem(c, 2);
    Stream stream;
    GpuDecode gpu(kernel, p);
    for (uint64_t step = 0; step < 100; ++step) {
      draw_decode_token(p, c, step);
      gpu.upload_token(p);
      gpu.launch(stream.get());
      gpu.download(p);
      for (int b = 0; b < c.shape.batch; ++b) {
        const HostVictims host = host_policy_victims(p, b, spec);
        for (size_t row = 0; row < host.slots.size(); ++row, ++decisions) {
          const int found = device_victim(p, b, static_cast<int>(row));
          if (found == host.slots[row]) continue;
          ++differ;
          ASSERT_GE(found, 0);
          EXPECT_LE(host.scores[row][found], host.scores[row][host.slots[row]] * (1 + within))
              << spec << " step " << step << " row " << row;
        }
      }
      launch_advance_positions(stream.get(), gpu.step_pos(), c.shape.batch);
      for (int32_t& pos : p.step_pos) ++pos;
    }
  }
  EXPECT_GT(decisions, 500);
  std::printf("%d decisions, %d within rounding of a tie\n", decisions, differ);
}

INSTANTIATE_TEST_SUITE_P(Paths, GpuDecodePath, testing::Values(DecodePath::bulk, DecodePath::cp_async),
                         [](const auto& i) { return i.param == DecodePath::bulk ? "bulk" : "cp_async"; });

}  // namespace
}  // namespace kvlapse
