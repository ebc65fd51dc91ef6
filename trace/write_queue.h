// The threads behind a trace's writer and the bounded queue in front of them. Packers compress chunks in any
// order; one of them, the writer thread, owns the connection and handles messages in the order of push, so
// the file is the same for any number of packers. Everything between two commits is one transaction; a
// checkpointer moves what is committed into the file. One producer thread.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <variant>
#include <vector>

#include "trace/checkpointer.h"
#include "trace/chunk_codec.h"
#include "trace/gpu_rows.h"
#include "trace/trace_file.h"
#include "trace/trace_writer.h"

namespace kvlapse {

// Rows [step_begin, step_end) of one stream. The buffer may grow behind `bytes` while the writer reads it.
struct ChunkMessage {
  std::string_view kind;  // static text
  int sequence = 0, layer = -1;
  int step_begin = 0, step_end = 0;
  int element_bytes = 1;
  std::shared_ptr<const std::byte[]> data;
  size_t bytes = 0;
};
struct StepsMessage {
  std::vector<TraceStep> steps;
};
// What is known of a sequence now; its tokens are not looked at.
struct SequenceMessage {
  TraceSequence facts;
};
struct TokenTextMessage {
  std::vector<std::pair<int32_t, std::string>> texts;
};
struct GpuMessage {
  GpuBatch batch;
};
struct CommitMessage {};
using WriteMessage =
    std::variant<ChunkMessage, StepsMessage, SequenceMessage, TokenTextMessage, GpuMessage, CommitMessage>;

class WriteQueue {
 public:
  WriteQueue(Database database, const TraceWriterOptions& options);
  ~WriteQueue();  // handles what is queued, then stops

  // Waits while more than options.queue_bytes are queued: of a chunk its size as it is now, compressed or
  // not. Throws Error when a thread behind the queue failed. Returns the wait.
  int64_t push(WriteMessage message);
  // Handles what is queued and stops. Throws Error when the writer failed. The connection is the caller's
  // afterwards.
  Database& stop();
  TraceWriterStats stats() const;

 private:
  struct ChunkKey {
    std::string_view kind;
    int sequence, layer;
    bool operator==(const ChunkKey&) const = default;
  };
  struct ChunkKeyHash {
    size_t operator()(const ChunkKey& key) const;
  };
  struct LastChunk {
    int step_begin = -1;
    int64_t id = 0;
  };
  struct Statements;
  // A message on its way. Only a thread that took it, or the writer once it is ready, looks inside.
  struct Slot {
    enum class State : uint8_t { waiting, packing, ready };
    WriteMessage message;
    size_t bytes = 0;
    State state = State::ready;
    EncodedChunk chunk;   // of a chunk that is ready
    std::string failure;  // of its packer
  };
  using Lock = std::unique_lock<std::mutex>;

  void write();
  void pack();
  Slot* take();  // the first chunk that nobody packs yet
  void pack(Slot& slot, ChunkEncoder& encoder, Lock& lock);
  void handle_front(Lock& lock);
  void wake_producer();
  void count_cpu(int64_t& before_ns);
  void join();
  void handle(ChunkMessage& message, const EncodedChunk& chunk);
  void handle(StepsMessage& message);
  void handle(SequenceMessage& message);
  void handle(TokenTextMessage& message);
  void handle(GpuMessage& message);
  void handle(CommitMessage& message);
  void begin_if_needed();
  void throw_if_failed() const;

  // The writer thread's own, until stop().
  Database database_;
  std::unique_ptr<Statements> statements_;
  std::unique_ptr<Checkpointer> checkpointer_;
  std::unique_ptr<GpuRows> gpu_rows_;  // once there is something to write
  std::unique_ptr<Transaction> transaction_;
  std::unordered_map<ChunkKey, LastChunk, ChunkKeyHash> last_chunks_;
  int64_t next_chunk_id_ = 1;

  const size_t queue_bytes_;
  const int zstd_level_;
  mutable std::mutex mutex_;
  std::condition_variable front_ready_, to_pack_, not_full_;
  std::deque<Slot> slots_;  // in order; a slot stays where it is until it was handled
  size_t n_passed_ = 0;     // slots from the front that need no packer
  size_t n_waiting_ = 0;    // slots that do
  size_t queued_bytes_ = 0;
  bool stopping_ = false;
  std::string failure_;
  TraceWriterStats stats_;
  std::vector<std::thread> packers_;
  std::thread writer_;
};

}  // namespace kvlapse
