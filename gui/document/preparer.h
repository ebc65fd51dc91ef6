// Preparer: worker threads that make draw models. One pending job per panel: a newer request replaces an
// older one that has not begun. The UI thread submits and collects; jobs run on the workers and touch nothing
// of the UI.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace kvlapse::gui {

// What a panel draws; made by a job, immutable afterwards. When there is nothing to draw, `absence` says why
// and what to do, and the panel shows that instead.
struct DrawModel {
  virtual ~DrawModel() = default;
  std::string absence;
  std::vector<std::string> notes;  // shown beside the data: damaged chunks, approximations
  // Drawn already, and its job runs again: more of it is to come. A job that takes long gives its first part
  // soon.
  bool partial = false;
};
using DrawModelPtr = std::shared_ptr<const DrawModel>;
using Job = std::function<DrawModelPtr()>;

class Preparer {
 public:
  // `wake` is called from a worker when a model is ready; it must be thread-safe.
  Preparer(int n_threads, std::function<void()> wake);
  ~Preparer();  // waits for running jobs
  Preparer(const Preparer&) = delete;
  Preparer& operator=(const Preparer&) = delete;

  // `slot` identifies the panel. The job's exceptions become an absence that quotes them.
  void submit(int slot, uint64_t key, Job job);
  struct Ready {
    uint64_t key = 0;
    DrawModelPtr model;
  };
  // The newest finished model of the slot; `model` null: none yet.
  Ready ready(int slot) const;
  // Nothing waits and nothing runs.
  bool idle() const;
  int running() const;

 private:
  struct Slot {
    uint64_t pending_key = 0;
    Job pending;  // empty: nothing waits
    bool running = false;
    Ready ready;
  };
  void work();

  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Slot> slots_;
  std::vector<int> queue_;
  bool stopping_ = false;
  int n_running_ = 0;
  std::function<void()> wake_;
  std::vector<std::thread> threads_;
};

}  // namespace kvlapse::gui
