// replay, merge and choose as a user runs them: keys, exit codes, messages.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/cli/program.h"

namespace kvlapse::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::HasSubstr;

class ReplayCli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("kvlapse_replay_cli_" + std::to_string(getpid()));
    fs::create_directories(folder_);
    for (const auto& [name, policy] : {std::pair{"full.kvl", "full"}, {"longflow.kvl", "longflow"}}) {
      std::vector<std::string> arguments{"record", "-q",           "-o",       path(name), "--max-tokens",
                                         "150",    "--ignore-eos", "--policy", policy};
      if (std::string(policy) != "full") arguments.insert(arguments.end(), {"--budget", "64"});
      ASSERT_EQ(run_program(arguments).exit_code, 0);
    }
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }
  static std::string path(const std::string& name) { return (folder_ / name).string(); }
  static Json json_of(const std::vector<std::string>& arguments) {
    const Outcome outcome = run_program(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return Json::parse(outcome.out);
  }
  static inline fs::path folder_;
};

TEST_F(ReplayCli, SelfReplayReportsItsKeys) {
  const Json report = json_of({"replay", path("longflow.kvl"), "--self", "--json"});
  EXPECT_EQ(report["policy"], "longflow@yisunlp");
  EXPECT_EQ(report["budget"], 64);
  EXPECT_GT(report["decisions"], 500);
  EXPECT_EQ(report["mismatches"], 0);
  EXPECT_TRUE(report.contains("ties"));
  EXPECT_TRUE(report["first_mismatch"].is_null());
}

TEST_F(ReplayCli, SweepRowsHaveTheirKeysAndShardsMergeToTheSameBytes) {
  const std::vector<std::string> sweep{
      "replay", path("full.kvl"), "-q", "--policy", "full,longflow,streaming_llm", "--budget", "25%,100"};
  auto with = [&](std::vector<std::string> extra) {
    std::vector<std::string> all = sweep;
    all.insert(all.end(), extra.begin(), extra.end());
    return all;
  };
  const Json document = json_of(with({"--json", "-o", path("one.kvr")}));
  EXPECT_EQ(document["rows"].size(), 5u);
  for (const Json& row : document["rows"]) {
    for (const char* key : {"policy", "budget_slots", "budget_share", "retained_mean", "retained_peak",
                            "kv_bytes_peak", "kv_byte_steps", "evictions", "recall_mean", "recall_p10",
                            "output_error_mean", "output_error_p90", "topk_recall"})
      EXPECT_TRUE(row.contains(key)) << key;
    EXPECT_EQ(row["open_loop"], true);
    EXPECT_TRUE(row["kv_bytes_peak"].is_number_integer());
    if (row["policy"] == "full") {
      EXPECT_EQ(row["recall_mean"], 1.0);
      EXPECT_LE(row["output_error_mean"], 1e-6);
    }
  }
  for (const char* shard : {"0", "1", "2"})
    ASSERT_EQ(run_program(with({"--shard", std::string(shard) + "/3", "-o",
                                path(std::string("part") + shard + ".kvr")}))
                  .exit_code,
              0);
  ASSERT_EQ(run_program(
                {"merge", path("part2.kvr"), path("part0.kvr"), path("part1.kvr"), "-o", path("merged.kvr")})
                .exit_code,
            0);
  auto bytes = [](const std::string& file) {
    std::ifstream in(file, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
  };
  EXPECT_EQ(bytes(path("merged.kvr")), bytes(path("one.kvr")));
  // Running it again changes nothing, and needs no cell.
  ASSERT_EQ(run_program(with({"--resume", "-o", path("one.kvr")})).exit_code, 0);
  EXPECT_EQ(bytes(path("merged.kvr")), bytes(path("one.kvr")));

  const Json info = json_of({"info", path("one.kvr"), "--json"});
  EXPECT_EQ(info["kind"], "results");
  EXPECT_EQ(info["complete"], true);
  EXPECT_EQ(info["cells"].size(), 5u);
  EXPECT_EQ(info["traces"][0]["kv_heads"], 4);

  const Json choice = json_of({"choose", path("one.kvr"), "--max", "output_error=1000", "--json"});
  EXPECT_EQ(choice["rows"].size(), 2u);
  for (const Json& row : choice["rows"]) EXPECT_GT(row["budget_slots"], 0);
}

TEST_F(ReplayCli, BadRequestsAreOneLine) {
  struct Case {
    std::vector<std::string> arguments;
    int exit_code;
    std::string named;
  };
  const std::string trace = path("full.kvl");
  ASSERT_EQ(run_program({"replay", trace, "--policy", "longflow", "--budget", "64", "-q", "--force", "-o",
                         path("one.kvr")})
                .exit_code,
            0);
  const Case cases[] = {
      {{"replay", trace, "--policy", "longfow", "--budget", "64", "-o", path("x.kvr")}, 64, "longflow"},
      {{"replay", trace, "--policy", "longflow", "--budget", "64q", "-o", path("x.kvr")}, 64, "64q"},
      {{"replay", trace, "--policy", "streaming_llm", "--budget", "3", "-o", path("x.kvr")}, 2, "budget 3"},
      {{"replay", trace, "--policy", "longflow", "--budget", "64", "-o", path("x.kvr"), "--shard", "4/4"},
       64,
       "4/4"},
      {{"replay", trace, "--policy", "longflow", "--budget", "64"}, 64, "-o"},
      {{"replay", trace, "--policy", "longflow", "--budget", "64", "--layers", "2:9", "-o", path("x.kvr")},
       2,
       "2:9"},
      {{"replay", path("none.kvl"), "--self"}, 2, "none.kvl"},
      {{"merge", trace, "-o", path("x.kvr")}, 2, "results file"},
      {{"choose", path("one.kvr"), "--max", "output_eror=1"}, 64, "output_error"},
  };
  for (const Case& c : cases) {
    const Outcome outcome = run_program(c.arguments);
    EXPECT_EQ(outcome.exit_code, c.exit_code) << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1) << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(c.named));
    EXPECT_FALSE(fs::exists(path("x.kvr"))) << outcome.err;
  }
}

TEST_F(ReplayCli, ATraceWithoutRowsIsRefused) {
  ASSERT_EQ(run_program({"record", "-q", "-o", path("events.kvl"), "--max-tokens", "20", "--tier", "events"})
                .exit_code,
            0);
  const Outcome outcome = run_program(
      {"replay", path("events.kvl"), "--policy", "longflow", "--budget", "64", "-o", path("y.kvr")});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("tier"));
  EXPECT_THAT(outcome.err, HasSubstr("events"));
}

}  // namespace
}  // namespace kvlapse::test
