#include "trace/checkpointer.h"

#include <sqlite3.h>

#include "trace/thread_cpu.h"

namespace kvlapse {
namespace {

// Of the WAL, 16 KiB each. Once all of it is in the file the next commit begins it anew.
constexpr int kPagesToBegin = 1024, kMostPages = 16384;

void checkpoint(Database& database) {
  sqlite3_wal_checkpoint_v2(database.handle(), nullptr, SQLITE_CHECKPOINT_PASSIVE, nullptr, nullptr);
}

}  // namespace

Checkpointer::Checkpointer(Database& writer)
    : writer_(writer), own_(Database::open_for_writing(writer.file())) {
  own_.execute("PRAGMA synchronous = NORMAL");
  thread_ = std::thread([this] { run(); });
  sqlite3_wal_hook(
      writer_.handle(),
      [](void* self, sqlite3*, const char*, int wal_pages) {
        static_cast<Checkpointer*>(self)->committed(wal_pages);
        return SQLITE_OK;
      },
      this);
}

Checkpointer::~Checkpointer() {
  stop();
}

int64_t Checkpointer::stop() {
  if (!thread_.joinable()) return cpu_ns_;
  sqlite3_wal_hook(writer_.handle(), nullptr, nullptr);
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wanted_changed_.notify_one();
  thread_.join();
  return cpu_ns_;
}

void Checkpointer::committed(int wal_pages) {
  if (wal_pages < kPagesToBegin) return;
  std::unique_lock lock(mutex_);
  if (wal_pages >= kMostPages) {
    idle_.wait(lock, [&] { return !running_; });
    checkpoint(writer_);
  } else if (!wanted_) {
    wanted_ = true;
    wanted_changed_.notify_one();
  }
}

void Checkpointer::run() {
  std::unique_lock lock(mutex_);
  while (true) {
    wanted_changed_.wait(lock, [&] { return wanted_ || stopping_; });
    if (stopping_) return;
    wanted_ = false;
    running_ = true;
    lock.unlock();
    checkpoint(own_);
    lock.lock();
    running_ = false;
    cpu_ns_ = thread_cpu_ns();
    idle_.notify_one();
  }
}

}  // namespace kvlapse
