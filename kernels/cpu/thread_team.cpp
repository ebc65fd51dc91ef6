#include "kernels/cpu/thread_team.h"

#include <algorithm>
#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kvlapse {
namespace {

// Some 30 us on current cores: longer than the serial stretches of a step. A thread that waits longer sleeps,
// which also lets the others go first when there are more threads than free cores.
constexpr int kSpins = 1000;

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Waits until `value` is no longer `old`; returns what it is then.
template <typename T>
T wait_while(const std::atomic<T>& value, T old) {
  for (int i = 0;; ++i) {
    const T now = value.load(std::memory_order_acquire);
    if (now != old) return now;
    if (i < kSpins)
      pause();
    else
      value.wait(old, std::memory_order_acquire);
  }
}

}  // namespace

ThreadTeam::ThreadTeam(int n_threads) {
  for (int t = 1; t < n_threads; ++t) workers_.emplace_back([this, t] { work(t); });
}

ThreadTeam::~ThreadTeam() {
  stop_.store(true);
  generation_.fetch_add(1);
  generation_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadTeam::call(int thread) {
  try {
    entry_(job_, thread);
  } catch (...) {
    if (!failed_.test_and_set()) error_ = std::current_exception();
  }
}

void ThreadTeam::work(int thread) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(generation_, seen);
    ++seen;
    if (stop_.load()) return;
    call(thread);
    busy_.fetch_sub(1, std::memory_order_acq_rel);
    busy_.notify_one();
  }
}

void ThreadTeam::run(Entry entry, const void* job) {
  entry_ = entry;
  job_ = job;
  busy_.store(static_cast<int>(workers_.size()), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_release);
  generation_.notify_all();
  call(0);
  for (int busy = busy_.load(std::memory_order_acquire); busy != 0;) busy = wait_while(busy_, busy);
  if (failed_.test()) {
    failed_.clear();
    std::rethrow_exception(std::exchange(error_, nullptr));
  }
}

void ThreadTeam::barrier() {
  const uint32_t round = barrier_round_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size()) {
    arrived_.store(0, std::memory_order_relaxed);
    barrier_round_.store(round + 1, std::memory_order_release);
    barrier_round_.notify_all();
    return;
  }
  wait_while(barrier_round_, round);
}

Share share_of(int64_t n, int thread, int n_threads, int64_t unit) {
  const int64_t units = (n + unit - 1) / unit;
  return {std::min(n, units * thread / n_threads * unit),
          std::min(n, units * (thread + 1) / n_threads * unit)};
}

}  // namespace kvlapse
