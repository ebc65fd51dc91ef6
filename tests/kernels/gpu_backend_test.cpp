// The GPU backend's text and bookkeeping without a GPU: the same session on the CPU and on the emulated
// device must agree bit for bit, tokens, logits, victims and what observers are shown.
#include "kernels/gpu/gpu_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/policy/scoring/redundancy.h"
#include "kernels/choice/gpu.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/support/core/policy_bench.h"
#include "tests/support/kernels/emulated_gpu.h"
#include "tests/support/kernels/session_cases.h"

namespace kvlapse {
namespace {

class GpuBackendPolicies : public testing::TestWithParam<SessionCase> {};

TEST_P(GpuBackendPolicies, EmulatedIsTheCpuBitForBit) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  EmulatedGpuCounts counts;
  GpuBackend gpu(make_emulated_gpu(&counts));
  const std::unique_ptr<Backend> cpu = make_cpu_backend(2);
  const SessionWitness expected = run_session(*cpu, model, GetParam());
  expect_same_session(run_session(gpu, model, GetParam()), expected, GetParam().policy);
  EXPECT_EQ(expected.plans.empty(), !make_policy(GetParam().policy)->info().evicts);
  EXPECT_EQ(counts.graphs_captured, 2);  // two rows, then one
  EXPECT_EQ(counts.graphs_run, 5);
}

INSTANTIATE_TEST_SUITE_P(
    Policies, GpuBackendPolicies,
    testing::Values(SessionCase{"full", "100%", DType::f32, 0, true},
                    SessionCase{"longflow", "8", DType::f32},
                    SessionCase{"longflow:granularity=kv_head:recent=3", "7", DType::f16},
                    SessionCase{"random", "7", DType::bf16, 0.8}, SessionCase{"h2o", "8", DType::f16},
                    SessionCase{"tova", "8", DType::f32},
                    SessionCase{"rkv:cadence=4:window=2", "8", DType::f32},
                    SessionCase{"streaming_llm:sinks=2:positions=cache", "8", DType::bf16, 0, true},
                    SessionCase{"streaming_llm@kvpress:sinks=1:positions=cache:cadence=4", "8", DType::f32}),
    [](const auto& i) { return "case" + std::to_string(i.index); });

// What the GPU's own test of this list relies on.
TEST(SessionCases, EveryPolicyButFullEvicts) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const std::unique_ptr<Backend> cpu = make_cpu_backend(2);
  for (const SessionCase& c : policy_cases())
    EXPECT_EQ(run_session(*cpu, model, c).plans.empty(), c.policy == "full") << c.policy;
}

// Odd widths, groups, types, biases: what the built-in model does not have.
TEST(GpuBackendShapes, EmulatedIsTheCpuBitForBit) {
  const RandomModelShape shapes[] = {
      {1, 33, 24, 40, 8, 1, 10, TensorType::f32, false, true, false},
      {1, 20, 40, 24, 3, 3, 34, TensorType::f16, true, false, true},
  };
  for (const RandomModelShape& shape : shapes) {
    const Model model = random_model(shape, 5);
    GpuBackend gpu(make_emulated_gpu());
    const std::unique_ptr<Backend> cpu = make_cpu_backend(2);
    const SessionCase c{"longflow", "8", DType::f16, 0, true, 5};
    expect_same_session(run_session(gpu, model, c), run_session(*cpu, model, c),
                        "head_dim " + std::to_string(shape.head_dim));
  }
}

// The device's own victims spare the download of attention weights.
TEST(GpuBackendVictims, AStepWaitsForTheDeviceOnce) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const std::unique_ptr<Policy> policy = make_policy("longflow");
  EmulatedGpuCounts counts;
  GpuBackend gpu(make_emulated_gpu(&counts));
  SessionOptions options;
  options.policy = policy.get();
  options.budget = parse_budget("8");
  options.max_tokens = 5;
  options.ignore_eos = true;
  DecodeSession session(gpu, model, options);
  session.add_sequence({.prompt = {1, 2, 3, 4, 5, 6, 7}, .seed = 0, .teacher = {}, .max_tokens = 0});
  session.step();
  session.step();
  const int before = counts.downloads;
  session.step();
  EXPECT_EQ(counts.downloads, before);  // the token too comes with the step's own copies
  EXPECT_GT(session.sequence(0).evictions, 0);
}

// R-KV's redundancy, more keys than a block of the search and of every kind: alike, unlike, equal, of zeros.
TEST(GpuBackendRedundancy, IsTheCpusBitForBit) {
  const std::unique_ptr<DeviceApi> gpu = make_emulated_gpu();
  for (auto [dtype, dim, threshold] :
       {std::tuple{DType::f32, 24, 0.5f}, {DType::bf16, 64, 0.5f}, {DType::f16, 16, 0.8f}}) {
    const exact::Heads heads{2, 2, dim, dtype};
    const std::vector<int32_t> counts{150, 91};
    constexpr int kSlots = 160;
    const auto width = static_cast<size_t>(dim);
    std::vector<float> keys(2 * kSlots * width);
    for (size_t i = 0; i < keys.size(); ++i) {
      const size_t slot = i / width, d = i % width;
      const uint64_t centre = mix64(slot) % 40;  // a third of the keys lies near one of 13
      const float noise = unit_float(mix64(i)) - 0.5f;
      keys[i] = centre < 13 ? unit_float(mix64(1000 + centre * 100 + d)) - 0.5f + 0.3f * noise : noise;
      if (slot % 50 == 7) keys[i] = slot % 100 == 7 ? 0.0f : 1.0f;
      if (dtype == DType::bf16) keys[i] = bf16_to_f32(f32_to_bf16(keys[i]));
      if (dtype == DType::f16) keys[i] = f16_to_f32(f32_to_f16(keys[i]));
    }
    std::vector<std::byte> plane(keys.size() * dtype_bytes(dtype));
    for (size_t i = 0; i < keys.size(); ++i) {
      const uint16_t half = dtype == DType::f16 ? f32_to_f16(keys[i]) : f32_to_bf16(keys[i]);
      std::memcpy(&plane[i * dtype_bytes(dtype)],
                  dtype == DType::f32 ? static_cast<const void*>(&keys[i]) : &half, dtype_bytes(dtype));
    }
    constexpr int kMost = 150;
    std::vector<float> unit(2 * kMost * width), own(2 * kMost), mean(2 * width), projection(2 * kMost),
        cosine(2 * kMost);
    std::vector<int32_t> similar(2 * kMost);
    gpu->launch(
        exact::UnitKeysArgs{plane.data(), counts.data(), unit.data(), own.data(), heads, kSlots, kMost});
    gpu->launch(exact::MeanKeyArgs{unit.data(), counts.data(), mean.data(), heads, kMost});
    gpu->launch(exact::SimilarKeyArgs{unit.data(), mean.data(), counts.data(), projection.data(),
                                      similar.data(), cosine.data(), heads, kMost, threshold});
    for (size_t h = 0; h < 2; ++h) {
      const auto n = static_cast<size_t>(counts[h]);
      std::vector<float> expected(n), found(projection.begin() + static_cast<ptrdiff_t>(h * kMost),
                                            projection.begin() + static_cast<ptrdiff_t>(h * kMost + n));
      FakeInputs inputs({1, 2, 2, dim, kSlots, DType::f32});
      inputs.keys_of[h].assign(&keys[h * kSlots * width], &keys[(h * kSlots + n) * width]);
      forgiving_redundancy(inputs, static_cast<int>(h), dim, threshold, expected);
      forgive({&own[h * kMost], n}, {&similar[h * kMost], n}, {&cosine[h * kMost], n}, found);
      EXPECT_EQ(std::memcmp(found.data(), expected.data(), n * sizeof(float)), 0) << dtype_name(dtype) << h;
      EXPECT_GT(std::ranges::count_if(similar, [](int32_t s) { return s > 0; }), 20);
    }
  }
}

// The decision of a compaction reads what the device leaves, not the keys.
TEST(GpuBackendRedundancy, KeysStayOnTheDevice) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const std::unique_ptr<Policy> policy = make_policy("rkv:cadence=4:window=2");
  EmulatedGpuCounts counts;
  GpuBackend gpu(make_emulated_gpu(&counts));
  SessionOptions options;
  options.policy = policy.get();
  options.budget = parse_budget("8");
  options.max_tokens = 12;
  options.ignore_eos = true;
  DecodeSession session(gpu, model, options);
  session.add_sequence({.prompt = {1, 2, 3, 4, 5, 6, 7}, .seed = 0, .teacher = {}, .max_tokens = 0});
  session.step();  // the prompt
  for (bool more = true; more;) {
    const int before = counts.downloads;
    more = session.step();
    // Of a decision the window's logits and the redundancy, once a layer.
    EXPECT_LE(counts.downloads - before, 2 * model.spec.n_layers);
  }
  EXPECT_GT(session.sequence(0).evictions, 0);
}

TEST(GpuBackendLaunches, AStepNamesItsLaunchesAndTheirBytes) {
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  const std::unique_ptr<Policy> policy = make_policy("full");
  GpuBackend gpu(make_emulated_gpu());
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = 5;
  options.ignore_eos = true;
  DecodeSession session(gpu, model, options);
  session.add_sequence({.prompt = {1, 2, 3}, .seed = 0, .teacher = {}, .max_tokens = 0});
  session.step();
  std::vector<LaunchRecord> steps[3];
  for (std::vector<LaunchRecord>& launches : steps) {  // the second comes from the captured step
    gpu.launch_singly(&launches == &steps[2]);
    session.step();
    launches = gpu.take_launches();
  }
  EXPECT_EQ(steps[2].size(), steps[0].size());
  EXPECT_TRUE(gpu.take_launches().empty());
  constexpr size_t kOfALayer = 13, kOthers = 4;  // embedding, last norm, logits, choice
  ASSERT_EQ(steps[0].size(), model.spec.n_layers * kOfALayer + kOthers);
  ASSERT_EQ(steps[1].size(), steps[0].size());
  EXPECT_EQ(steps[0].front().name, "exact_embed");
  EXPECT_EQ(steps[0].back().name, "exact_choose");
  const CacheGeometry geometry = model.spec.cache_geometry(1, DType::f32);
  for (size_t i = 0; i < steps[0].size(); ++i) {
    EXPECT_EQ(steps[0][i].name, steps[1][i].name);
    EXPECT_GT(steps[0][i].expected_bytes, 0u) << steps[0][i].name;
    if (steps[0][i].name != "exact_logits") continue;
    EXPECT_EQ(steps[0][i].phase, "attention");
    EXPECT_EQ(steps[0][i].expected_bytes, 4 * geometry.row_bytes() * geometry.n_kv_heads);
    EXPECT_EQ(steps[1][i].expected_bytes, 5 * geometry.row_bytes() * geometry.n_kv_heads);
  }
}

TEST(Device, NamesAreReadOrRefused) {
  EXPECT_EQ(parse_device("cpu"), -1);
  EXPECT_EQ(parse_device("cuda"), 0);
  EXPECT_EQ(parse_device("cuda:3"), 3);
  for (const char* wrong : {"", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda1"})
    EXPECT_THROW(parse_device(wrong), UsageError) << wrong;
}

}  // namespace
}  // namespace kvlapse
