// The threads behind the queue: what they write does not depend on how many they are, what one of them cannot
// do is said, what waits is bounded, and the WAL is emptied without the writer.
#include "trace/write_queue.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <limits>
#include <thread>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"
#include "trace/verify.h"

namespace kvlapse {
namespace {

using test::SyntheticProcess;
using test::TemporaryFolder;
using testing::HasSubstr;
namespace fs = std::filesystem;

// Every row of a table in order, blobs included.
std::vector<std::string> rows_of(const fs::path& file, std::string_view query) {
  Database database = Database::open_for_reading(file);
  Statement select(database, query);
  std::vector<std::string> rows;
  while (select.step()) {
    std::string row;
    for (int column = 0; column < select.columns(); ++column) {
      if (select.type(column) == Statement::Type::blob) {
        const std::span<const std::byte> blob = select.blob(column);
        row.append(reinterpret_cast<const char*>(blob.data()), blob.size());
      } else {
        row += select.text(column);
      }
      row += '|';
    }
    rows.push_back(std::move(row));
  }
  return rows;
}

TEST(WriteQueue, TheFileIsTheSameFromAnyNumberOfPackers) {
  TemporaryFolder folder;
  for (const TraceTier tier : {TraceTier::qkv, TraceTier::sketch}) {
    SyntheticProcess process;
    process.geometry.head_dim = 64;
    process.n_sequences = 3;
    process.budget = 60;
    process.tier = tier;
    std::vector<std::string> chunks, others;
    std::string hash;
    uintmax_t bytes = 0;
    struct Case {
      int packers;
      size_t queue_bytes;
    };
    for (const Case& c : {Case{1, size_t{64} << 20}, Case{2, size_t{64} << 20}, Case{8, size_t{64} << 20},
                          Case{8, 1}, Case{3, 100'000}}) {
      const fs::path file = folder / fmt::format("{}-{}-{}.kvl", tier_name(tier), c.packers, c.queue_bytes);
      write_synthetic_trace(file, process,
                            {.packers = c.packers,
                             .queue_bytes = c.queue_bytes,
                             .commit_interval = std::chrono::hours(1)});  // commits by position alone
      EXPECT_EQ(TraceReader(file).meta().at("packers"), std::to_string(c.packers));
      const std::vector<std::string> found = rows_of(file, "SELECT * FROM KV_CHUNK ORDER BY id");
      std::vector<std::string> found_others = rows_of(file, "SELECT * FROM KV_SEQUENCE ORDER BY sequence");
      for (std::string& row : rows_of(file,
                                      "SELECT sequence, step, token, next_token, held_tokens, "
                                      "evicted_tokens, start_ns FROM KV_STEP"))
        found_others.push_back(std::move(row));
      if (chunks.empty()) {
        chunks = found;
        others = found_others;
        hash = TraceReader(file).content_hash();
        bytes = fs::file_size(file);
        ASSERT_GT(chunks.size(), 100u);
      }
      EXPECT_TRUE(found == chunks) << c.packers << " packers";
      EXPECT_TRUE(found_others == others) << c.packers << " packers";
      EXPECT_EQ(TraceReader(file).content_hash(), hash);
      EXPECT_EQ(fs::file_size(file), bytes);
      EXPECT_TRUE(verify_trace(file).ok());
    }
  }
}

// A queue over a new trace without rows.
class Queue {
 public:
  explicit Queue(const TraceWriterOptions& options) : file_(folder_ / "a.kvl") {
    create_file(file_, trace_file_kind(), false,
                [](Database& database) { store_header(database, SyntheticProcess().header()); });
    queue_ = std::make_unique<WriteQueue>(open_file_for_appending(file_, trace_file_kind()), options);
  }
  WriteQueue& operator*() { return *queue_; }
  WriteQueue* operator->() { return queue_.get(); }
  void close() { queue_.reset(); }
  const fs::path& file() const { return file_; }

 private:
  TemporaryFolder folder_;
  fs::path file_;
  std::unique_ptr<WriteQueue> queue_;
};

// Bytes that do not compress; `alive` counts the buffers.
ChunkMessage chunk_of(int step_begin, size_t bytes, std::atomic<int>* alive = nullptr) {
  std::shared_ptr<std::byte[]> data(new std::byte[bytes], [alive](std::byte* p) {
    delete[] p;
    if (alive) --*alive;
  });
  if (alive) ++*alive;
  uint32_t state = static_cast<uint32_t>(step_begin) + 1;
  for (size_t i = 0; i < bytes; ++i)
    data[i] = static_cast<std::byte>((state = state * 1664525u + 1013904223u) >> 24);
  return {"k", 0, 0, step_begin, step_begin + kChunkSteps, 1, std::move(data), bytes};
}

TEST(WriteQueue, WhatAPackerCannotDoIsSaidAndWhatWasCommittedStays) {
  for (const int packers : {1, 2, 8}) {
    Queue queue({.packers = packers, .queue_bytes = std::numeric_limits<size_t>::max()});
    for (int i = 0; i < 20; ++i) queue->push(chunk_of(i * kChunkSteps, 5000));
    TraceSequence facts;
    facts.n_steps = 20 * kChunkSteps;
    queue->push(SequenceMessage{facts});
    queue->push(CommitMessage{});
    // No vector can hold its shuffle, so nothing of it is read.
    ChunkMessage impossible = chunk_of(20 * kChunkSteps, 10);
    impossible.bytes = size_t{1} << 63;
    impossible.element_bytes = 2;
    queue->push(std::move(impossible));
    std::string error;
    try {
      for (int i = 21; i < 100'000; ++i) {
        queue->push(chunk_of(i * kChunkSteps, 100));
        queue->push(CommitMessage{});
      }
      queue->stop();
    } catch (const Error& thrown) {
      error = thrown.what();
    }
    EXPECT_THAT(error, HasSubstr("the trace is valid and holds 1280 steps"));
    EXPECT_THROW(queue->push(CommitMessage{}), Error);
    EXPECT_THROW(queue->stop(), Error);
    queue.close();
    EXPECT_EQ(rows_of(queue.file(), "SELECT id FROM KV_CHUNK").size(), 20u) << packers << " packers";
  }
}

TEST(WriteQueue, WhatWaitsIsBounded) {
  constexpr size_t kBytes = 50'000, kFit = 4;
  for (const int packers : {1, 2, 8}) {
    Queue queue({.packers = packers, .queue_bytes = kFit * kBytes});
    std::atomic<int> alive{0};
    int most = 0;
    for (int i = 0; i < 300; ++i) {
      queue->push(chunk_of(i * kChunkSteps, kBytes, &alive));
      most = std::max(most, alive.load());
    }
    queue->push(CommitMessage{});
    queue->stop();
    EXPECT_LE(most, static_cast<int>(kFit));
    EXPECT_EQ(alive, 0);
    EXPECT_GT(queue->stats().queue_waits, 0);
    EXPECT_EQ(queue->stats().raw_bytes, static_cast<int64_t>(300 * kBytes));
    queue.close();
    const std::vector<std::string> rows =
        rows_of(queue.file(), "SELECT id, step_begin FROM KV_CHUNK ORDER BY id");
    ASSERT_EQ(rows.size(), 300u);
    for (int i = 0; i < 300; ++i) ASSERT_EQ(rows[i], fmt::format("{}|{}|", i + 1, i * kChunkSteps));
  }
}

TEST(WriteQueue, TheWalReachesTheFileWithoutTheWriter) {
  Queue queue({.packers = 1});
  constexpr size_t kBytes = size_t{1} << 20;
  constexpr int kChunks = 40;
  for (int i = 0; i < kChunks; ++i) {
    queue->push(chunk_of(i * kChunkSteps, kBytes));
    queue->push(CommitMessage{});
  }
  // Nobody pushes any more; what was committed moves all the same, a short rest aside.
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(60);
  while (fs::file_size(queue.file()) < kChunks / 2 * kBytes) {
    ASSERT_LT(std::chrono::steady_clock::now(), deadline) << fs::file_size(queue.file());
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  fold_wal(queue->stop());
  queue.close();
  EXPECT_FALSE(fs::exists(queue.file().string() + "-wal"));
  EXPECT_EQ(rows_of(queue.file(), "SELECT id FROM KV_CHUNK").size(), static_cast<size_t>(kChunks));
}

}  // namespace
}  // namespace kvlapse
