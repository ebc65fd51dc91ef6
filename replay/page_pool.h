// A pool of K/V pages shared by many requests over time: they arrive, grow, evict and finish; when the pool
// is full the youngest running one is preempted and starts again behind its own text. Modelled: a request's
// pages at its n-th token come from a memory curve (MemorySimulator over a trace), so every free mode and
// block table is covered. Deterministic.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvlapse {

struct PoolRequest {
  int arrival_step = 0;
  int n_prompt = 0;
  int n_output = 0;  // tokens to generate
};

struct PoolReport {
  int64_t steps = 0;  // decode steps until the last request finished
  int64_t generated_tokens = 0;
  int64_t recomputed_tokens = 0;  // prefilled again after a preemption
  int64_t preemptions = 0;
  int64_t pages_allocated = 0, pages_freed = 0;
  int64_t pages_peak = 0;
  double running_mean = 0;  // requests decoded together
  int running_peak = 0;
  double used_mean_ratio = 0;      // pages in use / pool
  double fragmentation_ratio = 0;  // 1 - logical bytes / bytes of pages in use, mean over steps
  double tokens_per_step = 0;
};

// pages_at[n], logical_at[n]: pages and logical bytes of one request that has seen n + 1 tokens. Requests
// longer than the curve throw Error. pool_pages must hold the largest single request.
PoolReport simulate_pool(std::span<const PoolRequest> requests, std::span<const int64_t> pages_at,
                         std::span<const int64_t> logical_at, int64_t page_bytes, int64_t pool_pages);

// Lengths for n requests: prompts and outputs uniform in the given ranges, all present at step 0 or arriving
// one every `gap_steps`. Seeded.
std::vector<PoolRequest> draw_requests(int n, int prompt_min, int prompt_max, int output_min, int output_max,
                                       int gap_steps, uint64_t seed);
// The same with outputs drawn from these lengths, cut at output_max: a curve says nothing beyond its end.
std::vector<PoolRequest> draw_requests(int n, int n_prompt, std::span<const int> outputs, int output_max,
                                       int gap_steps, uint64_t seed);

}  // namespace kvlapse
