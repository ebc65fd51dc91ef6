#include "gui/document/preparer.h"

#include <algorithm>
#include <exception>

namespace kvlapse::gui {

Preparer::Preparer(int n_threads, std::function<void()> wake) : wake_(std::move(wake)) {
  for (int i = 0; i < n_threads; ++i) threads_.emplace_back([this] { work(); });
}

Preparer::~Preparer() {
  {
    const std::scoped_lock lock(mutex_);
    stopping_ = true;
    queue_.clear();
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Preparer::submit(int slot, uint64_t key, Job job) {
  {
    const std::scoped_lock lock(mutex_);
    if (static_cast<size_t>(slot) >= slots_.size()) slots_.resize(static_cast<size_t>(slot) + 1);
    Slot& entry = slots_[slot];
    entry.pending_key = key;
    entry.pending = std::move(job);
    if (!entry.running && std::find(queue_.begin(), queue_.end(), slot) == queue_.end())
      queue_.push_back(slot);
  }
  changed_.notify_one();
}

Preparer::Ready Preparer::ready(int slot) const {
  const std::scoped_lock lock(mutex_);
  return static_cast<size_t>(slot) < slots_.size() ? slots_[slot].ready : Ready{};
}

bool Preparer::idle() const {
  const std::scoped_lock lock(mutex_);
  return queue_.empty() && n_running_ == 0;
}

int Preparer::running() const {
  const std::scoped_lock lock(mutex_);
  return n_running_ + static_cast<int>(queue_.size());
}

void Preparer::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
    if (stopping_) return;
    const int slot = queue_.front();
    queue_.erase(queue_.begin());
    const uint64_t key = slots_[slot].pending_key;
    Job job = std::move(slots_[slot].pending);
    slots_[slot].pending = nullptr;
    slots_[slot].running = true;
    ++n_running_;
    lock.unlock();
    DrawModelPtr model;
    try {
      model = job();
    } catch (const std::exception& error) {
      auto failed = std::make_shared<DrawModel>();
      failed->absence = error.what();
      model = failed;
    }
    job = nullptr;
    lock.lock();
    --n_running_;
    slots_[slot].running = false;
    slots_[slot].ready = {key, std::move(model)};
    if (slots_[slot].pending && !stopping_) queue_.push_back(slot);
    lock.unlock();
    changed_.notify_one();
    wake_();
    lock.lock();
  }
}

}  // namespace kvlapse::gui
