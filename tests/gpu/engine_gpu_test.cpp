// The engine on a GPU: the exact backend against the CPU bit for bit, the built-in model against its golden
// tokens, the fast decoder against the CPU within rounding.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/cuda/graph_decoder.h"
#include "kernels/gpu/ahead_backend.h"
#include "tests/support/gpu/gpu_decode.h"
#include "tests/support/kernels/session_cases.h"

namespace kvlapse {
namespace {

// The test data, wherever a bundle was unpacked: KVLAPSE_TEST_DATA and KVLAPSE_MODELS of the environment
// first.
std::string place(const char* variable, const char* built_with, const char* name) {
  const char* set = std::getenv(variable);
  return std::string(set != nullptr ? set : built_with) + name;
}
std::string data(const char* name) {
  return place("KVLAPSE_TEST_DATA", KVLAPSE_TEST_DATA, name);
}
Model built_in_model() {
  return load_model(place("KVLAPSE_MODELS", KVLAPSE_MODELS, "/reasoner-6m"));
}

TEST(GpuEngine, PoliciesAreTheCpuBitForBit) {
  KVLAPSE_NEEDS_GPU();
  const Model model = load_model(data("/tiny_qwen3"));
  for (const SessionCase& c : policy_cases()) {
    const std::unique_ptr<Backend> gpu = make_cuda_backend(0), cpu = make_cpu_backend(2);
    const SessionWitness expected = run_session(*cpu, model, c);
    expect_same_session(run_session(*gpu, model, c), expected, c.policy);
  }
}

TEST(GpuEngine, ShapesAreTheCpuBitForBit) {
  KVLAPSE_NEEDS_GPU();
  const RandomModelShape shapes[] = {
      {1, 33, 24, 40, 8, 1, 10, TensorType::f32, false, true, false},
      {2, 20, 40, 24, 3, 3, 34, TensorType::f16, true, false, true},
      {2, 1000, 256, 512, 8, 2, 64, TensorType::bf16, true, false, true},
      {1, 300, 512, 1024, 16, 4, 128, TensorType::bf16, true, true, false},
      {1, 70, 96, 160, 7, 1, 32, TensorType::f16, false, false, false},
      {1, 70, 96, 160, 12, 2, 256, TensorType::bf16, false, false, false},
      {1, 70, 96, 160, 1, 1, 8, TensorType::f32, true, false, false},
  };
  for (const RandomModelShape& shape : shapes)
    for (DType dtype : {DType::f32, DType::f16, DType::bf16}) {
      const Model model = random_model(shape, 5);
      const std::unique_ptr<Backend> gpu = make_cuda_backend(0), cpu = make_cpu_backend(2);
      const SessionCase c{"longflow", "30", dtype, 0, true, 80};
      expect_same_session(run_session(*gpu, model, c), run_session(*cpu, model, c),
                          "head_dim " + std::to_string(shape.head_dim));
    }
}

std::vector<int32_t> ids(const TensorFile& file, const char* name) {
  const TensorView& t = file.get(name);
  std::vector<int32_t> values(static_cast<size_t>(t.elements()));
  std::memcpy(values.data(), t.data, t.bytes);
  return values;
}

// 2000 greedy tokens of 20 prompts, all in one batch.
TEST(GpuEngine, BuiltInModelGivesItsGoldenTokens) {
  KVLAPSE_NEEDS_GPU();
  const std::unique_ptr<TensorFile> golden = open_safetensors(data("/reasoner_golden.safetensors"));
  const std::vector<int32_t> prompts = ids(*golden, "prompt_ids"), offsets = ids(*golden, "prompt_off"),
                             expected = ids(*golden, "gen_ids");
  const int n_prompts = static_cast<int>(golden->get("gen_ids").shape[0]),
            n_tokens = static_cast<int>(golden->get("gen_ids").shape[1]);
  const Model model = built_in_model();
  const std::unique_ptr<Policy> policy = make_policy("full");
  const std::unique_ptr<Backend> backend = make_cuda_backend(0);
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = n_tokens;
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  for (int i = 0; i < n_prompts; ++i)
    session.add_sequence({{prompts.begin() + offsets[i], prompts.begin() + offsets[i + 1]}, 0, {}, 0});
  const auto start = std::chrono::steady_clock::now();
  while (session.step()) {
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  int different = 0;
  for (int i = 0; i < n_prompts; ++i) {
    const SequenceState& s = session.sequence(i);
    ASSERT_EQ(s.generated(), n_tokens);
    for (int t = 0; t < n_tokens; ++t) different += s.tokens[s.n_prompt + t] != expected[i * n_tokens + t];
  }
  EXPECT_EQ(different, 0);
  std::printf("%d tokens of %d prompts, %d different; %.1f s, %.0f tok/s\n", n_prompts * n_tokens, n_prompts,
              different, seconds.count(), n_prompts * n_tokens / seconds.count());
}

// Logits of a teacher-forced session on the CPU, [step][vocabulary].
std::vector<std::vector<float>> cpu_logits(const Model& model, const std::vector<int32_t>& tokens) {
  const std::unique_ptr<Policy> policy = make_policy("full");
  const std::unique_ptr<Backend> backend = make_cpu_backend(2);
  SessionOptions options;
  options.policy = policy.get();
  options.kv_dtype = DType::bf16;
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  session.add_sequence({{tokens[0]}, 0, {tokens.begin() + 1, tokens.end()}, 0});
  std::vector<std::vector<float>> all;
  for (bool more = true; more;) {
    more = session.step();
    const std::span<const float> logits = session.logits(0);
    all.emplace_back(logits.begin(), logits.end());
  }
  return all;
}

// Relative to the spread of a row of logits.
TEST(GpuFastDecoder, LogitsAreTheCpusWithinRounding) {
  KVLAPSE_NEEDS_GPU();
  Model models[] = {built_in_model(),
                    random_model({2, 1000, 512, 1024, 8, 2, 128, TensorType::bf16, true, true, false}, 7)};
  for (const Model& model : models) {
    std::vector<int32_t> tokens;
    for (int i = 0; i < 48; ++i) tokens.push_back((i * 37 + i * i) % model.spec.n_vocab);
    const auto expected = cpu_logits(model, tokens);
    for (int batch : {1, 3, 5, 16, 32, 40}) {
      GraphDecoderOptions options;
      options.batch = batch;
      options.n_slots = options.n_positions = 64;
      GraphDecoder decoder(model.weights.transformer, options);
      double worst = 0;
      for (size_t t = 0; t + 1 < tokens.size(); ++t) {
        decoder.set_tokens(std::vector<int32_t>(static_cast<size_t>(batch), tokens[t]));
        decoder.run(1);
        const std::vector<float> logits = decoder.logits();
        const size_t vocab = expected[t].size();
        double error = 0, norm = 0;
        for (size_t b = 0; b < static_cast<size_t>(batch); ++b)
          for (size_t i = 0; i < vocab; ++i) {
            error += std::pow(logits[b * vocab + i] - expected[t][i], 2);
            norm += std::pow(expected[t][i], 2);
          }
        worst = std::max(worst, std::sqrt(error / norm));
        const std::vector<int32_t> chosen = decoder.tokens();
        const auto best = std::max_element(logits.begin(), logits.begin() + static_cast<ptrdiff_t>(vocab));
        ASSERT_EQ(chosen[0], best - logits.begin()) << "batch " << batch << " token " << t;
      }
      if (device_attribute(cudaDevAttrComputeCapabilityMajor) == 9) {
        EXPECT_EQ(decoder.products(), batch <= 4 ? "chain" : batch <= 32 ? "product" : "cublasLt");
      }
      // Products of many sequences take bf16 activations, the others fp32 ones.
      EXPECT_LT(worst, batch > 4 ? 0.08 : 0.03)
          << model.spec.name << " batch " << batch << " " << decoder.products();
      std::printf("%s, batch %d, %s: largest relative error of a row of logits %.4f\n",
                  model.spec.name.c_str(), batch, decoder.products().c_str(), worst);
    }
  }
}

// Steps that feed themselves under eviction: every launch repeatable, no step without a slot.
void expect_repeatable(int batch) {
  const Model model = built_in_model();
  std::vector<int32_t> results[2];
  for (std::vector<int32_t>& tokens : results) {
    GraphDecoderOptions options;
    options.batch = batch;
    options.n_slots = 96;
    options.n_positions = 512;
    options.score = FusedScore::contribution;
    options.shared = true;
    GraphDecoder decoder(model.weights.transformer, options);
    std::vector<int32_t> first;
    for (int i = 0; i < batch; ++i) first.push_back(5 + i);
    decoder.set_tokens(first);
    for (int i = 0; i < 20; ++i) {
      decoder.run(20);
      for (int32_t t : decoder.tokens()) tokens.push_back(t);
    }
  }
  EXPECT_EQ(results[0], results[1]);
}
TEST(GpuFastDecoder, EvictingStepsAreRepeatable) {
  KVLAPSE_NEEDS_GPU();
  expect_repeatable(4);
}
TEST(GpuFastDecoder, EvictingStepsOfManySequencesAreRepeatable) {
  KVLAPSE_NEEDS_GPU();
  expect_repeatable(20);
}

// Tokens and victims of a session, in the order in which they were shown.
struct Shown final : StepObserver {
  void on_evicted(int sequence, int layer, const EvictionPlan& plan) override {
    for (const Drop& d : plan.drops)
      victims.push_back(
          {sequence, layer, raw(plan.step), d.kv_head, raw(d.pos), std::bit_cast<int>(d.score)});
  }
  void on_step(const StepSummary& s) override { tokens.push_back({s.sequence, raw(s.pos), s.next_token}); }
  std::vector<std::array<int, 6>> victims;
  std::vector<std::array<int, 3>> tokens;
};

Shown run_fused(const Model& model, const Policy& policy, int budget, int ahead, double* seconds) {
  constexpr int kTokens = 600;
  GraphDecoderOptions decoder;
  decoder.batch = 3;
  decoder.n_slots = policy.info().rule.peak_slots(budget);
  decoder.n_positions = 2 * kTokens;
  decoder.score = policy.info().fused;
  decoder.shared = policy.info().rule.granularity == Granularity::layer;
  decoder.recent = policy.info().rule.recent_slots(budget);
  decoder.n_reports = ahead;
  AheadBackend backend(make_cuda_backend(0),
                       std::make_unique<GraphDecoder>(model.weights.transformer, decoder));
  Shown shown;
  SessionOptions options;
  options.policy = &policy;
  options.budget = parse_budget(std::to_string(budget));
  options.max_tokens = kTokens;
  options.kv_dtype = DType::bf16;
  options.ignore_eos = true;
  options.observers = {&shown};
  DecodeSession session(backend, model, options);
  for (int n : {90, 40, 7}) {
    SequenceRequest request;
    for (int t = 0; t < n; ++t) request.prompt.push_back((t * 7 + n * 13 + t * t) % model.spec.n_vocab);
    if (n == 7) request.max_tokens = kTokens / 2;
    session.add_sequence(std::move(request));
  }
  const auto start = std::chrono::steady_clock::now();
  while (session.step()) {
  }
  *seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return shown;
}

// Steps are queued before the results of those in front are known: what is shown must not depend on how many.
TEST(GpuFastDecoder, WhatIsShownDoesNotDependOnHowFarTheDeviceIsAhead) {
  KVLAPSE_NEEDS_GPU();
  const Model model = built_in_model();
  for (const char* name : {"longflow", "longflow:granularity=kv_head"}) {
    const std::unique_ptr<Policy> policy = make_policy(name);
    double at_once = 0, ahead = 0;
    const Shown expected = run_fused(model, *policy, 64, 1, &at_once),
                seen = run_fused(model, *policy, 64, 16, &ahead);
    EXPECT_GT(expected.victims.size(), 500u * model.spec.n_layers);
    EXPECT_EQ(seen.tokens, expected.tokens) << name;
    EXPECT_EQ(seen.victims, expected.victims) << name;
    std::printf("%s: %zu victims; %.2f s a step at a time, %.2f s with 16 under way\n", name,
                seen.victims.size(), at_once, ahead);
  }
}

TEST(GpuDevice, AnIndexBeyondTheGpusIsRefusedInOneLine) {
  KVLAPSE_NEEDS_GPU();
  try {
    make_cuda_backend(97);
    FAIL() << "expected an error";
  } catch (const Error& e) {
    EXPECT_NE(std::string(e.what()).find("expected an index below"), std::string::npos) << e.what();
    EXPECT_EQ(std::string(e.what()).find('\n'), std::string::npos);
  }
}

}  // namespace
}  // namespace kvlapse
