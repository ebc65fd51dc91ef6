#include "replay/throughput_model.h"

#include <gtest/gtest.h>

#include "core/base/error.h"
#include "core/policy/spec.h"
#include "replay/memory_simulator.h"

namespace kvlapse {
namespace {

DecoderShape llama_8b() {
  return {{32, 32, 8, 128, 0, DType::f16}, 15008800000, 16060522496};
}

GpuProfile plain_gpu() {
  return {"test",
          {80, 0, "test"},
          {2000, 0, "test"},
          {1000, 100, "test"},
          {1000, 0, "test"},
          {0, 0, "test"},
          {0, 0, "test"},
          {},
          1.0};
}

// The tokens that attention reads, step by step, against the rule written out naively.
TEST(SlotsAt, FollowsTheRule) {
  for (const char* spec : {"full", "longflow", "random:cadence=64", "streaming_llm", "random:cadence=128"}) {
    for (int n_prompt : {5, 150, 700}) {
      std::unique_ptr<Policy> policy = make_policy(spec);
      const EvictionRule& rule = policy->info().rule;
      const int budget = 256, target = budget - rule.headroom;
      int held = 0;
      for (int n = 1; n <= 2000; ++n) {
        ++held;
        EXPECT_EQ(slots_at(*policy, budget, n_prompt, n), held)
            << spec << " prompt " << n_prompt << " token " << n;
        if (!policy->info().evicts) continue;
        bool due = n == n_prompt || (n > n_prompt && n % rule.cadence == 0);
        if (due && held > target) held = target;
        if (n < n_prompt) continue;
      }
    }
  }
}

TEST(Predict, CountsTheBytesOfAStep) {
  std::unique_ptr<Policy> full = make_policy("full");
  Prediction p = predict(plain_gpu(), llama_8b(), *full, 0, 2, 1000, 1);
  EXPECT_EQ(p.kv_bytes, 2 * 1001 * int64_t{131072});
  EXPECT_EQ(p.eviction_bytes, 0);
  double expected = 15008800000 / 2000e9 + 2 * 1001 * 131072 / 1000e9 + 1000e-6;
  EXPECT_NEAR(p.step_ms, expected * 1e3, 1e-9);
  EXPECT_NEAR(p.tokens_per_s, 2 / expected, 1e-6);
  EXPECT_GT(p.tokens_per_s_error, 0);
}

// A mix of short and long requests: the batch is bounded by their mean, time by the mean over tokens.
TEST(LargestBatch, OfAMixOfLengths) {
  std::unique_ptr<Policy> full = make_policy("full"), longflow = make_policy("longflow");
  const std::vector<RequestLength> mix = {{100, 900, 512}, {100, 2900, 512}};
  GpuProfile gpu = plain_gpu();
  const double room = 80.0 * 1024 * 1024 * 1024 - 16060522496, token = 131072;
  EXPECT_EQ(largest_batch(gpu, llama_8b(), *full, mix), static_cast<int>(room / (2000 * token)));
  EXPECT_GT(largest_batch(gpu, llama_8b(), *longflow, mix), 3 * largest_batch(gpu, llama_8b(), *full, mix));
  const Prediction p = predict(gpu, llama_8b(), *full, 4, mix);
  double slots = 0;
  for (const RequestLength& r : mix)
    for (int n = r.n_prompt + 1; n <= r.n_prompt + r.n_output; ++n) slots += n;
  EXPECT_NEAR(p.slots_mean, slots / 3800, 1e-9);
  EXPECT_EQ(p.memory_bytes, 16060522496 + 4 * 2000 * int64_t{131072});
  EXPECT_EQ(p.slots_peak, 3000);
}

std::vector<MeasuredStep> made_up_steps() {
  std::vector<MeasuredStep> steps;
  for (const auto& [weights, kv] :
       std::vector<std::pair<double, double>>{{3e9, 1e8}, {3e9, 2e9}, {15e9, 1e8}, {15e9, 6e10}, {3e9, 5e10}})
    steps.push_back({"m", 1, 1, 0.4 + weights / 2.7e9 + kv / 2.9e9, static_cast<int64_t>(weights),
                     static_cast<int64_t>(kv)});
  return steps;
}

TEST(FitProfile, FindsWhatTheStepsWereMadeOf) {
  std::vector<MeasuredStep> steps = made_up_steps();
  const GpuProfile gpu = fit_profile(plain_gpu(), steps, "a test");
  EXPECT_NEAR(gpu.step_overhead_us.value, 400, 1e-6);
  EXPECT_NEAR(gpu.weight_read_gbps.value, 2700, 1e-6);
  EXPECT_NEAR(gpu.kv_read_gbps.value, 2900, 1e-6);
  EXPECT_NEAR(gpu.weight_read_gbps.error, 0, 1e-3);
  EXPECT_EQ(gpu.weight_read_gbps.provenance, "fitted to 5 steps of a test");
  for (const MeasuredStep& step : steps) EXPECT_NEAR(predicted_step_ms(gpu, step), step.step_ms, 1e-9);
  for (const CheckedStep& step : leave_one_out(gpu, steps)) EXPECT_NEAR(step.difference_ratio, 0, 1e-9);
  // A tenth off in one step: its own prediction, from the others, stays where it was.
  steps[1].step_ms *= 1.1;
  EXPECT_NEAR(leave_one_out(gpu, steps)[1].difference_ratio, 1 / 1.1 - 1, 1e-9);
  EXPECT_GT(fit_profile(plain_gpu(), steps, "a test").weight_read_gbps.error, 1);
}

// The same with counted launches: 2 a layer at batch 1, 9 at batch 32, 3 us each.
TEST(FitProfile, TellsLaunchesFromTheStepsOverhead) {
  std::vector<MeasuredStep> steps = made_up_steps();
  steps.push_back(steps[2]);
  for (size_t i = 0; i < steps.size(); ++i) {
    steps[i].batch = i % 2 == 0 ? 1 : 32;
    steps[i].n_layers = i < 3 ? 36 : 28;
    steps[i].launches = steps[i].n_layers * (i % 2 == 0 ? 2 : 9);
    steps[i].step_ms += 3e-3 * steps[i].launches;
  }
  const GpuProfile gpu = fit_profile(plain_gpu(), steps, "a test");
  EXPECT_NEAR(gpu.launch_us.value, 3, 1e-6);
  EXPECT_NEAR(gpu.step_overhead_us.value, 400, 1e-3);
  EXPECT_NEAR(gpu.weight_read_gbps.value, 2700, 1e-3);
  ASSERT_EQ(gpu.launches.size(), 2u);
  EXPECT_EQ(gpu.launches[0].batch, 1);
  EXPECT_NEAR(gpu.launches[0].per_layer, 2, 1e-12);
  EXPECT_NEAR(gpu.launches[1].per_layer, 9, 1e-12);
  for (const MeasuredStep& step : steps) EXPECT_NEAR(predicted_step_ms(gpu, step), step.step_ms, 1e-9);

  // A batch has the launches of the next larger measured one, the largest's above all.
  std::unique_ptr<Policy> full = make_policy("full");
  GpuProfile without = gpu;
  without.launch_us.value = 0;
  const int n_layers = llama_8b().geometry.n_layers;
  for (const auto& [batch, per_layer] : std::vector<std::pair<int, int>>{{1, 2}, {2, 9}, {32, 9}, {100, 9}})
    EXPECT_NEAR(predict(gpu, llama_8b(), *full, 0, batch, 10, 10).step_ms -
                    predict(without, llama_8b(), *full, 0, batch, 10, 10).step_ms,
                3e-3 * n_layers * per_layer, 1e-9)
        << batch;
  // Where more launches take less time it is other things that differ: three unknowns.
  std::vector<MeasuredStep> other = steps;
  for (MeasuredStep& step : other) step.step_ms -= 4e-3 * step.launches;
  const GpuProfile three = fit_profile(plain_gpu(), other, "a test");
  EXPECT_EQ(three.launch_us.value, 0);
  EXPECT_TRUE(three.launches.empty());
  EXPECT_LT(three.step_overhead_us.value, 400);
  // Uncounted in one step: three unknowns.
  steps[0].launches = 0;
  EXPECT_EQ(fit_profile(plain_gpu(), steps, "a test").launch_us.value, 0);
}

TEST(FitProfile, RefusesStepsThatDoNotTell) {
  std::vector<MeasuredStep> steps = made_up_steps();
  EXPECT_THROW(fit_profile(plain_gpu(), std::span(steps).first(3), "a test"), Error);
  for (MeasuredStep& step : steps) step = steps[0];
  EXPECT_THROW(fit_profile(plain_gpu(), steps, "a test"), Error);
  steps = made_up_steps();
  steps[2].step_ms = 0;
  EXPECT_THROW(fit_profile(plain_gpu(), steps, "a test"), Error);
}

TEST(LargestBatch, CountsWeightsAndState) {
  std::unique_ptr<Policy> full = make_policy("full");
  GpuProfile gpu = plain_gpu();
  int n = largest_batch(gpu, llama_8b(), *full, 0, 1, 8191);
  double room = 80.0 * 1024 * 1024 * 1024 - 16060522496;
  EXPECT_EQ(n, static_cast<int>(room / (8192 * 131072.0)));
  gpu.memory_gib.value = 10;
  EXPECT_EQ(largest_batch(gpu, llama_8b(), *full, 0, 1, 8191), 0);
  EXPECT_THROW(predict(gpu, llama_8b(), *full, 0, 0, 1, 1), UsageError);
}

}  // namespace
}  // namespace kvlapse
