// What is written is what is read, on every tier, dtype and eviction shape; and the file is one whole SQLite
// file.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"

namespace kvlapse {
namespace {

using test::SyntheticProcess;
using test::TemporaryFolder;
using testing::HasSubstr;
namespace fs = std::filesystem;

std::string error_of(const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(TraceRoundTrip, RowsComeBackBitForBitInEveryDtype) {
  TemporaryFolder folder;
  for (DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    SyntheticProcess process;
    process.geometry.dtype = dtype;
    process.geometry.head_dim = 10;  // not a multiple of any vector
    const fs::path file = folder / fmt::format("{}.kvl", dtype_name(dtype));
    write_synthetic_trace(file, process);
    TraceReader reader(file);
    ASSERT_EQ(reader.n_steps(0), process.n_steps);
    for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
      const int heads = kind == RowKind::q ? 4 : 2, width = heads * 10;
      std::vector<float> rows(static_cast<size_t>(process.n_steps) * width);
      reader.read_rows(0, 1, kind, 0, process.n_steps, rows.data());
      for (int pos = 0; pos < process.n_steps; ++pos) {
        const std::vector<float> expected = synthetic_row(process, 0, 1, kind, pos);
        ASSERT_TRUE(std::equal(expected.begin(), expected.end(), rows.begin() + pos * width)) << pos;
      }
      // Across a chunk's edge, raw.
      std::vector<std::byte> raw_rows(5 * width * dtype_bytes(dtype));
      reader.read_rows_raw(0, 1, kind, 62, 5, raw_rows.data());
      std::vector<float> again(5 * width);
      reader.read_rows(0, 1, kind, 62, 5, again.data());
      if (dtype == DType::f32) {
        EXPECT_EQ(std::memcmp(raw_rows.data(), again.data(), raw_rows.size()), 0);
      }
    }
  }
}

TEST(TraceRoundTrip, HeaderSequencesAndSteps) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.n_sequences = 3;
  process.budget = 64;
  TraceHeader header = process.header();
  header.meta["weights_hash"] = "abc";
  header.policy.parameters = {{"lambda", 0.1}, {"mix", 0.5}};
  {
    TraceWriter writer(folder / "a.kvl", header);
    test::SyntheticRun run(writer, process);
    while (run.step()) {
    }
    run.end("eos");
    writer.finish(false);
  }
  TraceReader reader(folder / "a.kvl");
  EXPECT_TRUE(reader.complete());
  EXPECT_FALSE(reader.interrupted());
  EXPECT_EQ(reader.format_version(), 3);
  EXPECT_EQ(reader.header().geometry.n_q_heads, 4);
  EXPECT_EQ(reader.header().geometry.dtype, DType::f32);
  EXPECT_EQ(reader.header().policy.parameters, header.policy.parameters);
  EXPECT_EQ(reader.header().policy.score_parts, header.policy.score_parts);
  EXPECT_EQ(reader.header().policy.rule.recent, header.policy.rule.recent);
  EXPECT_EQ(reader.header().policy.layer_budgets, header.policy.layer_budgets);
  EXPECT_EQ(reader.meta().at("weights_hash"), "abc");
  EXPECT_EQ(reader.meta().at("dropped_records"), "0");
  ASSERT_EQ(reader.n_sequences(), 3);
  const TraceSequence sequence = reader.sequence(2);
  EXPECT_EQ(sequence.seed, process.seed + 2);
  EXPECT_EQ(sequence.budget_slots, 64);
  EXPECT_EQ(sequence.end_reason, "eos");
  EXPECT_EQ(sequence.answer_right, true);
  EXPECT_EQ(reader.sequence(1).answer_right, false);
  ASSERT_EQ(sequence.tokens.size(), process.n_steps + 1u);
  for (int pos = 0; pos <= process.n_steps; ++pos)
    ASSERT_EQ(sequence.tokens[pos], synthetic_token(process, 2, pos));
  const std::vector<TraceStep> steps = reader.steps(2, 0, 1 << 20);
  ASSERT_EQ(steps.size(), static_cast<size_t>(process.n_steps - process.n_prompt + 1));
  EXPECT_EQ(raw(steps.front().summary.pos), process.n_prompt - 1);
  EXPECT_EQ(steps.back().summary.phase_ns[6], 7000);
  EXPECT_EQ(steps.back().held_tokens, 63 * 2 * 2);  // budget less the free slot, heads, layers
  EXPECT_EQ(steps.back().evicted_tokens, 4);
  EXPECT_THAT(error_of([&] { (void)reader.sequence(3); }), HasSubstr("sequence: expected 0 to 2, found 3"));
}

TEST(TraceRoundTrip, EvictionsAndOccupancyAgree) {
  TemporaryFolder folder;
  for (bool shared : {false, true}) {
    for (int cadence : {1, 32}) {
      SyntheticProcess process;
      process.tier = TraceTier::events;
      process.n_prompt = 90;
      process.budget = 50;
      process.cadence = cadence;
      process.shared = shared;
      const fs::path file = folder / fmt::format("{}-{}.kvl", shared, cadence);
      write_synthetic_trace(file, process);
      TraceReader reader(file);
      const std::vector<TraceEviction> evictions = reader.evictions(0, 1, 0, process.n_steps);
      EXPECT_EQ(evictions.front().reason, EvictionReason::prompt_over_budget);
      EXPECT_EQ(evictions.front().step, 89);
      EXPECT_EQ(evictions.back().kv_head, shared ? kWholeLayer : 1);
      EXPECT_EQ(evictions.back().parts[1], evictions.back().step - evictions.back().pos);
      std::vector<int32_t> held(process.n_steps * 2);
      ASSERT_EQ(reader.read_occupancy(0, 1, 0, process.n_steps, held.data()), process.n_steps);
      std::vector<int> expected(process.n_steps);
      for (int pos = 0; pos < process.n_steps; ++pos) expected[pos] = pos + 1;
      for (const TraceEviction& eviction : evictions)
        if (eviction.kv_head != 0)  // head 1 or the layer
          for (int pos = eviction.step; pos < process.n_steps; ++pos) --expected[pos];
      for (int pos = 0; pos < process.n_steps; ++pos) ASSERT_EQ(held[pos * 2 + 1], expected[pos]) << pos;
      EXPECT_LE(held.back(), 50 + cadence - 1);
      // Ranges.
      for (const TraceEviction& eviction : reader.evictions(0, 1, 130, 200)) {
        EXPECT_GE(eviction.step, 130);
        EXPECT_LT(eviction.step, 200);
      }
    }
  }
}

TEST(TraceRoundTrip, SketchesBeginBehindThePrompt) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.tier = TraceTier::sketch;
  process.n_prompt = 70;
  process.layer_begin = 1;
  process.budget = 100;
  write_synthetic_trace(folder / "a.kvl", process);
  TraceReader reader(folder / "a.kvl");
  int first = -1;
  std::vector<SketchRow> rows = reader.sketches(0, 1, 0, process.n_steps, &first);
  EXPECT_EQ(first, 70);
  ASSERT_EQ(rows.size(), (process.n_steps - 70) * 2u);
  EXPECT_EQ(rows[0].pos[0], 70);
  EXPECT_EQ(rows[0].weight[1], 0.25f);
  EXPECT_EQ(rows[0].recall, 1.0f);
  EXPECT_TRUE(std::isnan(rows.back().recall));
  EXPECT_TRUE(reader.sketches(0, 0, 0, process.n_steps, &first).empty());  // layer 0 is outside the range
  rows = reader.sketches(0, 1, 127, 129, &first);
  EXPECT_EQ(first, 127);
  EXPECT_EQ(rows.size(), 4u);
  EXPECT_THAT(
      error_of([&] {
        float out[16];
        reader.read_rows(0, 1, RowKind::k, 0, 1, out);
      }),
      HasSubstr("k of layer 1: expected tier qkv with that layer, found tier sketch with layers 1:2"));
}

TEST(TraceRoundTrip, OneFileStaysAndAnExistingOneIsRefused) {
  TemporaryFolder folder;
  SyntheticProcess process;
  write_synthetic_trace(folder / "a.kvl", process);
  int files = 0;
  for (const auto& entry : fs::directory_iterator(folder.path())) files += entry.exists();
  EXPECT_EQ(files, 1);
  EXPECT_THAT(error_of([&] { write_synthetic_trace(folder / "a.kvl", process); }),
              HasSubstr("a.kvl: exists"));
  process.n_steps = 100;
  write_synthetic_trace(folder / "a.kvl", process, {.force = true});
  EXPECT_EQ(TraceReader(folder / "a.kvl").n_steps(0), 100);
  EXPECT_THAT(error_of([&] { write_synthetic_trace(folder / "none" / "a.kvl", process); }),
              HasSubstr("no folder"));
}

TEST(TraceRoundTrip, ContentHashNamesTheContent) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.budget = 60;
  write_synthetic_trace(folder / "a.kvl", process);
  // Commits after every step write each chunk many times; what remains is the same.
  write_synthetic_trace(folder / "b.kvl", process,
                        {.zstd_level = 3, .commit_interval = std::chrono::milliseconds(0)});
  process.seed = 2;
  write_synthetic_trace(folder / "c.kvl", process);
  const std::string a = TraceReader(folder / "a.kvl").content_hash();
  EXPECT_EQ(a.size(), 32u);
  EXPECT_EQ(a, TraceReader(folder / "b.kvl").content_hash());
  EXPECT_NE(a, TraceReader(folder / "c.kvl").content_hash());
}

TEST(TraceRoundTrip, AReaderFollowsAndMayOutliveTheWriter) {
  TemporaryFolder folder;
  const fs::path file = folder / "a.kvl";
  SyntheticProcess process;
  process.n_steps = 400;
  process.budget = 60;
  std::unique_ptr<TraceReader> reader;
  {
    TraceWriter writer(file, process.header(), {.commit_interval = std::chrono::milliseconds(0)});
    test::SyntheticRun run(writer, process);
    reader = std::make_unique<TraceReader>(file);
    std::vector<float> row(2 * 8);
    while (run.step()) {
      // Every step commits, so the writer thread catches up with each.
      if (run.position() < process.n_prompt || run.position() % 20 != 0) continue;
      const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
      while (reader->n_sequences() == 0 || reader->n_steps(0) < run.position()) {
        ASSERT_LT(std::chrono::steady_clock::now(), deadline);
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        reader->refresh();
      }
      const int newest = reader->n_steps(0) - 1;
      reader->read_rows(0, 1, RowKind::v, newest, 1, row.data());
      ASSERT_EQ(row, synthetic_row(process, 0, 1, RowKind::v, newest));
      ASSERT_EQ(reader->sequence(0).tokens[newest], synthetic_token(process, 0, newest));
      EXPECT_EQ(reader->evictions(0, 1, newest, newest + 1).size(), newest >= 59 ? 2u : 0u);
    }
    EXPECT_FALSE(reader->complete());
    run.end("eos");
    writer.finish(false);
  }
  EXPECT_TRUE(reader->refresh());
  EXPECT_TRUE(reader->complete());
  EXPECT_EQ(reader->n_steps(0), 400);
  reader.reset();  // the last to close removes the side files
  EXPECT_FALSE(fs::exists(file.string() + "-wal"));
  EXPECT_EQ(TraceReader(file).n_steps(0), 400);
}

TEST(TraceRoundTrip, ManyThreadsReadThroughASmallCache) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.n_steps = 500;
  process.budget = 60;
  write_synthetic_trace(folder / "a.kvl", process);
  const TraceReader reader(folder / "a.kvl", {.cache_bytes = 20'000});
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&, t] {
      std::vector<float> row(2 * 8);
      for (int i = 0; i < 400; ++i) {
        const int pos = (i * 37 + t * 101) % 500;
        reader.read_rows(0, t % 2, RowKind::k, pos, 1, row.data());
        wrong += row != synthetic_row(process, 0, t % 2, RowKind::k, pos);
        wrong += reader.evictions(0, t % 2, 100, 110).size() != 20;
      }
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(TraceRoundTrip, AFullQueueMakesDecodeWaitAndSaysSo) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.geometry.head_dim = 128;
  TraceWriter writer(folder / "a.kvl", process.header(), {.queue_bytes = 1});
  test::SyntheticRun run(writer, process);
  while (run.step()) {
  }
  run.end("eos");
  writer.finish(false);
  TraceReader reader(folder / "a.kvl");
  EXPECT_GT(std::stoll(reader.meta().at("queue_waits")), 0);
  EXPECT_GT(std::stoll(reader.meta().at("queue_wait_ns")), 0);
  int64_t in_steps = 0;
  for (const TraceStep& step : reader.steps(0, 0, 1 << 20)) in_steps += step.queue_wait_ns;
  EXPECT_GT(in_steps, 0);
}

TEST(TraceRoundTrip, TheWriterRefusesWhatDoesNotFit) {
  TemporaryFolder folder;
  SyntheticProcess process;
  TraceWriter writer(folder / "a.kvl", process.header());
  const std::vector<int32_t> prompt = {1, 2, 3};
  writer.begin_sequence(0, 1, 0, prompt);
  const std::vector<int32_t> held = {1, 1};
  LayerRecord record;
  record.held = held;
  EXPECT_THAT(error_of([&] { writer.append(0, 0, Pos{1}, record); }),
              HasSubstr("expected position 0, found 1"));
  EXPECT_THAT(error_of([&] { writer.append(0, 5, Pos{0}, record); }),
              HasSubstr("layer: expected 0 to 1, found 5"));
  EXPECT_THAT(error_of([&] { writer.append(1, 0, Pos{0}, record); }),
              HasSubstr("sequence: expected 0 to 0, found 1"));
  EXPECT_THAT(error_of([&] { writer.append(0, 0, Pos{0}, record); }), HasSubstr("expected rows, found none"));
  EXPECT_THAT(error_of([&] { writer.begin_sequence(0, 1, 0, prompt); }), HasSubstr("began twice"));
  TraceHeader header = process.header();
  header.meta["complete"] = "1";
  EXPECT_THAT(error_of([&] { TraceWriter bad(folder / "b.kvl", header); }),
              HasSubstr("the key 'complete' belongs"));
  EXPECT_FALSE(fs::exists(folder / "b.kvl"));
}

}  // namespace
}  // namespace kvlapse
