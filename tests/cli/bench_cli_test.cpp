// bench and memory: the keys that scripts rely on, and figures that agree with each other.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/support/cli/program.h"

namespace kvlapse::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::HasSubstr;

Json rows_of(const std::vector<std::string>& arguments) {
  const Outcome outcome = run_program(arguments);
  EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
  return outcome.exit_code == 0 ? Json::parse(outcome.out)["rows"] : Json::array();
}

void expect_bench_keys(const Json& row, const std::string& bench, const std::string& unit) {
  EXPECT_EQ(row.at("bench"), bench);
  EXPECT_EQ(row.at("unit"), unit);
  EXPECT_TRUE(row.at("case").is_string() && row.at("device").is_string());
  EXPECT_GT(row.at("median").get<double>(), 0);
  EXPECT_GT(row.at("limit").get<double>(), 0);
  EXPECT_NEAR(row.at("ratio_to_limit").get<double>(),
              row.at("median").get<double>() / row.at("limit").get<double>(), 1e-9);
  EXPECT_GE(row.at("runs").get<int>(), 1);
  EXPECT_GE(row.at("spread").get<double>(), 0);
}

TEST(BenchCli, ReplayCountsConfigurationsASecond) {
  const Json rows =
      rows_of({"bench", "replay", "--context", "512", "--configs", "1,6", "--runs", "2", "--json"});
  ASSERT_EQ(rows.size(), 2u);
  for (const Json& row : rows) {
    expect_bench_keys(row, "replay", "configs/s");
    EXPECT_LT(row["ratio_to_limit"], 1) << "faster than the multiply-adds of full attention";
    EXPECT_EQ(row["tokens"], 512);
    EXPECT_EQ(row["runs"], 2);
    EXPECT_NEAR(row["median"].get<double>() * row["seconds"].get<double>(), row["configs"].get<int>(), 1e-6);
  }
  EXPECT_EQ(rows[0]["configs"], 1);
  EXPECT_EQ(rows[1]["configs"], 6);
  const Outcome outcome = run_program({"bench", "replay", "--context", "200"});
  EXPECT_EQ(outcome.exit_code, 64);
  EXPECT_THAT(outcome.err, HasSubstr("found 200"));
}

TEST(BenchCli, ReplayNeedsTheDeviceThatIsNamed) {
  const Outcome outcome = run_program({"bench", "replay", "--context", "512", "--device", "cuda:99"});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("--device cuda:99"));
  EXPECT_EQ(std::ranges::count(outcome.err, '\n'), 1) << outcome.err;
}

TEST(BenchCli, ThroughputHoldsFullAgainstThePolicy) {
  const Json rows = rows_of({"bench", "throughput", "--batches", "1,2", "--context", "256", "--steps", "4",
                             "--policy", "longflow", "--budget", "160", "--json"});
  ASSERT_EQ(rows.size(), 4u);
  for (size_t i = 0; i < rows.size(); ++i) {
    const Json& row = rows[i];
    expect_bench_keys(row, "throughput", "tok/s");
    const int batch = i < 2 ? 1 : 2;
    EXPECT_EQ(row["batch"], batch);
    EXPECT_EQ(row["budget_slots"], i % 2 == 0 ? 0 : 160);
    EXPECT_NEAR(row["median"].get<double>() * row["step_ms"].get<double>(), 1e3 * batch, 1e-6);
    EXPECT_NEAR(row["times_full"].get<double>(),
                row["median"].get<double>() / rows[i / 2 * 2]["median"].get<double>(), 1e-9);
  }
  // A smaller cache is less to read.
  EXPECT_LT(rows[1]["bytes_per_step"], rows[0]["bytes_per_step"]);
  EXPECT_LT(rows[3]["bytes_per_step"], rows[2]["bytes_per_step"]);
}

class MemoryCli : public testing::Test {
 protected:
  void SetUp() override { fs::create_directories(folder_); }
  void TearDown() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }
  void record(const std::string& name, const std::string& seed, const std::string& batch) const {
    ASSERT_EQ(run_program({"record", "-q", "--task", "sort:" + seed, "--batch", batch, "--max-tokens", "80",
                           "--ignore-eos", "--policy", "full", "-o", path(name)})
                  .exit_code,
              0);
  }
  Json memory(const std::string& name) const {
    return rows_of({"memory", path(name), "-q", "--policy", "longflow,random", "--budget", "100,75%",
                    "--points", "3", "--json"});
  }
  fs::path folder_ = fs::temp_directory_path() / ("kvlapse_memory_" + std::to_string(getpid()));
};

// Sequences of a batch depend on their seed alone, so a batch must hold what its sequences hold one by one.
TEST_F(MemoryCli, ABatchHoldsWhatItsSequencesHold) {
  record("both.kvl", "5", "2");
  record("a.kvl", "5", "1");
  record("b.kvl", "6", "1");
  const Json both = memory("both.kvl"), a = memory("a.kvl"), b = memory("b.kvl");
  ASSERT_EQ(both.size(), 5u);
  for (size_t i = 0; i < both.size(); ++i) {
    SCOPED_TRACE(both[i].dump());
    EXPECT_EQ(both[i]["sequences"], 2);
    EXPECT_EQ(a[i]["sequences"], 1);
    EXPECT_EQ(both[i]["budget"], a[i]["budget"]);
    EXPECT_EQ(both[i]["budget_slots"], std::max(a[i]["budget_slots"], b[i]["budget_slots"]));
    const auto sum = [&](const char* point, const char* key) {
      return a[i][point][key].get<int64_t>() + b[i][point][key].get<int64_t>();
    };
    // Both generate 80 tokens behind prompts that end together, so both end together.
    for (const char* key : {"logical_bytes", "held_bytes", "reclaimable_bytes", "compacted_bytes"})
      EXPECT_EQ(both[i]["end"][key], sum("end", key));
    EXPECT_LE(both[i]["peak"]["held_bytes"], sum("peak", "held_bytes"));
    EXPECT_GT(both[i]["peak"]["held_bytes"],
              std::max(a[i]["peak"]["held_bytes"], b[i]["peak"]["held_bytes"]).get<int64_t>());
    EXPECT_EQ(both[i]["full_bytes"], a[i]["full_bytes"].get<int64_t>() + b[i]["full_bytes"].get<int64_t>());
    EXPECT_EQ(both[i]["points"][2]["held_bytes"], sum("end", "held_bytes"));
  }
}

}  // namespace
}  // namespace kvlapse::test
