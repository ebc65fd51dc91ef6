// The queries of trace/FORMAT.md run as they stand there, with results as stored in tests/data/trace_queries;
// every column that the file has is in the document.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/sql.h"

namespace kvlapse {
namespace {

namespace fs = std::filesystem;

std::string text_of(const fs::path& file) {
  std::ifstream in(file);
  if (!in) fail("{}: cannot read", file.string());
  std::stringstream text;
  text << in.rdbuf();
  return text.str();
}

std::string format_text() {
  return text_of(fs::path(KVLAPSE_TEST_DATA) / "../../trace/FORMAT.md");
}

std::vector<std::string> queries() {
  const std::string text = format_text(), fence = "```sql\n";
  std::vector<std::string> out;
  for (size_t at = text.find(fence); at != std::string::npos; at = text.find(fence, at)) {
    at += fence.size();
    out.push_back(text.substr(at, text.find("```", at) - at));
  }
  return out;
}

std::string csv_of(const fs::path& file, const std::string& sql) {
  SqlQuery query(file, sql);
  std::string csv = fmt::format("{}\n", fmt::join(query.columns(), ","));
  std::vector<SqlValue> row;
  while (query.next(row)) {
    std::vector<std::string> cells;
    for (const SqlValue& value : row) {
      if (auto* integer = std::get_if<int64_t>(&value))
        cells.push_back(std::to_string(*integer));
      else if (auto* real = std::get_if<double>(&value))
        cells.push_back(fmt::format("{}", *real));
      else if (auto* text = std::get_if<std::string>(&value))
        cells.push_back(*text);
      else
        cells.push_back("");
    }
    csv += fmt::format("{}\n", fmt::join(cells, ","));
  }
  return csv;
}

TEST(TraceFormat, QueriesGiveTheirStoredResults) {
  test::TemporaryFolder folder;
  test::SyntheticProcess process;
  process.n_sequences = 2;
  process.n_prompt = 70;
  process.budget = 64;
  write_synthetic_trace(folder / "qkv.kvl", process);
  process.tier = TraceTier::sketch;
  write_synthetic_trace(folder / "sketch.kvl", process);
  const std::vector<std::string> all = queries();
  ASSERT_EQ(all.size(), 11u);
  for (size_t i = 0; i < all.size(); ++i) {
    const fs::path stored = fs::path(KVLAPSE_TEST_DATA) / fmt::format("trace_queries/{:02}.csv", i + 1);
    const std::string found = csv_of(folder / (i < 10 ? "qkv.kvl" : "sketch.kvl"), all[i]);
    EXPECT_GT(std::count(found.begin(), found.end(), '\n'), 1) << "query " << i + 1 << " finds nothing";
    // Set to write the results anew, after looking at them.
    if (std::getenv("KVLAPSE_WRITE_GOLDEN")) std::ofstream(stored) << found;
    EXPECT_EQ(found, text_of(stored)) << "query " << i + 1;
  }
}

TEST(TraceFormat, EveryTableAndColumnIsDocumented) {
  test::TemporaryFolder folder;
  write_synthetic_trace(folder / "a.kvl", test::SyntheticProcess());
  const std::string text = format_text();
  SqlQuery query(
      folder / "a.kvl",
      "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'");
  std::vector<SqlValue> row;
  int columns = 0;
  while (query.next(row)) {
    const std::string table = std::get<std::string>(row[0]), column = std::get<std::string>(row[1]);
    EXPECT_NE(text.find("### " + table), std::string::npos) << table;
    EXPECT_NE(text.find("`" + column + "`"), std::string::npos) << table << "." << column;
    ++columns;
  }
  EXPECT_GT(columns, 40);
  SqlQuery keys(folder / "a.kvl", "SELECT key FROM KV_META WHERE key NOT IN ('model', 'device')");
  while (keys.next(row))
    EXPECT_NE(text.find("`" + std::get<std::string>(row[0]) + "`"), std::string::npos)
        << std::get<std::string>(row[0]);
}

}  // namespace
}  // namespace kvlapse
