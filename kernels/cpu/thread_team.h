// ThreadTeam: a fixed set of threads that run one job together and may meet at barriers inside it. A decode
// step is dozens of regions of a few microseconds each; oneTBB promises neither that its workers run at once
// (which a barrier needs) nor that they are awake after a short serial stretch, so the step has its own team.
// Workers spin briefly for the next job, then sleep. One caller at a time; jobs must not call run()
// themselves.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace kvlapse {

class ThreadTeam {
 public:
  explicit ThreadTeam(int n_threads);
  ~ThreadTeam();
  ThreadTeam(const ThreadTeam&) = delete;
  ThreadTeam& operator=(const ThreadTeam&) = delete;

  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // job(thread) on every thread, the caller being thread 0; returns when all are done. An exception of the
  // job is rethrown here; a job that meets at barriers must not throw.
  template <typename Job>
  void run(const Job& job) {
    run([](const void* j, int thread) { (*static_cast<const Job*>(j))(thread); }, &job);
  }
  // Inside a job: waits until every thread has come here.
  void barrier();

 private:
  using Entry = void (*)(const void* job, int thread);
  void run(Entry entry, const void* job);
  void work(int thread);
  void call(int thread);

  Entry entry_ = nullptr;
  const void* job_ = nullptr;
  std::atomic<uint32_t> generation_{0};
  std::atomic<int> busy_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int> arrived_{0};
  std::atomic<uint32_t> barrier_round_{0};
  std::atomic_flag failed_;
  std::exception_ptr error_;
  std::vector<std::thread> workers_;
};

// Items [begin, end) of n that thread t of n_threads takes; starts are multiples of `unit`.
struct Share {
  int64_t begin = 0, end = 0;
};
Share share_of(int64_t n, int thread, int n_threads, int64_t unit = 1);

}  // namespace kvlapse
