#include "trace/write_queue.h"

#include <algorithm>
#include <chrono>

#include "core/base/error.h"
#include "trace/thread_cpu.h"

namespace kvlapse {
namespace {

size_t bytes_of(const WriteMessage& message) {
  if (const auto* gpu = std::get_if<GpuMessage>(&message))
    return gpu->batch.kernels.size() * sizeof(GpuKernel) + gpu->batch.dram.size() * sizeof(DramSample);
  const auto* chunk = std::get_if<ChunkMessage>(&message);
  return chunk ? chunk->bytes : 0;
}

// A decode on the CPU has as many threads as the machine and loses by each that runs beside it: the rest of a
// small machine is one.
int packers_of(int asked) {
  constexpr int kMostPackers = 8;
  if (asked > 0) return asked;
  return std::clamp(static_cast<int>(std::thread::hardware_concurrency()) / 2, 1, kMostPackers);
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
      queue_bytes_(options.queue_bytes),
      zstd_level_(options.zstd_level) {
  stats_.packers = packers_of(options.packers);
  try {
    checkpointer_ = std::make_unique<Checkpointer>(database_);
    for (int i = 1; i < stats_.packers; ++i) packers_.emplace_back([this] { pack(); });
    writer_ = std::thread([this] { write(); });
  } catch (...) {
    join();
    throw;
  }
}

WriteQueue::~WriteQueue() {
  join();
}

void WriteQueue::join() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  front_ready_.notify_all();
  to_pack_.notify_all();
  if (writer_.joinable()) writer_.join();
  for (std::thread& packer : packers_)
    if (packer.joinable()) packer.join();
  if (checkpointer_) stats_.writer_cpu_ns += checkpointer_->stop();
  checkpointer_.reset();
}

int64_t WriteQueue::push(WriteMessage message) {
  Slot slot;
  slot.bytes = bytes_of(message);
  if (std::holds_alternative<ChunkMessage>(message)) slot.state = Slot::State::waiting;
  slot.message = std::move(message);
  const bool waits = slot.state == Slot::State::waiting;
  int64_t waited_ns = 0;
  bool first = false;
  {
    Lock lock(mutex_);
    throw_if_failed();
    // A message larger than the queue passes when the queue is empty.
    auto fits = [&] {
      return queued_bytes_ == 0 || queued_bytes_ + slot.bytes <= queue_bytes_ || !failure_.empty();
    };
    if (!fits()) {
      const auto start = std::chrono::steady_clock::now();
      not_full_.wait(lock, fits);
      waited_ns = std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
      stats_.queue_wait_ns += waited_ns;
      ++stats_.queue_waits;
      throw_if_failed();
    }
    queued_bytes_ += slot.bytes;
    slots_.push_back(std::move(slot));
    first = waits ? n_waiting_++ == 0 : slots_.size() == 1;
  }
  // One thread is woken; it wakes the next when it leaves something to pack.
  if (first) (waits && !packers_.empty() ? to_pack_ : front_ready_).notify_one();
  return waited_ns;
}

Database& WriteQueue::stop() {
  join();
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

WriteQueue::Slot* WriteQueue::take() {
  if (n_waiting_ == 0) return nullptr;
  while (slots_[n_passed_].state != Slot::State::waiting) ++n_passed_;
  Slot& slot = slots_[n_passed_++];
  slot.state = Slot::State::packing;
  if (--n_waiting_ > 0 && !packers_.empty()) to_pack_.notify_one();
  return &slot;
}

void WriteQueue::pack(Slot& slot, ChunkEncoder& encoder, Lock& lock) {
  lock.unlock();
  auto& message = std::get<ChunkMessage>(slot.message);
  try {
    slot.chunk = encoder.encode({message.data.get(), message.bytes}, message.element_bytes);
  } catch (const std::exception& error) {
    slot.failure = error.what();
  }
  // The raw rows go back to their pool before the producer is woken to take them.
  if (slot.chunk.buffer) message.data.reset();
  lock.lock();
  if (slot.failure.empty()) {
    queued_bytes_ -= slot.bytes - slot.chunk.data.size();
    slot.bytes = slot.chunk.data.size();
    wake_producer();
  }
  slot.state = Slot::State::ready;
  if (&slot == &slots_.front()) front_ready_.notify_one();
}

void WriteQueue::pack() {
  ChunkEncoder encoder(zstd_level_);
  int64_t cpu_ns = 0;
  Lock lock(mutex_);
  while (failure_.empty()) {
    if (Slot* slot = take()) {
      pack(*slot, encoder, lock);
      count_cpu(cpu_ns);
    } else if (stopping_) {
      break;
    } else {
      to_pack_.wait(lock);
    }
  }
}

void WriteQueue::write() {
  {
    ChunkEncoder encoder(zstd_level_);
    int64_t cpu_ns = 0;
    Lock lock(mutex_);
    while (failure_.empty()) {
      if (!slots_.empty() && slots_.front().state == Slot::State::ready)
        handle_front(lock);
      else if (Slot* slot = take())
        pack(*slot, encoder, lock);
      else if (slots_.empty() && stopping_)
        break;
      else
        front_ready_.wait(lock);
      count_cpu(cpu_ns);
    }
  }
  to_pack_.notify_all();
  not_full_.notify_all();
  try {
    gpu_rows_.reset();
    statements_.reset();
    transaction_.reset();  // what was not committed is not whole
  } catch (const std::exception&) {
    // The connection is broken already and failure_ says so.
  }
}

void WriteQueue::handle_front(Lock& lock) {
  Slot& slot = slots_.front();
  lock.unlock();
  std::string failure = slot.failure;
  if (failure.empty()) {
    try {
      std::visit(
          [&](auto& message) {
            if constexpr (std::is_same_v<decltype(message), ChunkMessage&>)
              handle(message, slot.chunk);
            else
              handle(message);
          },
          slot.message);
    } catch (const std::exception& error) {
      failure = error.what();
    }
  }
  const size_t bytes = slot.bytes;
  slot.message = CommitMessage{};  // a chunk that stayed raw: its rows go back to their pool
  slot.chunk = {};
  lock.lock();
  slots_.pop_front();
  if (n_passed_ > 0) --n_passed_;
  queued_bytes_ -= bytes;
  if (!failure.empty())
    failure_ = fmt::format("{}; the trace is valid and holds {} steps", failure, stats_.committed_steps);
  wake_producer();
}

// Not for each chunk that leaves: a producer that waits is woken to a queue with room for many. Under the
// lock.
void WriteQueue::wake_producer() {
  if (queued_bytes_ <= queue_bytes_ / 4 * 3) not_full_.notify_one();
}

// Adds what the calling thread used since the last call. Under the lock.
void WriteQueue::count_cpu(int64_t& before_ns) {
  const int64_t now_ns = thread_cpu_ns();
  stats_.writer_cpu_ns += now_ns - std::exchange(before_ns, now_ns);
}

void WriteQueue::begin_if_needed() {
  if (!transaction_) transaction_ = std::make_unique<Transaction>(database_);
}

void WriteQueue::handle(ChunkMessage& message, const EncodedChunk& chunk) {
  begin_if_needed();
  const auto raw_bytes = static_cast<int64_t>(message.bytes);
  LastChunk& last = last_chunks_[{message.kind, message.sequence, message.layer}];
  if (last.step_begin == message.step_begin) {
    statements_->update_chunk.run(message.step_end, std::string_view(chunk.encoding), raw_bytes,
                                  chunk.checksum, chunk.data, last.id);
  } else {
    last = {message.step_begin, next_chunk_id_++};
    statements_->insert_chunk.run(last.id, message.kind, message.sequence, message.layer, message.step_begin,
                                  message.step_end, std::string_view(chunk.encoding), raw_bytes,
                                  chunk.checksum, chunk.data);
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
