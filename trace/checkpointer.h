// Checkpointer: moves what a writer has committed from the WAL into the file, on a thread and a connection of
// its own, so that the writer waits for no disk. When the WAL grows faster than that, the writer's commits
// wait and help. A failure is left for the next commit or fold_wal to find; nothing committed is lost by it.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>

#include "trace/sqlite.h"

namespace kvlapse {

class Checkpointer {
 public:
  // From now on `writer`, a connection in WAL mode, checkpoints no more by itself. It outlives this object.
  explicit Checkpointer(Database& writer);
  ~Checkpointer();  // stops
  Checkpointer(const Checkpointer&) = delete;
  Checkpointer& operator=(const Checkpointer&) = delete;

  // What is left in the WAL stays there. Returns the CPU time of the thread.
  int64_t stop();

 private:
  void committed(int wal_pages);  // on the writer's thread
  void run();

  Database& writer_;
  Database own_;
  std::mutex mutex_;
  std::condition_variable wanted_changed_, idle_;
  int64_t cpu_ns_ = 0;
  bool wanted_ = false, running_ = false, stopping_ = false;
  std::thread thread_;
};

}  // namespace kvlapse
