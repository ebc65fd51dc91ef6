#include "trace/sql.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/trace_reader.h"

namespace kvlapse {
namespace {

using test::SyntheticProcess;
using testing::HasSubstr;

class SqlTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = new test::TemporaryFolder();
    process_ = new SyntheticProcess();
    process_->n_sequences = 2;
    process_->n_prompt = 70;
    process_->budget = 64;
    write_synthetic_trace(*folder_ / "qkv.kvl", *process_);
    process_->tier = TraceTier::sketch;
    write_synthetic_trace(*folder_ / "sketch.kvl", *process_);
  }
  static void TearDownTestSuite() {
    delete folder_;
    delete process_;
  }

  // Rows as text, columns separated by '|'.
  static std::vector<std::string> rows(const std::string& sql, const std::string& file = "qkv.kvl") {
    SqlQuery query(*folder_ / file, sql);
    std::vector<std::string> out;
    std::vector<SqlValue> row;
    while (query.next(row)) {
      std::string line;
      for (const SqlValue& value : row) {
        if (!line.empty()) line += '|';
        if (auto* integer = std::get_if<int64_t>(&value)) line += std::to_string(*integer);
        if (auto* real = std::get_if<double>(&value)) line += fmt::format("{:.4g}", *real);
        if (auto* text = std::get_if<std::string>(&value)) line += *text;
        if (std::holds_alternative<std::monostate>(value)) line += "NULL";
      }
      out.push_back(line);
    }
    return out;
  }
  static std::string error_of(const std::string& sql, const std::string& file = "qkv.kvl") {
    try {
      rows(sql, file);
    } catch (const Error& error) {
      return error.what();
    }
    return "";
  }
  static test::TemporaryFolder* folder_;
  static SyntheticProcess* process_;
};
test::TemporaryFolder* SqlTest::folder_ = nullptr;
SyntheticProcess* SqlTest::process_ = nullptr;

TEST_F(SqlTest, PlainTables) {
  EXPECT_EQ(rows("SELECT value FROM KV_META WHERE key = 'tier'"), std::vector<std::string>{"qkv"});
  EXPECT_EQ(rows("SELECT value FROM KV_POLICY WHERE name = 'cadence'"), std::vector<std::string>{"1"});
  EXPECT_EQ(rows("SELECT layer, budget_slots, rows_recorded FROM KV_LAYER"),
            (std::vector<std::string>{"0|64|1", "1|64|1"}));
  EXPECT_EQ(rows("SELECT count(*), min(step), max(step) FROM KV_STEP WHERE sequence = 1"),
            std::vector<std::string>{"231|69|299"});
}

TEST_F(SqlTest, EvictionsAreWhatTheReaderGives) {
  TraceReader reader(*folder_ / "qkv.kvl");
  const std::vector<TraceEviction> evictions = reader.evictions(1, 1, 0, process_->n_steps);
  const std::vector<std::string> found = rows(
      "SELECT step, kv_head, position, slot, score, part1, reason FROM kv_eviction WHERE sequence = 1 AND "
      "layer = 1");
  ASSERT_EQ(found.size(), evictions.size());
  for (size_t i = 0; i < found.size(); ++i) {
    const TraceEviction& e = evictions[i];
    ASSERT_EQ(found[i],
              fmt::format("{}|{}|{}|{}|{:.4g}|{:.4g}|{}", e.step, e.kv_head, e.pos, e.slot,
                          static_cast<double>(e.score), static_cast<double>(e.parts[1]),
                          e.reason == EvictionReason::over_budget ? "over_budget" : "prompt_over_budget"));
  }
}

TEST_F(SqlTest, ConditionsOnStepsAreExact) {
  const std::string from = "SELECT count(*) FROM kv_occupancy WHERE layer = 0 AND sequence = 0 AND ";
  EXPECT_EQ(rows(from + "step = 100"), std::vector<std::string>{"2"});
  EXPECT_EQ(rows(from + "step > 100 AND step <= 110"), std::vector<std::string>{"20"});
  EXPECT_EQ(rows(from + "step >= 100 AND step < 110"), std::vector<std::string>{"20"});
  EXPECT_EQ(rows(from + "step BETWEEN 99.5 AND 101.5"), std::vector<std::string>{"4"});
  EXPECT_EQ(rows(from + "step > 1e30"), std::vector<std::string>{"0"});
  EXPECT_EQ(rows(from + "step < -5"), std::vector<std::string>{"0"});
  EXPECT_EQ(rows(from + "step = NULL"), std::vector<std::string>{"0"});
  EXPECT_EQ(rows("SELECT count(*) FROM kv_occupancy"),
            std::vector<std::string>{std::to_string(2 * 2 * 2 * 300)});
  EXPECT_EQ(rows("SELECT count(*) FROM kv_occupancy WHERE layer = 7 OR sequence = -1"),
            std::vector<std::string>{"0"});
}

TEST_F(SqlTest, JoinsWithStoredTables) {
  // Sums over the layers are the step's own figures.
  EXPECT_EQ(rows("SELECT count(*) FROM KV_STEP s WHERE held_tokens != (SELECT sum(held) FROM kv_occupancy o"
                 " WHERE o.sequence = s.sequence AND o.step = s.step)"),
            std::vector<std::string>{"0"});
  EXPECT_EQ(rows("SELECT token FROM kv_token WHERE sequence = 1 AND step = 7"),
            std::vector<std::string>{std::to_string(synthetic_token(*process_, 1, 7))});
}

TEST_F(SqlTest, ValuesAndSketches) {
  const std::vector<float> v = synthetic_row(*process_, 1, 1, RowKind::v, 130);
  EXPECT_EQ(rows("SELECT value FROM kv_value WHERE sequence = 1 AND layer = 1 AND step = 130 AND kind = 'v' "
                 "AND head = 1 AND dim = 3"),
            std::vector<std::string>{fmt::format("{:.4g}", static_cast<double>(v[11]))});
  EXPECT_EQ(rows("SELECT count(*) FROM kv_value WHERE layer = 1 AND step = 5 AND kind = 'q'"),
            std::vector<std::string>{"64"});
  EXPECT_EQ(rows("SELECT count(*) FROM kv_value", "sketch.kvl"), std::vector<std::string>{"0"});
  EXPECT_EQ(
      rows("SELECT position, weight, recall FROM kv_sketch WHERE sequence = 0 AND layer = 1 AND step = 299"
           " AND kv_head = 1 AND rank = 0",
           "sketch.kvl")
          .size(),
      1u);
  EXPECT_EQ(rows("SELECT min(step), count(DISTINCT step) FROM kv_sketch WHERE sequence = 0", "sketch.kvl"),
            std::vector<std::string>{"70|230"});
}

TEST_F(SqlTest, WritesAndNonsenseAreRefused) {
  EXPECT_THAT(error_of("DELETE FROM KV_STEP"), HasSubstr("found one that writes"));
  EXPECT_THAT(error_of("CREATE TABLE t(x)"), HasSubstr("found one that writes"));
  EXPECT_THAT(error_of("SELECT 1; SELECT 2"), HasSubstr("expected one statement"));
  EXPECT_THAT(error_of("SELEKT"), HasSubstr("syntax error"));
  EXPECT_THAT(error_of("  "), HasSubstr("found none"));
  EXPECT_THAT(error_of("SELECT 1", "none.kvl"), HasSubstr("no such file"));
  EXPECT_EQ(error_of("SELECT 1;\n"), "");
}

}  // namespace
}  // namespace kvlapse
