#include <chrono>

#include "kernels/cpu/bench/bench.h"
#include "kernels/cpu/thread_team.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/bench/multiply_add.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Twelve independent chains hide the latency of every core that has two units of it. They begin at values
// that no compiler knows, or it would see that chains are equal. Returns the operations done; `kept` keeps
// the work alive.
double MultiplyAdd(int64_t rounds, float* kept) {
  const hn::ScalableTag<float> tag;
  const auto factor = hn::Set(tag, 0.999f), term = hn::Set(tag, 0.001f);
  auto a = hn::Set(tag, kept[0]), b = hn::Set(tag, kept[1]), c = hn::Set(tag, kept[2]),
       d = hn::Set(tag, kept[3]), e = hn::Set(tag, kept[4]), f = hn::Set(tag, kept[5]),
       g = hn::Set(tag, kept[6]), h = hn::Set(tag, kept[7]), i = hn::Set(tag, kept[8]),
       j = hn::Set(tag, kept[9]), k = hn::Set(tag, kept[10]), l = hn::Set(tag, kept[11]);
  for (int64_t round = 0; round < rounds; ++round) {
    a = hn::MulAdd(a, factor, term), b = hn::MulAdd(b, factor, term), c = hn::MulAdd(c, factor, term);
    d = hn::MulAdd(d, factor, term), e = hn::MulAdd(e, factor, term), f = hn::MulAdd(f, factor, term);
    g = hn::MulAdd(g, factor, term), h = hn::MulAdd(h, factor, term), i = hn::MulAdd(i, factor, term);
    j = hn::MulAdd(j, factor, term), k = hn::MulAdd(k, factor, term), l = hn::MulAdd(l, factor, term);
  }
  const auto sum =
      hn::Add(hn::Add(hn::Add(hn::Add(a, b), hn::Add(c, d)), hn::Add(hn::Add(e, f), hn::Add(g, h))),
              hn::Add(hn::Add(i, j), hn::Add(k, l)));
  kept[0] = hn::GetLane(sum);
  return 2.0 * 12 * static_cast<double>(rounds) * static_cast<double>(hn::Lanes(tag));
}

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(MultiplyAdd);

double multiply_add_gflops(int n_threads) {
  constexpr int kRuns = 7;
  constexpr int64_t kRounds = 1 << 21;  // some milliseconds
  ThreadTeam team(n_threads);
  constexpr size_t kChains = 12, kApart = 32;  // a thread's values on cache lines of their own
  std::vector<float> kept(static_cast<size_t>(n_threads) * kApart);
  for (size_t i = 0; i < kept.size(); ++i) kept[i] = static_cast<float>(i % kChains) / kChains;
  std::vector<double> operations(static_cast<size_t>(n_threads));
  std::vector<double> gflops;
  for (int run = 0; run < kRuns; ++run) {
    const auto start = std::chrono::steady_clock::now();
    team.run([&](int thread) {
      const auto at = static_cast<size_t>(thread);
      operations[at] = HWY_DYNAMIC_DISPATCH(MultiplyAdd)(kRounds, &kept[at * kApart]);
    });
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    double all = 0;
    for (const double count : operations) all += count;
    gflops.push_back(all / seconds.count() * 1e-9);
  }
  return spread_of(gflops).median;
}

}  // namespace kvlapse
#endif
