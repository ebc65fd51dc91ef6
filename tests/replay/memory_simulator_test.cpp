#include "replay/memory_simulator.h"

#include <gtest/gtest.h>

#include <map>

#include "core/base/error.h"
#include "core/policy/spec.h"
#include "replay/page_pool.h"

namespace kvlapse {
namespace {

// Llama-3.1-8B and Qwen3-8B, published figures.
TEST(CacheBytes, MatchesKnownModels) {
  CacheGeometry llama{32, 32, 8, 128, 0, DType::f16};
  EXPECT_EQ(llama.cache_bytes(30000), 3932160000u);
  CacheGeometry qwen{36, 32, 8, 128, 0, DType::bf16};
  EXPECT_EQ(qwen.token_bytes(), 144u * 1024);
}

EvictionPlan drop_one(int kv_head, int slot, int pos) {
  EvictionPlan plan;
  plan.reclaim = Reclaim::fill;
  plan.drops.push_back({kv_head, Slot{slot}, Pos{pos}, 0, {}});
  return plan;
}

TEST(MemorySimulator, FillNeverGrowsPastTheBudget) {
  CacheGeometry g{1, 2, 2, 4, 8, DType::f32};
  std::unique_ptr<Policy> policy = make_policy("longflow");
  MemorySimulator memory(g, *policy, 4, 4,
                         {.block_tokens = 2, .table = BlockTable::layer, .mode = FreeMode::fill});
  MemoryPoint point;
  for (int t = 0; t < 10; ++t) {
    memory.append(Pos{t});
    if (t >= 3) memory.evict(0, drop_one(kWholeLayer, t % 4, t - 3));
    point = memory.finish_step();
  }
  const int64_t page = 2 * 2 * 4 * 4 * 2;  // K and V, 2 heads, D 4, fp32, 2 tokens
  EXPECT_EQ(memory.summary().peak.held, 2 * page);
  EXPECT_EQ(point.logical, 3 * page / 2);
  EXPECT_EQ(memory.summary().peak_slots, 4);
  EXPECT_EQ(memory.summary().full_bytes, 10 * page / 2);
}

// With one table for the layer a page is free only when no head needs it; with a table per head each returns
// its own.
TEST(MemorySimulator, HolesNeedTheUnionOverHeads) {
  CacheGeometry g{1, 2, 2, 4, 8, DType::f32};
  std::unique_ptr<Policy> policy = make_policy("random");
  auto reclaimable = [&](BlockTable table) {
    MemorySimulator memory(g, *policy, 4, 8, {.block_tokens = 1, .table = table, .mode = FreeMode::holes});
    for (int t = 0; t < 4; ++t) {
      memory.append(Pos{t});
      memory.finish_step();
    }
    memory.append(Pos{4});
    EvictionPlan plan = drop_one(0, 0, 0);
    plan.drops.push_back({1, Slot{1}, Pos{1}, 0, {}});
    memory.evict(0, plan);
    return memory.finish_step().reclaimable;
  };
  EXPECT_EQ(reclaimable(BlockTable::layer), 0);
  EXPECT_EQ(reclaimable(BlockTable::kv_head), 2 * 2 * 4 * 4);  // one page of each head
}

TEST(MemorySimulator, CompactionReturnsWholePages) {
  CacheGeometry g{1, 1, 1, 4, 16, DType::f32};
  std::unique_ptr<Policy> policy = make_policy("random:cadence=4");
  MemorySimulator memory(g, *policy, 4, 9,
                         {.block_tokens = 4, .table = BlockTable::layer, .mode = FreeMode::compact});
  MemoryPoint point;
  for (int t = 0; t < 8; ++t) {
    memory.append(Pos{t});
    if (t == 7) {
      EvictionPlan plan;
      plan.reclaim = Reclaim::compact;
      plan.keep = {{Slot{0}, Slot{2}, Slot{7}}};
      memory.evict(0, plan);
    }
    point = memory.finish_step();
  }
  const int64_t row = 2 * 4 * 4;
  EXPECT_EQ(point.held, 2 * 4 * row);
  EXPECT_EQ(point.reclaimable, 4 * row);
  EXPECT_EQ(point.compacted, 4 * row);
  EXPECT_EQ(memory.summary().copied_bytes, 2 * 2 * row);  // two of three rows moved, read and written
}

// R-KV's README says that a budget of 1024 saves 87.5 % of 8K tokens. Its cache grows by 128 tokens between
// two compactions, so the peak is 1152 slots: 85.9 %.
TEST(MemorySimulator, RkvsSavedColumnLeavesOutItsBuffer) {
  const CacheGeometry g{1, 1, 1, 128, 0, DType::f16};
  const std::unique_ptr<Policy> policy = make_policy("rkv");
  const int budget = 1024, n_tokens = 8192;
  MemorySimulator memory(g, *policy, budget, budget + 128, {.block_tokens = 16, .mode = FreeMode::compact});
  int held = 0;
  for (int t = 0; t < n_tokens; ++t) {
    memory.append(Pos{t});
    ++held;
    if (const EvictionRule& rule = policy->info().rule; (t + 1) % rule.cadence == 0 && held > budget) {
      EvictionPlan plan;
      plan.step = Pos{t};
      plan.reclaim = Reclaim::compact;
      plan.keep.resize(1);
      for (int s = held - budget; s < held; ++s) plan.keep[0].push_back(Slot{s});
      memory.evict(0, plan);
      held = budget;
    }
    memory.finish_step();
  }
  const MemorySummary summary = memory.summary();
  EXPECT_EQ(summary.peak_slots, 1152);
  EXPECT_DOUBLE_EQ(summary.saved_nominal_ratio, 0.875);
  EXPECT_DOUBLE_EQ(summary.saved_peak_ratio, 1 - 1152.0 / 8192);  // 0.859375
}

TEST(PagePool, DrawsFromRecordedLengths) {
  const std::vector<int> lengths = {5, 70, 400};
  const std::vector<PoolRequest> requests = draw_requests(300, 12, lengths, 100, 2, 3);
  std::map<int, int> seen;
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(requests[i].arrival_step, static_cast<int>(i) * 2);
    EXPECT_EQ(requests[i].n_prompt, 12);
    ++seen[requests[i].n_output];
  }
  ASSERT_EQ(seen.size(), 3u);  // 400 is cut at 100
  for (int n : {5, 70, 100}) EXPECT_NEAR(seen[n], 100, 35) << n;
  EXPECT_THROW(draw_requests(1, 12, {}, 100, 0, 3), Error);
}

TEST(PagePool, PreemptsTheYoungestAndFinishesAll) {
  std::vector<int64_t> pages, logical;
  for (int n = 0; n < 100; ++n) {
    pages.push_back(n / 10 + 1);
    logical.push_back((n + 1) * 10);
  }
  std::vector<PoolRequest> requests(4, PoolRequest{0, 10, 80});
  PoolReport tight = simulate_pool(requests, pages, logical, 100, 12);
  PoolReport roomy = simulate_pool(requests, pages, logical, 100, 100);
  EXPECT_EQ(roomy.preemptions, 0);
  EXPECT_EQ(roomy.steps, 80);
  EXPECT_EQ(roomy.generated_tokens, 4 * 80);
  EXPECT_GT(tight.preemptions, 0);
  EXPECT_EQ(tight.generated_tokens, 4 * 80);  // progress is kept, its K/V are computed again
  EXPECT_GT(tight.recomputed_tokens, 0);
  EXPECT_GT(tight.steps, roomy.steps);
  EXPECT_LE(tight.pages_peak, 12);
  EXPECT_EQ(tight.pages_allocated, tight.pages_freed);
  EXPECT_THROW(simulate_pool(requests, pages, logical, 100, 9), Error);
}

}  // namespace
}  // namespace kvlapse
