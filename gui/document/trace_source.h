// TraceSource: one open trace with what was derived from it and is worth keeping. Any member may be called
// from any thread; values are shared and immutable. Keeps a bounded number of layers; the reader bounds its
// own cache.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "trace/trace_reader.h"
#include "trace/views/layer_life.h"
#include "trace/views/timeline.h"

namespace kvlapse::gui {

class TraceSource {
 public:
  // Throws Error when the file is no readable trace.
  explicit TraceSource(const std::filesystem::path& file);
  ~TraceSource();
  TraceSource(const TraceSource&) = delete;
  TraceSource& operator=(const TraceSource&) = delete;

  const TraceReader& reader() const { return *reader_; }
  const std::filesystem::path& file() const { return reader_->file(); }
  std::string name() const { return file().filename().string(); }
  // 0 while the sequence has not begun.
  int n_steps(int sequence) const {
    return sequence < reader_->n_sequences() ? reader_->n_steps(sequence) : 0;
  }
  // Counts changes of the content: what was derived from an older version is out of date.
  uint64_t version() const { return version_.load(std::memory_order_acquire); }
  bool live() const { return live_.load(std::memory_order_relaxed); }  // being written by another process
  // Takes in what the writer committed. True when something changed.
  bool follow();

  std::shared_ptr<const LayerLife> layer_life(int sequence, int layer);
  std::shared_ptr<const Timeline> timeline(int sequence);
  std::shared_ptr<const TraceSequence> sequence(int sequence);
  // evicted_at of one layer (LayerLife), kept for every layer: 4 bytes a token and kv head.
  std::shared_ptr<const std::vector<int32_t>> evicted_at(int sequence, int layer);
  // The same when it is at hand, null otherwise.
  std::shared_ptr<const std::vector<int32_t>> evicted_at_if_read(int sequence, int layer);
  // Text of each recorded position; "" where the file does not tell.
  std::shared_ptr<const std::vector<std::string>> token_texts(int sequence);

  // Decodes every chunk once, on a thread of its own; `wake` is called when something was found or all was
  // read.
  void start_damage_check(std::function<void()> wake);
  std::vector<ChunkDamage> damage() const;  // found so far
  bool damage_checked() const { return damage_checked_.load(); }

 private:
  template <typename Value>
  struct Entry {
    int sequence = 0, layer = 0;
    uint64_t version = 0;
    std::shared_ptr<const Value> value;
  };
  template <typename Value>
  std::shared_ptr<const Value> find(std::list<Entry<Value>>& entries, int sequence, int layer);
  template <typename Value, typename Make>
  std::shared_ptr<const Value> cached(std::list<Entry<Value>>& entries, size_t most, int sequence, int layer,
                                      Make make);

  std::unique_ptr<TraceReader> reader_;
  std::atomic<uint64_t> version_{1};
  std::atomic<bool> live_{false};
  mutable std::mutex mutex_;
  std::list<Entry<LayerLife>> lives_;  // most recently used first
  std::list<Entry<Timeline>> timelines_;
  std::list<Entry<TraceSequence>> sequences_;
  std::list<Entry<std::vector<int32_t>>> evicted_;
  std::list<Entry<std::vector<std::string>>> texts_;
  std::vector<ChunkDamage> damage_;
  std::atomic<bool> damage_checked_{false}, stopping_{false};
  std::thread damage_thread_;
};

}  // namespace kvlapse::gui
