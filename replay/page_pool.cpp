#include "replay/page_pool.h"

#include <algorithm>
#include <deque>

#include "core/base/error.h"
#include "core/base/rng.h"

namespace kvlapse {
namespace {

struct Running {
  int request = 0;
  int tokens = 0;  // seen: prompt and generated
  int64_t pages = 0;
};

struct Waiting {
  int request = 0;
  int generated = 0;  // before a preemption; prefilled again
};

}  // namespace

PoolReport simulate_pool(std::span<const PoolRequest> requests, std::span<const int64_t> pages_at,
                         std::span<const int64_t> logical_at, int64_t page_bytes, int64_t pool_pages) {
  int64_t largest = *std::max_element(pages_at.begin(), pages_at.end());
  if (largest > pool_pages)
    fail("page pool: one request needs {} pages, the pool holds {}", largest, pool_pages);
  for (const PoolRequest& r : requests)
    if (r.n_prompt < 1 || r.n_output < 1 || static_cast<size_t>(r.n_prompt + r.n_output) > pages_at.size())
      fail("page pool: a request of {} + {} tokens exceeds the memory curve of {} tokens", r.n_prompt,
           r.n_output, pages_at.size());

  std::vector<int> order(requests.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int b) { return requests[a].arrival_step < requests[b].arrival_step; });

  PoolReport report;
  std::deque<Waiting> waiting;
  std::vector<Running> running;  // oldest first
  size_t next_arrival = 0;
  int64_t used = 0;
  double running_sum = 0, used_sum = 0, fragmentation_sum = 0;
  while (next_arrival < order.size() || !waiting.empty() || !running.empty()) {
    if (running.empty() && waiting.empty())
      report.steps = std::max<int64_t>(report.steps, requests[order[next_arrival]].arrival_step);
    for (; next_arrival < order.size() && requests[order[next_arrival]].arrival_step <= report.steps;
         ++next_arrival)
      waiting.push_back({order[next_arrival], 0});

    // Admission: first come, first served, while the prompt's pages are there.
    while (!waiting.empty()) {
      const Waiting& w = waiting.front();
      int tokens = requests[w.request].n_prompt + w.generated;
      int64_t need = pages_at[tokens - 1];
      if (used + need > pool_pages) break;
      used += need;
      report.pages_allocated += need;
      if (w.generated > 0) report.recomputed_tokens += tokens;
      running.push_back({w.request, tokens, need});
      waiting.pop_front();
    }

    // One decode step for all that run; the youngest give way.
    int64_t logical = 0;
    for (size_t i = 0; i < running.size(); ++i) {
      Running& r = running[i];
      int64_t need = pages_at[r.tokens];  // with the token of this step
      while (need > r.pages && used + (need - r.pages) > pool_pages && running.size() > i + 1) {
        Running victim = running.back();
        running.pop_back();
        used -= victim.pages;
        report.pages_freed += victim.pages;
        ++report.preemptions;
        waiting.push_front({victim.request, victim.tokens - requests[victim.request].n_prompt});
      }
      if (need > r.pages && used + (need - r.pages) > pool_pages) {
        // Nobody younger is left: this one gives way itself.
        used -= r.pages;
        report.pages_freed += r.pages;
        ++report.preemptions;
        waiting.push_front({r.request, r.tokens - requests[r.request].n_prompt});
        running.erase(running.begin() + static_cast<std::ptrdiff_t>(i));
        break;
      }
      (need > r.pages ? report.pages_allocated : report.pages_freed) += std::abs(need - r.pages);
      used += need - r.pages;
      r.pages = need;
      ++r.tokens;
      ++report.generated_tokens;
      logical += logical_at[r.tokens - 1];
    }
    report.running_peak = std::max(report.running_peak, static_cast<int>(running.size()));
    report.pages_peak = std::max(report.pages_peak, used);
    running_sum += static_cast<double>(running.size());
    used_sum += static_cast<double>(used) / static_cast<double>(pool_pages);
    if (used > 0)
      fragmentation_sum += 1 - static_cast<double>(logical) / static_cast<double>(used * page_bytes);
    ++report.steps;

    std::erase_if(running, [&](const Running& r) {
      if (r.tokens < requests[r.request].n_prompt + requests[r.request].n_output) return false;
      used -= r.pages;
      report.pages_freed += r.pages;
      return true;
    });
  }
  if (report.steps > 0) {
    const auto steps = static_cast<double>(report.steps);
    report.running_mean = running_sum / steps;
    report.used_mean_ratio = used_sum / steps;
    report.fragmentation_ratio = fragmentation_sum / steps;
    report.tokens_per_step = static_cast<double>(report.generated_tokens) / steps;
  }
  return report;
}

std::vector<PoolRequest> draw_requests(int n, int prompt_min, int prompt_max, int output_min, int output_max,
                                       int gap_steps, uint64_t seed) {
  std::vector<PoolRequest> requests(n);
  for (int i = 0; i < n; ++i) {
    auto draw = [&](int low, int high, uint64_t which) {
      uint64_t bits = counter_random({seed, static_cast<uint64_t>(i), which});
      return low + static_cast<int>(bits % static_cast<uint64_t>(high - low + 1));
    };
    requests[i] = {i * gap_steps, draw(prompt_min, prompt_max, 0), draw(output_min, output_max, 1)};
  }
  return requests;
}

std::vector<PoolRequest> draw_requests(int n, int n_prompt, std::span<const int> outputs, int output_max,
                                       int gap_steps, uint64_t seed) {
  if (outputs.empty()) fail("pool: lengths: expected at least one, found none");
  std::vector<PoolRequest> requests(n);
  for (int i = 0; i < n; ++i) {
    const uint64_t drawn = counter_random({seed, static_cast<uint64_t>(i)}) % outputs.size();
    requests[i] = {i * gap_steps, n_prompt, std::min(outputs[drawn], output_max)};
  }
  return requests;
}

}  // namespace kvlapse
