#include "trace/trace_reader.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <list>
#include <mutex>
#include <shared_mutex>
#include <tuple>
#include <unordered_map>

#include "core/base/error.h"
#include "trace/chunk_codec.h"
#include "trace/gpu_rows.h"
#include "trace/row_convert.h"
#include "trace/trace_file.h"

namespace kvlapse {
namespace {

struct Chunk {
  int64_t id = 0;
  int begin = 0, end = 0;
  std::vector<std::byte> data;
};
using ChunkPtr = std::shared_ptr<const Chunk>;

struct CacheKey {
  std::string_view kind;  // static text
  int sequence, layer, begin;
  bool operator==(const CacheKey&) const = default;
};
struct CacheKeyHash {
  size_t operator()(const CacheKey& key) const {
    size_t hash = std::hash<std::string_view>()(key.kind);
    for (int word : {key.sequence, key.layer, key.begin})
      hash = hash * 1'000'003u + static_cast<size_t>(word);
    return hash;
  }
};

// Least recently used decoded chunks. Thread-safe.
class ChunkCache {
 public:
  explicit ChunkCache(size_t most_bytes) : most_bytes_(most_bytes) {}

  ChunkPtr find(const CacheKey& key) {
    std::lock_guard lock(mutex_);
    auto found = entries_.find(key);
    if (found == entries_.end()) return nullptr;
    order_.splice(order_.begin(), order_, found->second.place);
    return found->second.chunk;
  }
  void put(const CacheKey& key, ChunkPtr chunk) {
    std::lock_guard lock(mutex_);
    if (auto found = entries_.find(key); found != entries_.end()) {
      bytes_ -= found->second.chunk->data.size();
      order_.erase(found->second.place);
      entries_.erase(found);
    }
    bytes_ += chunk->data.size();
    order_.push_front(key);
    entries_[key] = {std::move(chunk), order_.begin()};
    while (bytes_ > most_bytes_ && order_.size() > 1) {
      auto last = entries_.find(order_.back());
      bytes_ -= last->second.chunk->data.size();
      entries_.erase(last);
      order_.pop_back();
    }
  }

 private:
  struct Entry {
    ChunkPtr chunk;
    std::list<CacheKey>::iterator place;
  };
  const size_t most_bytes_;
  std::mutex mutex_;
  std::list<CacheKey> order_;
  std::unordered_map<CacheKey, Entry, CacheKeyHash> entries_;
  size_t bytes_ = 0;
};

std::string optional_text(const Statement& statement, int column) {
  return std::string(statement.text(column));
}

constexpr int kMostSteps = 1 << 28;

// The file holds the largest weights in no order: the recorder has no time for it.
void sort_sketch(SketchRow& row) {
  std::array<std::pair<float, int32_t>, kSketchTop> pairs;
  for (int i = 0; i < kSketchTop; ++i) pairs[i] = {row.pos[i] < 0 ? -1.0f : row.weight[i], row.pos[i]};
  std::sort(pairs.begin(), pairs.end(), [](const auto& a, const auto& b) {
    // A damaged file may hold NaN, which must not break the order.
    const bool a_nan = std::isnan(a.first), b_nan = std::isnan(b.first);
    if (a_nan || b_nan) return !a_nan && b_nan;
    return a.first != b.first ? a.first > b.first : a.second > b.second;
  });
  for (int i = 0; i < kSketchTop; ++i) {
    row.weight[i] = pairs[i].second < 0 ? 0.0f : pairs[i].first;
    row.pos[i] = pairs[i].second;
  }
}

}  // namespace

struct TraceReader::Impl {
  Impl(const std::filesystem::path& file_path, const TraceReaderOptions& options)
      : file(file_path),
        database(open_file_for_reading(file_path, trace_file_kind())),
        version(database.user_version()),
        header(load_header(database)),
        cache(options.cache_bytes),
        select_chunk(database,
                     "SELECT id, step_begin, step_end, encoding, raw_bytes, checksum, data FROM KV_CHUNK"
                     " WHERE kind = ? AND sequence = ? AND layer = ? AND step_begin BETWEEN ? AND ?"
                     " ORDER BY step_begin DESC LIMIT 1"),
        select_sequences(
            database,
            "SELECT sequence, seed, n_prompt, n_steps, budget_slots, think_begin, think_end, task, prompt,"
            " text, answer, answer_right, end_reason FROM KV_SEQUENCE ORDER BY sequence"),
        select_steps(
            database,
            "SELECT step, token, next_token, logprob, margin, held_tokens, evicted_tokens, start_ns, "
            "total_ns,"
            " embed_ns, attention_ns, matmul_ns, evict_ns, head_ns, sample_ns, observe_ns, queue_wait_ns"
            " FROM KV_STEP WHERE sequence = ? AND step >= ? AND step < ? ORDER BY step") {
    load_state();
  }

  // Under the connection's lock. True when something changed.
  bool load_state() {
    std::vector<TraceSequence> now;
    MetaMap meta_now;
    {
      // One snapshot for all that belongs together.
      database.execute("BEGIN");
      struct End {
        Database& database;
        ~End() {
          try {
            database.execute("COMMIT");
          } catch (const Error&) {
          }
        }
      } end{database};
      meta_now = load_meta(database);
      Statement& s = select_sequences;
      s.reset();
      while (s.step()) {
        TraceSequence facts;
        facts.sequence = static_cast<int>(s.integer(0));
        facts.seed = static_cast<uint64_t>(s.integer(1));
        const int64_t n_prompt = s.integer(2), n_steps = s.integer(3);
        if (s.integer(0) != static_cast<int64_t>(now.size()) || facts.sequence >= header.n_sequences)
          fail("{}: KV_SEQUENCE: expected sequence {} of {}, found {}", file.string(), now.size(),
               header.n_sequences, s.integer(0));
        if (n_prompt < 1 || n_prompt > kMostSteps || n_steps < 0 || n_steps > kMostSteps)
          fail(
              "{}: KV_SEQUENCE {}: expected 1 to {} prompt tokens and as many steps at most, found {} and {}",
              file.string(), facts.sequence, kMostSteps, n_prompt, n_steps);
        facts.n_prompt = static_cast<int>(n_prompt);
        facts.n_steps = static_cast<int>(n_steps);
        facts.budget_slots = static_cast<int>(s.integer(4));
        facts.think_begin = s.is_null(5) ? -1 : static_cast<int>(s.integer(5));
        facts.think_end = s.is_null(6) ? -1 : static_cast<int>(s.integer(6));
        facts.task = optional_text(s, 7);
        facts.prompt = optional_text(s, 8);
        facts.text = optional_text(s, 9);
        facts.answer = optional_text(s, 10);
        if (!s.is_null(11)) facts.answer_right = s.integer(11) != 0;
        facts.end_reason = optional_text(s, 12);
        now.push_back(std::move(facts));
      }
      s.reset();
    }
    std::unique_lock lock(state_mutex);
    auto same = [](const TraceSequence& a, const TraceSequence& b) {
      return a.n_steps == b.n_steps && a.end_reason == b.end_reason && a.text == b.text &&
             a.answer == b.answer;
    };
    const bool changed =
        meta_now != meta || !std::equal(now.begin(), now.end(), sequences.begin(), sequences.end(), same);
    sequences = std::move(now);
    meta = std::move(meta_now);
    return changed;
  }

  const TraceSequence& sequence_of(int sequence) const {
    if (sequence < 0 || sequence >= static_cast<int>(sequences.size()))
      fail("{}: sequence: expected 0 to {}, found {}", file.string(), static_cast<int>(sequences.size()) - 1,
           sequence);
    return sequences[sequence];
  }
  int n_steps(int sequence) const {
    std::shared_lock lock(state_mutex);
    return sequence_of(sequence).n_steps;
  }

  void check_layer(int layer) const {
    if (layer < 0 || layer >= header.geometry.n_layers)
      fail("{}: layer: expected 0 to {}, found {}", file.string(), header.geometry.n_layers - 1, layer);
  }

  std::string name_of(std::string_view kind, int sequence, int layer, int begin, int64_t id) const {
    return layer < 0 ? fmt::format("{}: chunk {} ({} of sequence {}, from step {})", file.string(), id, kind,
                                   sequence, begin)
                     : fmt::format("{}: chunk {} ({} of sequence {}, layer {}, from step {})", file.string(),
                                   id, kind, sequence, layer, begin);
  }

  // The chunk that begins at `step` or before it, within the same kChunkSteps; null when there is none.
  // `row_bytes` > 0: one row a step.
  ChunkPtr load_chunk(std::string_view kind, int sequence, int layer, int step, size_t row_bytes) {
    auto chunk = std::make_shared<Chunk>();
    std::string encoding;
    int64_t raw_bytes = 0, checksum = 0;
    std::vector<std::byte> stored;
    {
      std::lock_guard lock(database_mutex);
      Statement& s = select_chunk;
      s.reset();
      s.bind(1, kind)
          .bind(2, sequence)
          .bind(3, layer)
          .bind(4, step / kChunkSteps * kChunkSteps)
          .bind(5, step);
      if (!s.step()) {
        s.reset();
        return nullptr;
      }
      chunk->id = s.integer(0);
      const int64_t begin = s.integer(1), end = s.integer(2);
      encoding = std::string(s.text(3));
      raw_bytes = s.integer(4);
      checksum = s.integer(5);
      std::span<const std::byte> blob = s.blob(6);
      stored.assign(blob.begin(), blob.end());
      s.reset();
      if (begin < 0 || end <= begin || end - begin > kChunkSteps || end > kMostSteps)
        fail("{}: expected at most {} steps, found {} to {}", name_of(kind, sequence, layer, step, chunk->id),
             kChunkSteps, begin, end);
      chunk->begin = static_cast<int>(begin);
      chunk->end = static_cast<int>(end);
    }
    const size_t expected = (chunk->end - chunk->begin) * row_bytes;
    if (row_bytes > 0 && raw_bytes != static_cast<int64_t>(expected))
      fail("{}: raw_bytes: expected {}, found {}", name_of(kind, sequence, layer, chunk->begin, chunk->id),
           expected, raw_bytes);
    try {
      chunk->data = decode_chunk(encoding, raw_bytes, checksum, stored);
    } catch (const Error& error) {
      fail("{}: {}", name_of(kind, sequence, layer, chunk->begin, chunk->id), error.what());
    }
    return chunk;
  }

  // As load_chunk, through the cache; `needed_end`: steps below it were recorded, so the chunk must reach
  // there as far as it can.
  ChunkPtr chunk_at(std::string_view kind, int sequence, int layer, int step, int needed_end,
                    size_t row_bytes) {
    const int slot_end = (step / kChunkSteps + 1) * kChunkSteps;
    const CacheKey key{kind, sequence, layer, slot_end};
    const int reach = std::min(needed_end, slot_end);
    if (ChunkPtr cached = cache.find(key); cached && cached->end >= reach && cached->begin <= step)
      return cached;
    ChunkPtr chunk = load_chunk(kind, sequence, layer, step, row_bytes);
    if (chunk && chunk->end > step) cache.put(key, chunk);
    return chunk;
  }

  // Calls use(row, step) for the rows of [begin, end), which must all be there.
  template <typename Use>
  void for_rows(std::string_view kind, int sequence, int layer, int begin, int end, size_t row_bytes,
                Use use) {
    for (int step = begin; step < end;) {
      ChunkPtr chunk = chunk_at(kind, sequence, layer, step, end, row_bytes);
      if (!chunk || chunk->end <= step)
        fail("{}: {} of sequence {}, layer {}: expected step {}, found a gap", file.string(), kind, sequence,
             layer, step);
      const int stop = std::min(end, chunk->end);
      use(chunk->data.data() + (step - chunk->begin) * row_bytes, step, stop);
      step = stop;
    }
  }

  std::filesystem::path file;
  mutable std::mutex database_mutex;
  Database database;
  const int version;
  const TraceHeader header;
  ChunkCache cache;
  Statement select_chunk, select_sequences, select_steps;

  mutable std::shared_mutex state_mutex;
  std::vector<TraceSequence> sequences;  // without tokens
  MetaMap meta;
};

TraceReader::TraceReader(const std::filesystem::path& file, TraceReaderOptions options)
    : impl_(std::make_unique<Impl>(file, options)) {}
TraceReader::~TraceReader() = default;

const std::filesystem::path& TraceReader::file() const {
  return impl_->file;
}
int TraceReader::format_version() const {
  return impl_->version;
}
const TraceHeader& TraceReader::header() const {
  return impl_->header;
}

std::map<std::string, std::string> TraceReader::meta() const {
  std::shared_lock lock(impl_->state_mutex);
  return impl_->meta;
}
bool TraceReader::complete() const {
  const auto facts = meta();
  auto found = facts.find("complete");
  return found != facts.end() && found->second == "1";
}
bool TraceReader::interrupted() const {
  const auto facts = meta();
  auto found = facts.find("interrupted");
  return found != facts.end() && found->second == "1";
}

bool TraceReader::refresh() {
  std::lock_guard lock(impl_->database_mutex);
  return impl_->load_state();
}

int TraceReader::n_sequences() const {
  std::shared_lock lock(impl_->state_mutex);
  return static_cast<int>(impl_->sequences.size());
}
std::map<int32_t, std::string> TraceReader::token_texts() const {
  std::map<int32_t, std::string> texts;
  if (impl_->version < 2) return texts;
  std::lock_guard lock(impl_->database_mutex);
  Statement select(impl_->database, "SELECT token, text FROM KV_TOKEN_TEXT");
  while (select.step()) texts.emplace(static_cast<int32_t>(select.integer(0)), select.text(1));
  return texts;
}

std::vector<GpuSource> TraceReader::gpu_sources() const {
  std::lock_guard lock(impl_->database_mutex);
  return load_gpu_sources(impl_->database);
}

int TraceReader::n_steps(int sequence) const {
  return impl_->n_steps(sequence);
}

TraceSequence TraceReader::sequence(int sequence) const {
  TraceSequence facts;
  {
    std::shared_lock lock(impl_->state_mutex);
    facts = impl_->sequence_of(sequence);
  }
  impl_->for_rows(chunk_kind::kTokens, sequence, -1, 0, facts.n_steps, sizeof(int32_t),
                  [&](const std::byte* rows, int begin, int end) {
                    facts.tokens.resize(end);
                    std::memcpy(facts.tokens.data() + begin, rows, (end - begin) * sizeof(int32_t));
                  });
  const std::vector<TraceStep> last = steps(sequence, facts.n_steps - 1, facts.n_steps);
  if (!last.empty()) facts.tokens.push_back(last.back().summary.next_token);
  return facts;
}

std::vector<TraceStep> TraceReader::steps(int sequence, int begin, int end) const {
  end = std::min(end, impl_->n_steps(sequence));
  begin = std::max(begin, 0);
  std::vector<TraceStep> out;
  if (begin >= end) return out;
  std::lock_guard lock(impl_->database_mutex);
  Statement& s = impl_->select_steps;
  s.reset();
  s.bind(1, sequence).bind(2, begin).bind(3, end);
  while (s.step()) {
    TraceStep step;
    StepSummary& summary = step.summary;
    summary.sequence = sequence;
    summary.pos = Pos{static_cast<int32_t>(s.integer(0))};
    summary.token = static_cast<int32_t>(s.integer(1));
    summary.next_token = static_cast<int32_t>(s.integer(2));
    summary.logprob = static_cast<float>(s.real(3));
    summary.margin = static_cast<float>(s.real(4));
    step.held_tokens = s.integer(5);
    step.evicted_tokens = s.integer(6);
    summary.start_ns = s.integer(7);
    summary.total_ns = s.integer(8);
    for (int p = 0; p < kStepPhases; ++p) summary.phase_ns[p] = s.integer(9 + p);
    step.queue_wait_ns = s.integer(16);
    out.push_back(step);
  }
  s.reset();
  return out;
}

std::vector<TraceEviction> TraceReader::evictions(int sequence, int layer, int begin, int end) const {
  impl_->check_layer(layer);
  end = std::min(end, impl_->n_steps(sequence));
  begin = std::max(begin, 0);
  std::vector<TraceEviction> out;
  for (int step = begin; step < end;) {
    const int slot_end = (step / kChunkSteps + 1) * kChunkSteps;
    // A chunk exists only where something was evicted.
    if (ChunkPtr chunk = impl_->chunk_at(chunk_kind::kEvictions, sequence, layer, step, end, 0)) {
      if (chunk->data.size() % sizeof(TraceEviction) != 0)
        fail("{}: raw_bytes: expected a multiple of {}, found {}",
             impl_->name_of(chunk_kind::kEvictions, sequence, layer, chunk->begin, chunk->id),
             sizeof(TraceEviction), chunk->data.size());
      for (size_t offset = 0; offset < chunk->data.size(); offset += sizeof(TraceEviction)) {
        TraceEviction record;
        std::memcpy(&record, chunk->data.data() + offset, sizeof record);
        if (record.step >= begin && record.step < end) out.push_back(record);
      }
    }
    step = slot_end;
  }
  return out;
}

int TraceReader::read_occupancy(int sequence, int layer, int begin, int end, int32_t* out) const {
  impl_->check_layer(layer);
  end = std::min(end, impl_->n_steps(sequence));
  begin = std::max(begin, 0);
  const size_t row_bytes = impl_->header.geometry.n_kv_heads * sizeof(int32_t);
  impl_->for_rows(chunk_kind::kOccupancy, sequence, layer, begin, end, row_bytes,
                  [&](const std::byte* rows, int from, int to) {
                    std::memcpy(reinterpret_cast<std::byte*>(out) + (from - begin) * row_bytes, rows,
                                (to - from) * row_bytes);
                  });
  return std::max(0, end - begin);
}

std::vector<SketchRow> TraceReader::sketches(int sequence, int layer, int begin, int end, int* first) const {
  impl_->check_layer(layer);
  end = std::min(end, impl_->n_steps(sequence));
  begin = std::max(begin, 0);
  const int n_heads = impl_->header.geometry.n_kv_heads;
  const size_t row_bytes = n_heads * sizeof(SketchRow);
  std::vector<SketchRow> out;
  *first = end;
  if (!impl_->header.has_sketch(layer)) return out;
  for (int step = begin; step < end;) {
    ChunkPtr chunk = impl_->chunk_at(chunk_kind::kSketch, sequence, layer, step, end, row_bytes);
    if (!chunk || chunk->end <= step) {
      // Prompt tokens have no sketch: rows begin somewhere in this chunk's range, or later.
      const int slot_end = (step / kChunkSteps + 1) * kChunkSteps, probe = std::min(slot_end, end) - 1;
      if (!out.empty())
        fail("{}: sketch of sequence {}, layer {}: expected step {}, found a gap", impl_->file.string(),
             sequence, layer, step);
      chunk = impl_->chunk_at(chunk_kind::kSketch, sequence, layer, probe, end, row_bytes);
      step = chunk && chunk->end > step && chunk->begin > step ? chunk->begin : slot_end;
      continue;
    }
    if (out.empty()) *first = step;
    const int stop = std::min(end, chunk->end);
    const size_t old = out.size();
    out.resize(old + static_cast<size_t>(stop - step) * n_heads);
    std::memcpy(static_cast<void*>(out.data() + old), chunk->data.data() + (step - chunk->begin) * row_bytes,
                (stop - step) * row_bytes);
    for (size_t i = old; i < out.size(); ++i) sort_sketch(out[i]);
    step = stop;
  }
  return out;
}

namespace {

// Heads of a row; throws when the trace does not hold such rows.
int check_rows(const TraceHeader& header, const std::string& file, int layer, RowKind kind, int first, int n,
               int n_steps) {
  if (!header.has_rows(layer))
    fail("{}: {} of layer {}: expected tier qkv with that layer, found tier {} with layers {}:{}", file,
         row_kind_name(kind), layer, tier_name(header.tier), header.layer_begin, header.layer_end);
  if (first < 0 || n < 0 || first > n_steps - n)
    fail("{}: {} of layer {}: expected positions within 0 to {}, found {} to {}", file, row_kind_name(kind),
         layer, n_steps, first, static_cast<int64_t>(first) + n);
  return kind == RowKind::q ? header.geometry.n_q_heads : header.geometry.n_kv_heads;
}

}  // namespace

void TraceReader::read_rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const {
  const CacheGeometry& g = impl_->header.geometry;
  const int heads =
      check_rows(impl_->header, impl_->file.string(), layer, kind, first, n, impl_->n_steps(sequence));
  const size_t values = static_cast<size_t>(heads) * g.head_dim;
  impl_->for_rows(row_kind_name(kind), sequence, layer, first, first + n, heads * g.row_bytes(),
                  [&](const std::byte* rows, int from, int to) {
                    load_rows(rows, (to - from) * values, g.dtype, out + (from - first) * values);
                  });
}

void TraceReader::read_rows_raw(int sequence, int layer, RowKind kind, int first, int n,
                                std::byte* out) const {
  const CacheGeometry& g = impl_->header.geometry;
  const int heads =
      check_rows(impl_->header, impl_->file.string(), layer, kind, first, n, impl_->n_steps(sequence));
  const size_t row_bytes = heads * g.row_bytes();
  impl_->for_rows(row_kind_name(kind), sequence, layer, first, first + n, row_bytes,
                  [&](const std::byte* rows, int from, int to) {
                    std::memcpy(out + (from - first) * row_bytes, rows, (to - from) * row_bytes);
                  });
}

std::string TraceReader::content_hash() const {
  const auto facts = meta();
  if (auto found = facts.find("content_hash"); found != facts.end()) return found->second;
  std::lock_guard lock(impl_->database_mutex);
  return compute_content_hash(impl_->database, impl_->header);
}

std::vector<ChunkDamage> TraceReader::damaged_chunks(
    const std::function<void(int64_t, int64_t)>& progress) const {
  // A connection of its own: the scan must not hold up other threads of this reader.
  Database database = open_file_for_reading(impl_->file, trace_file_kind());
  std::vector<ChunkDamage> damages;
  int64_t done = 0;
  const int64_t total = database.query_integer("SELECT count(*) FROM KV_CHUNK");
  Statement select(
      database,
      "SELECT id, kind, sequence, layer, step_begin, step_end, encoding, raw_bytes, checksum, data"
      " FROM KV_CHUNK ORDER BY id");
  try {
    while (select.step()) {
      ChunkDamage chunk{select.integer(0),
                        std::string(select.text(1)),
                        static_cast<int>(select.integer(2)),
                        static_cast<int>(select.integer(3)),
                        static_cast<int>(select.integer(4)),
                        static_cast<int>(select.integer(5)),
                        ""};
      try {
        decode_chunk(select.text(6), select.integer(7), select.integer(8), select.blob(9));
      } catch (const Error& error) {
        chunk.what = error.what();
        damages.push_back(std::move(chunk));
      }
      if (progress) progress(++done, total);
    }
  } catch (const Error& error) {
    ChunkDamage rest;
    rest.what = error.what();
    damages.push_back(std::move(rest));
  }
  return damages;
}

}  // namespace kvlapse
