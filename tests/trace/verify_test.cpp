// verify accepts what the writer writes and names each kind of lie.
#include "trace/verify.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/chunk_codec.h"
#include "trace/sqlite.h"
#include "trace/trace_reader.h"

namespace kvlapse {
namespace {

using test::SyntheticProcess;
using testing::HasSubstr;
namespace fs = std::filesystem;

TEST(Verify, AcceptsEveryShape) {
  test::TemporaryFolder folder;
  for (TraceTier tier : {TraceTier::events, TraceTier::sketch, TraceTier::qkv})
    for (int budget : {0, 48})
      for (int cadence : {1, 32})
        for (bool shared : {false, true})
          for (int n_prompt : {1, 64, 90}) {
            if (budget == 0 && (cadence > 1 || shared)) continue;
            SyntheticProcess process;
            process.tier = tier;
            process.budget = budget;
            process.cadence = cadence;
            process.shared = shared;
            process.n_prompt = n_prompt;
            process.n_steps = 192;
            process.layer_begin = 1;
            const fs::path file = folder / "a.kvl";
            write_synthetic_trace(file, process, {.force = true});
            const VerifyReport report = verify_trace(file);
            ASSERT_TRUE(report.ok()) << report.violations.front();
            EXPECT_TRUE(report.complete);
            EXPECT_EQ(report.steps, 192);
            EXPECT_EQ(report.evictions > 0, budget > 0);
          }
}

TEST(Verify, AcceptsAnInterruptedTrace) {
  test::TemporaryFolder folder;
  SyntheticProcess process;
  process.budget = 60;
  {
    TraceWriter writer(folder / "a.kvl", process.header());
    test::SyntheticRun run(writer, process);
    while (run.position() < 150) run.step();
    run.end("interrupted");
    writer.finish(/*interrupted=*/true);
  }
  const VerifyReport report = verify_trace(folder / "a.kvl");
  ASSERT_TRUE(report.ok()) << report.violations.front();
  EXPECT_FALSE(report.complete);
  TraceReader reader(folder / "a.kvl");
  EXPECT_TRUE(reader.interrupted());
  EXPECT_EQ(reader.n_steps(0), 150);
}

class VerifyLies : public testing::Test {
 protected:
  void SetUp() override {
    process_.n_steps = 200;
    process_.budget = 60;
    file_ = folder_ / "a.kvl";
    write_synthetic_trace(file_, process_);
  }
  void change(const std::string& sql) { Database::open_for_writing(file_).execute(sql); }
  // Decodes a chunk, lets `edit` change it, and stores it with a right checksum.
  template <typename Record>
  void edit_chunk(std::string_view kind, int step_begin,
                  const std::function<void(std::vector<Record>&)>& edit) {
    Database database = Database::open_for_writing(file_);
    Statement select = database.prepare(
        "SELECT id, encoding, raw_bytes, checksum, data FROM KV_CHUNK WHERE kind = ? AND layer = 1 AND "
        "step_begin = ?");
    select.bind(1, kind).bind(2, step_begin);
    ASSERT_TRUE(select.step());
    const std::vector<std::byte> raw =
        decode_chunk(select.text(1), select.integer(2), select.integer(3), select.blob(4));
    const int64_t id = select.integer(0);
    select.reset();
    std::vector<Record> records(raw.size() / sizeof(Record));
    std::memcpy(static_cast<void*>(records.data()), raw.data(), raw.size());
    edit(records);
    ChunkEncoder encoder(1);
    const EncodedChunk chunk = encoder.encode(std::as_bytes(std::span(records)), sizeof(Record));
    database.prepare("UPDATE KV_CHUNK SET encoding = ?, raw_bytes = ?, checksum = ?, data = ? WHERE id = ?")
        .run(std::string_view(chunk.encoding), static_cast<int64_t>(records.size() * sizeof(Record)),
             chunk.checksum, chunk.data, id);
    // A forger would also mend the content hash.
    database.execute(
        "DELETE FROM KV_META WHERE key = 'content_hash'; UPDATE KV_META SET value = '0' WHERE key = "
        "'complete'");
  }
  std::string first() {
    const VerifyReport report = verify_trace(file_);
    return report.ok() ? "" : report.violations.front();
  }

  test::TemporaryFolder folder_;
  SyntheticProcess process_;
  fs::path file_;
};

TEST_F(VerifyLies, ChangedBlob) {
  change(
      "UPDATE KV_CHUNK SET data = substr(data, 1, 30) || x'00' || substr(data, 32) WHERE kind = 'v' AND "
      "layer = 1 AND step_begin = 64");
  EXPECT_THAT(first(), HasSubstr("(v of sequence 0, layer 1, steps 64 to 128): "));
}
TEST_F(VerifyLies, ChangedChecksum) {
  change("UPDATE KV_CHUNK SET checksum = checksum + 1 WHERE kind = 'tokens' AND step_begin = 128");
  EXPECT_THAT(first(), HasSubstr("(tokens of sequence 0, layer -1, steps 128 to 192): checksum: expected"));
}
TEST_F(VerifyLies, MissingChunk) {
  change("DELETE FROM KV_CHUNK WHERE kind = 'k' AND layer = 0 AND step_begin = 64");
  EXPECT_THAT(first(), HasSubstr("content_hash"));
  change(
      "DELETE FROM KV_META WHERE key IN ('content_hash'); UPDATE KV_META SET value = '0' WHERE key = "
      "'complete'");
  EXPECT_THAT(first(),
              HasSubstr("k of sequence 0, layer 0: expected a chunk from step 64, found one from 128"));
}
TEST_F(VerifyLies, MissingStep) {
  change("DELETE FROM KV_STEP WHERE step = 100");
  EXPECT_THAT(first(), HasSubstr("KV_STEP of sequence 0: expected step 100, found 101"));
}
TEST_F(VerifyLies, OtherToken) {
  change("UPDATE KV_STEP SET token = token + 1 WHERE step = 100");
  EXPECT_THAT(first(), HasSubstr("step 100: token: expected"));
}
TEST_F(VerifyLies, OtherHeldCount) {
  change("UPDATE KV_STEP SET held_tokens = held_tokens + 1 WHERE step = 120");
  EXPECT_THAT(
      first(),
      HasSubstr("step 120: expected 236 held and 4 evicted tokens as the layers have, found 237 and 4"));
}
TEST_F(VerifyLies, NewerVersionAndOtherFiles) {
  change("PRAGMA user_version = 99");
  EXPECT_THAT(first(), HasSubstr("expected format version 1 to 3, found 99: made by a newer kvlapse"));
  change("PRAGMA application_id = 7");
  EXPECT_THAT(first(), HasSubstr("expected a kvlapse trace"));
}
TEST_F(VerifyLies, HeaderOutOfRange) {
  change("UPDATE KV_META SET value = '3' WHERE key = 'n_kv_heads'");
  EXPECT_THAT(first(), HasSubstr("n_q_heads: expected a multiple of n_kv_heads = 3, found 4"));
  change("UPDATE KV_META SET value = 'many' WHERE key = 'n_layers'");
  EXPECT_THAT(first(), HasSubstr("n_layers: expected a number, found 'many'"));
}
TEST_F(VerifyLies, TokenEvictedTwice) {
  edit_chunk<TraceEviction>("evictions", 64, [](auto& records) { records[9].pos = records[1].pos; });
  EXPECT_THAT(first(), HasSubstr("was evicted at step"));
}
TEST_F(VerifyLies, ProtectedTokenEvicted) {
  edit_chunk<TraceEviction>("evictions", 64, [](auto& records) { records[4].pos = records[4].step - 1; });
  EXPECT_THAT(first(), HasSubstr("is protected by the policy, found it evicted"));
}
TEST_F(VerifyLies, FutureTokenEvicted) {
  edit_chunk<TraceEviction>("evictions", 64, [](auto& records) { records[4].pos = records[4].step + 1; });
  EXPECT_THAT(first(), HasSubstr("evicted position: expected 0 to"));
}
TEST_F(VerifyLies, MissingEviction) {
  edit_chunk<TraceEviction>("evictions", 64, [](auto& records) { records.erase(records.begin() + 6); });
  EXPECT_THAT(first(), HasSubstr("occupancy: expected"));
}
TEST_F(VerifyLies, SharedVictimOfAPolicyPerHead) {
  edit_chunk<TraceEviction>("evictions", 64, [](auto& records) { records[4].kv_head = kWholeLayer; });
  EXPECT_THAT(first(), HasSubstr("expected victims per kv head"));
}
TEST_F(VerifyLies, BudgetExceeded) {
  change("UPDATE KV_LAYER SET budget_slots = 50");
  EXPECT_THAT(first(), HasSubstr("expected at most 50 held tokens (budget 50, cadence 1), found 51"));
}
TEST_F(VerifyLies, NotFinite) {
  edit_chunk<float>("k", 64, [](auto& values) { values[20] = NAN; });
  EXPECT_THAT(first(), HasSubstr("layer 1, step 65: k holds a value that is not finite"));
}

TEST(Verify, MissingFileIsAnError) {
  EXPECT_THROW(verify_trace("/none/a.kvl"), Error);
}

}  // namespace
}  // namespace kvlapse
