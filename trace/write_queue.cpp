#include "trace/write_queue.h"

#include <time.h>

#include <algorithm>
#include <chrono>

#include "core/base/error.h"

namespace kvlapse {
namespace {

int64_t thread_cpu_ns() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

size_t bytes_of(const WriteMessage& message) {
  if (const auto* gpu = std::get_if<GpuMessage>(&message))
    return gpu->batch.kernels.size() * sizeof(GpuKernel) + gpu->batch.dram.size() * sizeof(DramSample);
  const auto* chunk = std::get_if<ChunkMessage>(&message);
  return chunk ? chunk->bytes : 0;
}

}  // namespace

struct WriteQueue::Statements {
  explicit Statements(Database& database)
      : insert_chunk(database,
                     "INSERT INTO KV_CHUNK(id, kind, sequence, layer, step_begin, step_end, encoding, "
                     "raw_bytes, checksum,"
                     " data) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        update_chunk(database,
                     "UPDATE KV_CHUNK SET step_end = ?, encoding = ?, raw_bytes = ?, checksum = ?, data = ? "
                     "WHERE id = ?"),
        insert_step(database,
                    "INSERT INTO KV_STEP(sequence, step, token, next_token, logprob, margin, held_tokens, "
                    "evicted_tokens,"
                    " start_ns, total_ns, embed_ns, attention_ns, matmul_ns, evict_ns, head_ns, sample_ns, "
                    "observe_ns,"
                    " queue_wait_ns) VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        put_sequence(
            database,
            "INSERT OR REPLACE INTO KV_SEQUENCE(sequence, seed, n_prompt, n_steps, budget_slots, think_begin,"
            " think_end, task, prompt, text, answer, answer_right, end_reason)"
            " VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"),
        insert_text(database, "INSERT INTO KV_TOKEN_TEXT(token, text) VALUES(?, ?)") {}
  Statement insert_chunk, update_chunk, insert_step, put_sequence, insert_text;
};

size_t WriteQueue::ChunkKeyHash::operator()(const ChunkKey& key) const {
  return std::hash<std::string_view>()(key.kind) ^ (static_cast<size_t>(key.sequence) << 20) ^
         (static_cast<size_t>(key.layer + 1) << 4);
}

WriteQueue::WriteQueue(Database database, const TraceWriterOptions& options)
    : database_(std::move(database)),
      statements_(std::make_unique<Statements>(database_)),
      encoder_(options.zstd_level),
      queue_bytes_(options.queue_bytes),
      thread_([this] { run(); }) {}

WriteQueue::~WriteQueue() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  not_empty_.notify_all();
  if (thread_.joinable()) thread_.join();
}

int64_t WriteQueue::push(WriteMessage message) {
  const size_t bytes = bytes_of(message);
  int64_t waited_ns = 0;
  {
    std::unique_lock lock(mutex_);
    throw_if_failed();
    // A message larger than the queue passes when the queue is empty.
    auto fits = [&] {
      return queued_bytes_ == 0 || queued_bytes_ + bytes <= queue_bytes_ || !failure_.empty();
    };
    if (!fits()) {
      const auto start = std::chrono::steady_clock::now();
      not_full_.wait(lock, fits);
      waited_ns = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
      stats_.queue_wait_ns += waited_ns;
      ++stats_.queue_waits;
      throw_if_failed();
    }
    queued_bytes_ += bytes;
    messages_.push_back(std::move(message));
  }
  not_empty_.notify_one();
  return waited_ns;
}

Database& WriteQueue::stop() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  not_empty_.notify_all();
  if (thread_.joinable()) thread_.join();
  throw_if_failed();
  gpu_rows_.reset();
  statements_.reset();
  return database_;
}

TraceWriterStats WriteQueue::stats() const {
  std::lock_guard lock(mutex_);
  return stats_;
}

void WriteQueue::throw_if_failed() const {
  if (!failure_.empty()) throw Error(failure_);
}

void WriteQueue::run() {
  while (true) {
    WriteMessage message;
    {
      std::unique_lock lock(mutex_);
      not_empty_.wait(lock, [&] { return !messages_.empty() || stopping_; });
      if (messages_.empty()) break;
      message = std::move(messages_.front());
      messages_.pop_front();
    }
    const size_t bytes = bytes_of(message);
    std::string failure;
    try {
      std::visit([&](auto& typed) { handle(typed); }, message);
    } catch (const std::exception& error) {
      failure = error.what();
    }
    // The buffer goes back to its pool before the producer is woken to take it.
    message = CommitMessage{};
    {
      std::lock_guard lock(mutex_);
      queued_bytes_ -= bytes;
      stats_.writer_cpu_ns = thread_cpu_ns();
      if (!failure.empty()) {
        failure_ = fmt::format("{}; the trace is valid and holds {} steps", failure, stats_.committed_steps);
        messages_.clear();
        queued_bytes_ = 0;
      }
    }
    not_full_.notify_all();
    if (!failure.empty()) break;
  }
  try {
    gpu_rows_.reset();
    statements_.reset();
    transaction_.reset();  // what was not committed is not whole
  } catch (const std::exception&) {
    // The connection is broken already and failure_ says so.
  }
}

void WriteQueue::begin_if_needed() {
  if (!transaction_) transaction_ = std::make_unique<Transaction>(database_);
}

void WriteQueue::handle(ChunkMessage& message) {
  begin_if_needed();
  const EncodedChunk chunk = encoder_.encode({message.data.get(), message.bytes}, message.element_bytes);
  const auto raw_bytes = static_cast<int64_t>(message.bytes);
  LastChunk& last = last_chunks_[{message.kind, message.sequence, message.layer}];
  if (last.step_begin == message.step_begin) {
    statements_->update_chunk.run(message.step_end, chunk.encoding, raw_bytes, chunk.checksum, chunk.data,
                                  last.id);
  } else {
    last = {message.step_begin, next_chunk_id_++};
    statements_->insert_chunk.run(last.id, message.kind, message.sequence, message.layer, message.step_begin,
                                  message.step_end, chunk.encoding, raw_bytes, chunk.checksum, chunk.data);
  }
  std::lock_guard lock(mutex_);
  stats_.raw_bytes += raw_bytes;
  stats_.stored_bytes += static_cast<int64_t>(chunk.data.size());
}

void WriteQueue::handle(StepsMessage& message) {
  begin_if_needed();
  for (const TraceStep& step : message.steps) {
    const StepSummary& s = step.summary;
    const auto& phase = s.phase_ns;
    statements_->insert_step.run(
        s.sequence, raw(s.pos), s.token, s.next_token, static_cast<double>(s.logprob),
        static_cast<double>(s.margin), step.held_tokens, step.evicted_tokens, s.start_ns, s.total_ns,
        phase[0], phase[1], phase[2], phase[3], phase[4], phase[5], phase[6], step.queue_wait_ns);
  }
}

void WriteQueue::handle(SequenceMessage& message) {
  begin_if_needed();
  const TraceSequence& facts = message.facts;
  Statement& put = statements_->put_sequence;
  auto text = [&](int index, const std::string& value) {
    if (value.empty())
      put.bind_null(index);
    else
      put.bind(index, std::string_view(value));
  };
  auto position = [&](int index, int value) {
    if (value < 0)
      put.bind_null(index);
    else
      put.bind(index, value);
  };
  put.bind(1, facts.sequence)
      .bind(2, static_cast<int64_t>(facts.seed))
      .bind(3, facts.n_prompt)
      .bind(4, facts.n_steps);
  position(5, facts.budget_slots > 0 ? facts.budget_slots : -1);
  position(6, facts.think_begin);
  position(7, facts.think_end);
  text(8, facts.task);
  text(9, facts.prompt);
  text(10, facts.text);
  text(11, facts.answer);
  position(12, facts.answer_right ? *facts.answer_right : -1);
  text(13, facts.end_reason);
  put.step();
  put.reset();
}

void WriteQueue::handle(TokenTextMessage& message) {
  begin_if_needed();
  for (const auto& [token, text] : message.texts) statements_->insert_text.run(token, std::string_view(text));
}

void WriteQueue::handle(GpuMessage& message) {
  begin_if_needed();
  if (!gpu_rows_) gpu_rows_ = std::make_unique<GpuRows>(database_);
  gpu_rows_->write(message.batch);
}

void WriteQueue::handle(CommitMessage&) {
  if (!transaction_) return;
  const int64_t steps = database_.query_integer("SELECT coalesce(sum(n_steps), 0) FROM KV_SEQUENCE");
  transaction_->commit();
  transaction_.reset();
  std::lock_guard lock(mutex_);
  stats_.committed_steps = steps;
}

}  // namespace kvlapse
