// TraceWriter: the append-only side of a trace. The decoding thread copies into chunk buffers; threads behind
// a bounded queue compress them, and one of them commits in order: all layers of a step or none, every 64
// steps or every second. The file does not depend on how many compress. The caller waits only when the queue
// is full, and the wait is measured. A failure behind the queue (full disk) is thrown by the next call; what
// was committed before stays valid. All calls come from one thread.
//
// A run of a sequence: begin_sequence; for each position in order and each layer: append, then evict if the
// policy did; step after all layers of a generated token; end_sequence. Sequences may interleave, prompts may
// go layer by layer.
#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>

#include "core/policy/plan.h"
#include "trace/gpu_records.h"
#include "trace/trace_types.h"

namespace kvlapse {

struct TraceWriterOptions {
  bool force = false;  // replace an existing file
  int zstd_level = 1;
  int packers = 0;  // threads that compress, the writing one among them; 0: half of the machine's, at most 8
  size_t queue_bytes = size_t{64} << 20;            // of chunks that may wait for the writer
  std::chrono::milliseconds commit_interval{1000};  // at most, while steps arrive
  // Bytes of a token, asked once for each id that occurs; empty: texts are not stored.
  std::function<std::string(int32_t)> token_text = {};
};

// What a layer hands over for one token.
struct LayerRecord {
  std::span<const int32_t> held;      // [H] tokens that attention saw, this one included
  const TokenRows* rows = nullptr;    // qkv tier; values already rounded to the cache's dtype
  std::span<const SketchRow> sketch;  // [H] sketch tier; empty when attention was not computed (prompt)
};

struct TraceWriterStats {
  int64_t queue_wait_ns = 0;  // decode waited for the writer, measured
  int64_t queue_waits = 0;
  int64_t writer_cpu_ns = 0;    // CPU time of the threads behind the queue, measured
  int packers = 0;              // threads that compress
  int64_t raw_bytes = 0;        // of chunks, before compression
  int64_t stored_bytes = 0;     // of chunks, after it
  int64_t committed_steps = 0;  // forward passes of all sequences, prompts included
  int64_t dropped_records = 0;  // always 0: decode waits instead
};

class TraceWriter {
 public:
  // Makes the file with its header. Throws Error when it cannot.
  TraceWriter(const std::filesystem::path& file, TraceHeader header, TraceWriterOptions options = {});
  // Without finish(): commits what is whole and leaves complete = 0. Never throws.
  ~TraceWriter();
  TraceWriter(const TraceWriter&) = delete;
  TraceWriter& operator=(const TraceWriter&) = delete;

  const TraceHeader& header() const;

  // `budget_slots`: 0 takes the header's.
  void begin_sequence(int sequence, uint64_t seed, int budget_slots, std::span<const int32_t> prompt);
  void append(int sequence, int layer, Pos pos, const LayerRecord& record);
  void evict(int sequence, int layer, const EvictionPlan& plan);
  void step(const StepSummary& summary);
  // Instead of step, for rows from elsewhere: only the token that was fed is known, or kNoToken. From the
  // prompt's last position on; leaves no row in KV_STEP.
  void pass(int sequence, int32_t token);
  void end_sequence(int sequence, std::string_view reason);
  // Task, texts, tags, answer. Tokens, lengths and the end reason are the writer's own.
  void describe_sequence(const TraceSequence& facts);

  // What a GPU profiler gathered; committed with the next steps.
  void add_gpu(GpuBatch batch);

  // Commits everything, stores `meta` beside the header's, marks the file complete (or interrupted) and folds
  // the WAL into it. Throws Error when something could not be written.
  void finish(bool interrupted, const std::map<std::string, std::string>& meta = {});

  TraceWriterStats stats() const;
  int64_t file_bytes() const;  // on disk now, side files included

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// Expected size of a trace of `tokens` forward passes per sequence, `n_prompt` of them of the prompt.
// Modelled: raw sizes times the compression that was measured on real recordings of each dtype.
int64_t estimate_trace_bytes(const TraceHeader& header, int64_t tokens, int64_t n_prompt = 0);

}  // namespace kvlapse
