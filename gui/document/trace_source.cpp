#include "gui/document/trace_source.h"

#include <exception>

#include "trace/views/token_texts.h"

namespace kvlapse::gui {

TraceSource::TraceSource(const std::filesystem::path& file) : reader_(std::make_unique<TraceReader>(file)) {
  live_ = !reader_->complete() && !reader_->interrupted();
}

TraceSource::~TraceSource() {
  stopping_ = true;
  if (damage_thread_.joinable()) damage_thread_.join();
}

void TraceSource::start_damage_check(std::function<void()> wake) {
  if (damage_thread_.joinable()) return;
  damage_thread_ = std::thread([this, wake = std::move(wake)] {
    struct Stopped {};
    try {
      std::vector<ChunkDamage> found = reader_->damaged_chunks([this](int64_t, int64_t) {
        if (stopping_) throw Stopped{};
      });
      const std::scoped_lock lock(mutex_);
      damage_ = std::move(found);
    } catch (const Stopped&) {
      return;
    } catch (const std::exception& error) {
      const std::scoped_lock lock(mutex_);
      damage_ = {ChunkDamage{.id = 0,
                             .kind = "file",
                             .sequence = 0,
                             .layer = -1,
                             .step_begin = 0,
                             .step_end = 0,
                             .what = error.what()}};
    }
    damage_checked_ = true;
    wake();
  });
}

std::vector<ChunkDamage> TraceSource::damage() const {
  const std::scoped_lock lock(mutex_);
  return damage_;
}

bool TraceSource::follow() {
  if (!reader_->refresh()) return false;
  live_ = !reader_->complete() && !reader_->interrupted();
  version_.fetch_add(1, std::memory_order_release);
  return true;
}

template <typename Value>
std::shared_ptr<const Value> TraceSource::find(std::list<Entry<Value>>& entries, int sequence, int layer) {
  const uint64_t now = version();
  const std::scoped_lock lock(mutex_);
  for (auto entry = entries.begin(); entry != entries.end(); ++entry) {
    if (entry->sequence != sequence || entry->layer != layer) continue;
    if (entry->version == now) {
      entries.splice(entries.begin(), entries, entry);
      return entry->value;
    }
    entries.erase(entry);
    break;
  }
  return nullptr;
}

template <typename Value, typename Make>
std::shared_ptr<const Value> TraceSource::cached(std::list<Entry<Value>>& entries, size_t most, int sequence,
                                                 int layer, Make make) {
  const uint64_t now = version();
  if (auto found = find(entries, sequence, layer)) return found;
  auto value = std::make_shared<const Value>(
      make());  // without the lock: two threads may make the same, both are right
  const std::scoped_lock lock(mutex_);
  entries.push_front({sequence, layer, now, value});
  if (entries.size() > most) entries.pop_back();
  return value;
}

std::shared_ptr<const LayerLife> TraceSource::layer_life(int sequence, int layer) {
  return cached(lives_, 6, sequence, layer, [&] { return read_layer_life(*reader_, sequence, layer); });
}

std::shared_ptr<const std::vector<int32_t>> TraceSource::evicted_at(int sequence, int layer) {
  const size_t n_layers = static_cast<size_t>(reader_->header().geometry.n_layers);
  return cached(evicted_, n_layers, sequence, layer,
                [&] { return read_evicted_at(*reader_, sequence, layer); });
}

std::shared_ptr<const std::vector<int32_t>> TraceSource::evicted_at_if_read(int sequence, int layer) {
  return find(evicted_, sequence, layer);
}

std::shared_ptr<const Timeline> TraceSource::timeline(int sequence) {
  return cached(timelines_, 2, sequence, 0, [&] { return read_timeline(*reader_, sequence); });
}

std::shared_ptr<const TraceSequence> TraceSource::sequence(int sequence) {
  return cached(sequences_, 2, sequence, 0, [&] { return reader_->sequence(sequence); });
}

std::shared_ptr<const std::vector<std::string>> TraceSource::token_texts(int sequence) {
  return cached(texts_, 2, sequence, 0, [&] { return read_token_texts(*reader_, sequence); });
}

}  // namespace kvlapse::gui
