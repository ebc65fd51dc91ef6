// TraceReader: the read-only side of a trace, finished, killed or still being written. Any member may be
// called from any number of threads; two readers of one file do not disturb each other or the writer. Memory
// is bounded by the chunk cache, not by the trace. Never writes (SQLite's own WAL recovery aside). A damaged
// or truncated file gives Errors that name the file and the chunk, never a crash.
//
// A step is a token position; positions [0, n_steps) of a sequence were recorded, prompt included. refresh()
// moves n_steps and what depends on it; between two calls all answers agree.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <span>

#include "trace/gpu_records.h"
#include "trace/trace_types.h"

namespace kvlapse {

struct TraceReaderOptions {
  size_t cache_bytes = size_t{256} << 20;  // decoded chunks kept, all threads together
};

// A chunk that cannot be used, or whose content differs from its checksum.
struct ChunkDamage {
  int64_t id = 0;
  std::string kind;
  int sequence = 0, layer = -1;
  int step_begin = 0, step_end = 0;
  std::string what;  // one line
};

class TraceReader {
 public:
  explicit TraceReader(const std::filesystem::path& file, TraceReaderOptions options = {});
  ~TraceReader();
  TraceReader(const TraceReader&) = delete;
  TraceReader& operator=(const TraceReader&) = delete;

  const std::filesystem::path& file() const;
  int format_version() const;
  const TraceHeader& header() const;  // as of opening; its meta does not grow
  // Keys and values as of the last refresh: header facts, and what is only known at the end (overhead,
  // content hash).
  std::map<std::string, std::string> meta() const;
  bool complete() const;     // finished without interruption
  bool interrupted() const;  // ended by Ctrl-C
  // Takes in what was committed since. True when something changed.
  bool refresh();

  int n_sequences() const;
  TraceSequence sequence(int sequence) const;
  int n_steps(int sequence) const;
  // Bytes of the tokens that occur; empty when the recorder did not store them.
  std::map<int32_t, std::string> token_texts() const;

  // GPU facts that were asked for, and why one is missing; empty when none was.
  std::vector<GpuSource> gpu_sources() const;

  // Ranges are half open and are clipped to what was recorded.
  std::vector<TraceStep> steps(int sequence, int begin, int end) const;  // only steps that chose a token
  std::vector<TraceEviction> evictions(int sequence, int layer, int begin, int end) const;
  // Tokens held after each step: [end - begin][H], clipped at the end. Returns the number of steps.
  int read_occupancy(int sequence, int layer, int begin, int end, int32_t* out) const;
  // [steps][H] of the steps in range that have a sketch; `first` receives the position of the first one.
  std::vector<SketchRow> sketches(int sequence, int layer, int begin, int end, int* first) const;

  // q [n][Hq][D], k or v [n][H][D] of positions [first, first + n). Throws Error when the trace does not hold
  // them.
  void read_rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const;
  // The same in the dtype of the file, n * heads * D * dtype_bytes.
  void read_rows_raw(int sequence, int layer, RowKind kind, int first, int n, std::byte* out) const;

  // Over the ordered checksums of all chunks: equal for equal recordings, whatever the file's bytes.
  std::string content_hash() const;
  // Decodes every chunk. `progress` is called with (done, total).
  std::vector<ChunkDamage> damaged_chunks(const std::function<void(int64_t, int64_t)>& progress = {}) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvlapse
