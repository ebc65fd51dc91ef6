#include "trace/trace_writer.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <unordered_set>

#include "core/base/error.h"
#include "trace/row_convert.h"
#include "trace/write_queue.h"

namespace kvlapse {
namespace {

using Clock = std::chrono::steady_clock;

struct AlignedDelete {
  void operator()(std::byte* data) const { ::operator delete[](data, std::align_val_t{kRowAlignment}); }
};
using Buffer = std::unique_ptr<std::byte[], AlignedDelete>;

// Buffers of one size class are used again: a fresh one costs the page faults of its first touch.
class BufferPool : public std::enable_shared_from_this<BufferPool> {
 public:
  std::shared_ptr<std::byte[]> take(size_t bytes) {
    Buffer buffer;
    {
      std::lock_guard lock(mutex_);
      std::vector<Buffer>& free = free_[bytes];
      if (!free.empty()) {
        buffer = std::move(free.back());
        free.pop_back();
      }
    }
    if (!buffer)
      buffer.reset(static_cast<std::byte*>(::operator new[](bytes, std::align_val_t{kRowAlignment})));
    return {buffer.release(),
            [pool = shared_from_this(), bytes](std::byte* data) { pool->give(bytes, data); }};
  }

 private:
  void give(size_t bytes, std::byte* data) {
    Buffer buffer(data);
    std::lock_guard lock(mutex_);
    free_[bytes].push_back(std::move(buffer));
  }
  std::mutex mutex_;
  std::map<size_t, std::vector<Buffer>> free_;
};

std::shared_ptr<std::byte[]> copy_bytes(const void* data, size_t bytes) {
  std::shared_ptr<std::byte[]> copy(new std::byte[bytes]);
  std::memcpy(copy.get(), data, bytes);
  return copy;
}

// Width of the byte shuffle by kind, from real recordings at zstd's level 1: tokens, evictions and sketches
// become 15 to 35 % smaller; occupancy repeats whole numbers and becomes larger; q, k, v gain 1 % at two
// thirds of the speed.
constexpr int kNoShuffle = 1;

int chunk_end(int step) {
  return (step / kChunkSteps + 1) * kChunkSteps;
}

// Rows of one kind and layer: q, k, v or sketches. A full chunk is handed over at once, its rows never
// change.
struct RowStream {
  std::string_view kind;
  size_t row_bytes = 0;
  int element_bytes = 4;
  int begin = -1;       // of the open chunk; -1: no row yet
  int end = 0;          // behind its last row
  int flushed_end = 0;  // of what the writer was last given of it
  std::shared_ptr<std::byte[]> buffer;

  RowStream() = default;
  RowStream(std::string_view kind_name, size_t bytes, int element)
      : kind(kind_name), row_bytes(bytes), element_bytes(element) {}
  bool active() const { return row_bytes > 0; }
};

struct LayerStreams {
  int next_pos = 0;
  RowStream q, k, v, sketch;
  // [steps][H] since occupancy_begin, tokens held after the step; the newest row until its eviction: before
  // it.
  std::vector<int32_t> occupancy;
  int occupancy_begin = 0, occupancy_flushed = 0;
  std::vector<TraceEviction> evictions;  // since evictions_begin
  int evictions_begin = 0;
  size_t evictions_flushed = 0;
};

struct SequenceStreams {
  TraceSequence facts;  // tokens: fed ones and the newest choice
  std::vector<LayerStreams> layers;
  std::vector<TraceStep> steps;  // not yet handed over
  int tokens_begin = 0;          // of the open chunk
  int finished = 0;              // positions that all layers have, evictions included
  int flushed = 0;               // of these, handed over
  int64_t evicted_tokens = 0;    // by the running step
  int evicted_step = -1;
  int64_t queue_wait_ns = 0;
  bool begun = false;
};

}  // namespace

struct TraceWriter::Impl {
  Impl(const std::filesystem::path& file_path, TraceHeader trace_header,
       const TraceWriterOptions& writer_options)
      : file(file_path),
        header(std::move(trace_header)),
        options(writer_options),
        sequences(header.n_sequences) {}

  SequenceStreams& sequence_of(int sequence) {
    if (sequence < 0 || sequence >= static_cast<int>(sequences.size()))
      fail("{}: sequence: expected 0 to {}, found {}", file.string(), sequences.size() - 1, sequence);
    if (!sequences[sequence].begun) fail("{}: sequence {} has no prompt", file.string(), sequence);
    return sequences[sequence];
  }

  void push(SequenceStreams& sequence, WriteMessage message) {
    sequence.queue_wait_ns += queue->push(std::move(message));
  }

  // Texts of ids that occur for the first time.
  void name_tokens(SequenceStreams& sequence, std::span<const int32_t> ids) {
    if (!options.token_text) return;
    TokenTextMessage message;
    for (int32_t id : ids)
      if (named_tokens.insert(id).second) message.texts.emplace_back(id, options.token_text(id));
    if (!message.texts.empty()) push(sequence, std::move(message));
  }

  // Hands over rows [begin, end) of the open chunk.
  void flush_stream(SequenceStreams& sequence, int layer, RowStream& stream, int end) {
    if (stream.begin < 0 || end <= stream.flushed_end || end <= stream.begin) return;
    ChunkMessage chunk{
        stream.kind, sequence.facts.sequence, layer,         stream.begin,
        end,         stream.element_bytes,    stream.buffer, (end - stream.begin) * stream.row_bytes};
    stream.flushed_end = end;
    publish_rows();
    push(sequence, std::move(chunk));
  }

  std::byte* next_row(SequenceStreams& sequence, RowStream& stream, int layer, int pos) {
    if (stream.begin < 0) {
      stream.begin = stream.end = pos;
    } else if (pos != stream.end) {
      fail("{}: {} rows of sequence {}, layer {}: expected position {}, found {}", file.string(), stream.kind,
           sequence.facts.sequence, layer, stream.end, pos);
    }
    if (!stream.buffer) stream.buffer = pool->take(kChunkSteps * stream.row_bytes);
    std::byte* row = stream.buffer.get() + (pos - stream.begin) * stream.row_bytes;
    ++stream.end;
    return row;
  }

  void close_if_full(SequenceStreams& sequence, RowStream& stream, int layer) {
    if (stream.end != chunk_end(stream.begin)) return;
    flush_stream(sequence, layer, stream, stream.end);
    stream.buffer.reset();
    stream.begin = stream.end;
  }

  void append_row(SequenceStreams& sequence, RowStream& stream, int layer, int pos, const float* values,
                  size_t n) {
    store_rows(values, n, header.geometry.dtype, next_row(sequence, stream, layer, pos));
    close_if_full(sequence, stream, layer);
  }

  // Occupancy and evictions of [.., finished): whole chunks always, the open one when `partial`.
  void flush_layer_events(SequenceStreams& sequence, int layer, bool partial) {
    LayerStreams& streams = sequence.layers[layer];
    const int n_heads = header.geometry.n_kv_heads, id = sequence.facts.sequence;
    while (true) {
      const int begin = streams.occupancy_begin, end = std::min(sequence.finished, chunk_end(begin));
      const bool full = end == chunk_end(begin);
      if (end <= begin || !(full || (partial && end > streams.occupancy_flushed))) break;
      const size_t values = static_cast<size_t>(end - begin) * n_heads, bytes = values * sizeof(int32_t);
      push(sequence, ChunkMessage{chunk_kind::kOccupancy, id, layer, begin, end, kNoShuffle,
                                  copy_bytes(streams.occupancy.data(), bytes), bytes});
      streams.occupancy_flushed = end;
      if (!full) break;
      streams.occupancy.erase(streams.occupancy.begin(),
                              streams.occupancy.begin() + static_cast<ptrdiff_t>(values));
      streams.occupancy_begin = end;
    }
    while (true) {
      const int begin = streams.evictions_begin, end = std::min(sequence.finished, chunk_end(begin));
      const bool full = end == chunk_end(begin);
      if (end <= begin || !(full || partial)) break;
      const auto behind = std::find_if(streams.evictions.begin(), streams.evictions.end(),
                                       [&](const TraceEviction& e) { return e.step >= end; });
      const auto count = static_cast<size_t>(behind - streams.evictions.begin());
      if (count > streams.evictions_flushed || (full && count > 0)) {
        const size_t bytes = count * sizeof(TraceEviction);
        push(sequence, ChunkMessage{chunk_kind::kEvictions, id, layer, begin, end, sizeof(TraceEviction),
                                    copy_bytes(streams.evictions.data(), bytes), bytes});
        streams.evictions_flushed = count;
      }
      if (!full) break;
      streams.evictions.erase(streams.evictions.begin(), behind);
      streams.evictions_flushed = 0;
      streams.evictions_begin = end;
    }
  }

  void flush_tokens(SequenceStreams& sequence, bool partial) {
    while (true) {
      const int begin = sequence.tokens_begin, end = std::min(sequence.finished, chunk_end(begin));
      const bool full = end == chunk_end(begin);
      if (end <= begin || !(full || partial)) break;
      const size_t bytes = static_cast<size_t>(end - begin) * sizeof(int32_t);
      push(sequence,
           ChunkMessage{chunk_kind::kTokens, sequence.facts.sequence, -1, begin, end, sizeof(int32_t),
                        copy_bytes(sequence.facts.tokens.data() + begin, bytes), bytes});
      if (!full) break;
      sequence.tokens_begin = end;
    }
  }

  // Everything of [flushed, finished) of one sequence, then its new length.
  void flush(SequenceStreams& sequence) {
    if (sequence.finished <= sequence.flushed) return;
    for (int layer = 0; layer < header.geometry.n_layers; ++layer) {
      LayerStreams& streams = sequence.layers[layer];
      for (RowStream* stream : {&streams.q, &streams.k, &streams.v, &streams.sketch})
        if (stream->active())
          flush_stream(sequence, layer, *stream, std::min(stream->end, sequence.finished));
      flush_layer_events(sequence, layer, /*partial=*/true);
    }
    flush_tokens(sequence, /*partial=*/true);
    if (!sequence.steps.empty()) push(sequence, StepsMessage{std::exchange(sequence.steps, {})});
    sequence.flushed = sequence.finished;
    push_facts(sequence);
  }

  void push_facts(SequenceStreams& sequence) {
    std::vector<int32_t> tokens = std::move(sequence.facts.tokens);  // the writer has them already
    TraceSequence facts = sequence.facts;
    sequence.facts.tokens = std::move(tokens);
    facts.n_steps = sequence.flushed;
    push(sequence, SequenceMessage{std::move(facts)});
  }

  void commit() {
    queue->push(CommitMessage{});
    last_commit = Clock::now();
  }

  // Called when a position of `sequence` became whole.
  void advance(SequenceStreams& sequence, int whole) {
    if (whole <= sequence.finished) return;
    sequence.finished = whole;
    if (whole / kChunkSteps != sequence.flushed / kChunkSteps) {
      flush(sequence);
      commit();
    } else if (Clock::now() - last_commit >= options.commit_interval) {
      for (SequenceStreams& each : sequences)
        if (each.begun) flush(each);
      commit();
    }
  }

  // While a prompt passes, a position is whole when every layer had it; its last one only after the first
  // step, because the prompt's cut comes behind it.
  void advance_prompt(SequenceStreams& sequence) {
    int least = sequence.facts.n_prompt - 1;
    for (const LayerStreams& layer : sequence.layers) least = std::min(least, layer.next_pos);
    advance(sequence, least);
  }

  std::filesystem::path file;
  TraceHeader header;
  TraceWriterOptions options;
  std::shared_ptr<BufferPool> pool = std::make_shared<BufferPool>();
  std::vector<SequenceStreams> sequences;
  std::unordered_set<int32_t> named_tokens;
  std::unique_ptr<WriteQueue> queue;
  Clock::time_point last_commit = Clock::now();
  bool finished = false;
};

TraceWriter::TraceWriter(const std::filesystem::path& file, TraceHeader header, TraceWriterOptions options)
    : impl_(std::make_unique<Impl>(file, std::move(header), options)) {
  const TraceHeader& h = impl_->header;
  if (h.tier == TraceTier::qkv && h.geometry.dtype == DType::f8e4m3)
    fail("{}: tier qkv: expected a cache in fp32, fp16 or bf16, found fp8", file.string());
  create_file(file, trace_file_kind(), options.force, [&](Database& database) { store_header(database, h); });
  impl_->queue = std::make_unique<WriteQueue>(open_file_for_appending(file, trace_file_kind()), options);
}

TraceWriter::~TraceWriter() {
  if (!impl_ || impl_->finished) return;
  try {
    for (SequenceStreams& sequence : impl_->sequences)
      if (sequence.begun) impl_->flush(sequence);
    impl_->commit();
    fold_wal(impl_->queue->stop());
  } catch (const std::exception&) {
    // Already thrown to the caller by the call before, or the caller is unwinding: what was committed stays.
  }
}

const TraceHeader& TraceWriter::header() const {
  return impl_->header;
}

void TraceWriter::begin_sequence(int id, uint64_t seed, int budget_slots, std::span<const int32_t> prompt) {
  if (id < 0 || id >= static_cast<int>(impl_->sequences.size()))
    fail("{}: sequence: expected 0 to {}, found {}", impl_->file.string(), impl_->sequences.size() - 1, id);
  SequenceStreams& sequence = impl_->sequences[id];
  if (sequence.begun) fail("{}: sequence {} began twice", impl_->file.string(), id);
  if (prompt.empty()) fail("{}: sequence {}: expected a prompt, found no tokens", impl_->file.string(), id);
  const CacheGeometry& g = impl_->header.geometry;
  sequence.begun = true;
  sequence.facts.sequence = id;
  sequence.facts.seed = seed;
  sequence.facts.budget_slots = !impl_->header.policy.evicts ? 0
                                : budget_slots > 0           ? budget_slots
                                                             : impl_->header.budget_slots;
  sequence.facts.n_prompt = static_cast<int>(prompt.size());
  sequence.facts.tokens.assign(prompt.begin(), prompt.end());
  sequence.layers.resize(g.n_layers);
  for (int l = 0; l < g.n_layers; ++l) {
    LayerStreams& layer = sequence.layers[l];
    if (impl_->header.has_rows(l)) {
      layer.q = RowStream("q", g.n_q_heads * g.row_bytes(), kNoShuffle);
      layer.k = RowStream("k", g.n_kv_heads * g.row_bytes(), kNoShuffle);
      layer.v = RowStream("v", g.n_kv_heads * g.row_bytes(), kNoShuffle);
    }
    if (impl_->header.has_sketch(l))
      layer.sketch = RowStream(chunk_kind::kSketch, g.n_kv_heads * sizeof(SketchRow), sizeof(float));
  }
  impl_->push_facts(sequence);
  impl_->name_tokens(sequence, prompt);
  impl_->commit();
}

void TraceWriter::append(int id, int layer, Pos pos, const LayerRecord& record) {
  SequenceStreams& sequence = impl_->sequence_of(id);
  const CacheGeometry& g = impl_->header.geometry;
  if (layer < 0 || layer >= g.n_layers)
    fail("{}: layer: expected 0 to {}, found {}", impl_->file.string(), g.n_layers - 1, layer);
  LayerStreams& streams = sequence.layers[layer];
  if (raw(pos) != streams.next_pos)
    fail("{}: sequence {}, layer {}: expected position {}, found {}", impl_->file.string(), id, layer,
         streams.next_pos, raw(pos));
  if (static_cast<int>(record.held.size()) != g.n_kv_heads)
    fail("{}: held: expected {} kv heads, found {}", impl_->file.string(), g.n_kv_heads, record.held.size());
  ++streams.next_pos;
  streams.occupancy.insert(streams.occupancy.end(), record.held.begin(), record.held.end());
  if (streams.k.active()) {
    if (!record.rows) fail("{}: tier qkv: layer {}: expected rows, found none", impl_->file.string(), layer);
    const size_t q = static_cast<size_t>(g.n_q_heads) * g.head_dim,
                 kv = static_cast<size_t>(g.n_kv_heads) * g.head_dim;
    impl_->append_row(sequence, streams.q, layer, raw(pos), record.rows->q, q);
    impl_->append_row(sequence, streams.k, layer, raw(pos), record.rows->k, kv);
    impl_->append_row(sequence, streams.v, layer, raw(pos), record.rows->v, kv);
  }
  if (streams.sketch.active() && !record.sketch.empty()) {
    std::memcpy(impl_->next_row(sequence, streams.sketch, layer, raw(pos)), record.sketch.data(),
                streams.sketch.row_bytes);
    impl_->close_if_full(sequence, streams.sketch, layer);
  }
  if (raw(pos) < sequence.facts.n_prompt && layer == g.n_layers - 1) impl_->advance_prompt(sequence);
}

void TraceWriter::evict(int id, int layer, const EvictionPlan& plan) {
  SequenceStreams& sequence = impl_->sequence_of(id);
  LayerStreams& streams = sequence.layers.at(layer);
  const int n_heads = impl_->header.geometry.n_kv_heads, step = raw(plan.step);
  if (step != streams.next_pos - 1)
    fail("{}: eviction of sequence {}, layer {}: expected step {}, found {}", impl_->file.string(), id, layer,
         streams.next_pos - 1, step);
  if (step != sequence.evicted_step) sequence.evicted_tokens = 0;
  sequence.evicted_step = step;
  int32_t* held = streams.occupancy.data() + static_cast<size_t>(step - streams.occupancy_begin) * n_heads;
  for (const Drop& drop : plan.drops) {
    TraceEviction record;
    record.step = step;
    record.pos = raw(drop.pos);
    record.slot = raw(drop.slot);
    record.kv_head = static_cast<int16_t>(drop.kv_head);
    record.reason = plan.reason;
    record.score = drop.score;
    record.threshold = plan.threshold[drop.kv_head == kWholeLayer ? 0 : drop.kv_head];
    record.parts = drop.parts;
    streams.evictions.push_back(record);
    for (int h = drop.kv_head == kWholeLayer ? 0 : drop.kv_head; h < n_heads; ++h) {
      --held[h];
      ++sequence.evicted_tokens;
      if (drop.kv_head != kWholeLayer) break;
    }
  }
}

void TraceWriter::step(const StepSummary& summary) {
  SequenceStreams& sequence = impl_->sequence_of(summary.sequence);
  const int pos = raw(summary.pos), n_heads = impl_->header.geometry.n_kv_heads;
  TraceStep step;
  step.summary = summary;
  for (const LayerStreams& layer : sequence.layers) {
    if (layer.next_pos != pos + 1)
      fail("{}: step {} of sequence {}: expected {} positions in every layer, found {}", impl_->file.string(),
           pos, summary.sequence, pos + 1, layer.next_pos);
    const int32_t* held = layer.occupancy.data() + static_cast<size_t>(pos - layer.occupancy_begin) * n_heads;
    for (int h = 0; h < n_heads; ++h) step.held_tokens += held[h];
  }
  step.evicted_tokens = sequence.evicted_step == pos ? sequence.evicted_tokens : 0;
  step.queue_wait_ns = std::exchange(sequence.queue_wait_ns, 0);
  std::vector<int32_t>& tokens = sequence.facts.tokens;
  tokens.resize(pos + 1);
  tokens[pos] = summary.token;
  tokens.push_back(summary.next_token);
  impl_->name_tokens(sequence, {&summary.next_token, 1});
  sequence.steps.push_back(step);
  impl_->advance(sequence, pos + 1);
}

void TraceWriter::pass(int id, int32_t token) {
  SequenceStreams& sequence = impl_->sequence_of(id);
  const int pos = std::max(sequence.finished, sequence.facts.n_prompt - 1);
  for (const LayerStreams& layer : sequence.layers)
    if (layer.next_pos != pos + 1)
      fail("{}: token {} of sequence {}: expected {} positions in every layer, found {}",
           impl_->file.string(), pos, id, pos + 1, layer.next_pos);
  std::vector<int32_t>& tokens = sequence.facts.tokens;
  tokens.resize(pos + 1);
  tokens[pos] = token;
  impl_->advance(sequence, pos + 1);
}

void TraceWriter::add_gpu(GpuBatch batch) {
  if (!batch.empty()) impl_->queue->push(GpuMessage{std::move(batch)});
}

void TraceWriter::end_sequence(int id, std::string_view reason) {
  SequenceStreams& sequence = impl_->sequence_of(id);
  sequence.facts.end_reason = reason;
  // A forward pass that chose no token: only when all layers had it.
  int whole = sequence.layers.front().next_pos;
  for (const LayerStreams& layer : sequence.layers) whole = std::min(whole, layer.next_pos);
  whole = std::min(whole, static_cast<int>(sequence.facts.tokens.size()));
  sequence.finished = std::max(sequence.finished, whole);
  impl_->flush(sequence);
  impl_->push_facts(sequence);
  impl_->commit();
}

void TraceWriter::describe_sequence(const TraceSequence& facts) {
  SequenceStreams& sequence = impl_->sequence_of(facts.sequence);
  TraceSequence merged = facts;
  merged.seed = sequence.facts.seed;
  merged.n_prompt = sequence.facts.n_prompt;
  merged.budget_slots = sequence.facts.budget_slots;
  merged.end_reason = sequence.facts.end_reason;
  merged.tokens = std::move(sequence.facts.tokens);
  sequence.facts = std::move(merged);
  impl_->push_facts(sequence);
}

void TraceWriter::finish(bool interrupted, const std::map<std::string, std::string>& meta) {
  if (impl_->finished) fail("{}: finished twice", impl_->file.string());
  for (SequenceStreams& sequence : impl_->sequences)
    if (sequence.begun) impl_->flush(sequence);
  impl_->commit();
  Database& database = impl_->queue->stop();
  const TraceWriterStats stats = impl_->queue->stats();
  MetaMap all = meta;
  all["complete"] = interrupted ? "0" : "1";
  all["interrupted"] = interrupted ? "1" : "0";
  all["queue_wait_ns"] = std::to_string(stats.queue_wait_ns);
  all["queue_waits"] = std::to_string(stats.queue_waits);
  all["packers"] = std::to_string(stats.packers);
  all["writer_cpu_ns"] = std::to_string(stats.writer_cpu_ns);
  all["dropped_records"] = std::to_string(stats.dropped_records);
  all["raw_bytes"] = std::to_string(stats.raw_bytes);
  all["stored_bytes"] = std::to_string(stats.stored_bytes);
  {
    Transaction transaction(database);
    all["content_hash"] = compute_content_hash(database, impl_->header);
    store_meta(database, all);
    transaction.commit();
  }
  fold_wal(database);
  impl_->finished = true;
}

TraceWriterStats TraceWriter::stats() const {
  return impl_->queue->stats();
}

int64_t TraceWriter::file_bytes() const {
  int64_t bytes = 0;
  for (const char* suffix : {"", "-wal"}) {
    std::error_code error;
    const auto size = std::filesystem::file_size(impl_->file.string() + suffix, error);
    if (!error) bytes += static_cast<int64_t>(size);
  }
  return bytes;
}

}  // namespace kvlapse
