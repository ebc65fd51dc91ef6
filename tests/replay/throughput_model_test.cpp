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
  return {"test", {80, 0, "test"}, {2000, 0, "test"}, {1000, 100, "test"}, {1000, 0, "test"}, {0, 0, "test"},
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
