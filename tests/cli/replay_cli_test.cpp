// replay, merge and choose as a user runs them: keys, exit codes, messages.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
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

TEST_F(ReplayCli, NeedsTheDeviceThatIsNamed) {
  const Outcome outcome = run_program({"replay", path("full.kvl"), "-q", "--policy", "longflow", "--budget",
                                       "64", "--device", "cuda:99", "-o", path("device.kvr")});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("--device cuda:99"));
  EXPECT_EQ(std::ranges::count(outcome.err, '\n'), 1) << outcome.err;
  EXPECT_FALSE(fs::exists(path("device.kvr")));
}

TEST_F(ReplayCli, SelectionsAreSaid) {
  const std::vector<std::string> sweep{"replay",   path("full.kvl"), "-q", "--policy",
                                       "longflow", "--budget",       "64"};
  auto with = [&](std::vector<std::string> extra) {
    std::vector<std::string> all = sweep;
    all.insert(all.end(), extra.begin(), extra.end());
    return all;
  };
  const Json whole = json_of(with({"--json", "-o", path("whole.kvr")}));
  EXPECT_FALSE(whole.contains("selection"));
  const Json part = json_of(
      with({"--json", "--layers", "0:1", "--heads", "0:1", "--steps", "130:200", "-o", path("part.kvr")}));
  EXPECT_EQ(part["selection"], "--layers 0:1 --heads 0:1 --steps 130:200");
  EXPECT_LT(part["rows"][0]["evictions"], whole["rows"][0]["evictions"]);
  const Outcome table = run_program(with({"--heads", "1:3", "-o", path("heads.kvr")}));
  EXPECT_EQ(table.exit_code, 0) << table.err;
  EXPECT_THAT(table.out, HasSubstr("only --heads 1:3"));
  EXPECT_THAT(run_program({"info", path("heads.kvr")}).out, HasSubstr("only --heads 1:3"));
  const Outcome merged = run_program({"merge", path("whole.kvr"), path("heads.kvr"), "-o", path("mix.kvr")});
  EXPECT_EQ(merged.exit_code, 2);
  EXPECT_THAT(merged.err, HasSubstr("expected results of one selection"));
  EXPECT_THAT(
      run_program(with({"--heads", "1:3", "--steps", "130:200", "-o", path("s.kvr"), "--emit-sbatch"})).out,
      HasSubstr("--heads 1:3 --steps 130:200"));
  struct Bad {
    const char *option, *value;
    int exit_code;
    const char* says;
  };
  for (const Bad& bad :
       {Bad{"--heads", "0:99", 2, "within the kv heads 0:4, found 0:99"},
        Bad{"--heads", "2:2", 64, "0 <= A < B"}, Bad{"--heads", "two", 64, "expected A:B"},
        Bad{"--steps", "0:10", 2, "expected a generated token there"},
        Bad{"--steps", "100:100000", 2, "within the positions"}, Bad{"--steps", "-5:10", 64, "0 <= A < B"}}) {
    const Outcome outcome =
        run_program(with({std::string(bad.option) + "=" + bad.value, "-o", path("bad.kvr"), "--force"}));
    EXPECT_EQ(outcome.exit_code, bad.exit_code) << bad.value << outcome.err;
    EXPECT_THAT(outcome.err, HasSubstr(bad.says));
  }
  EXPECT_EQ(run_program({"replay", path("longflow.kvl"), "--self", "--heads", "0:1"}).exit_code, 64);
}

TEST_F(ReplayCli, CalibratesOnAnotherRecording) {
  ASSERT_EQ(run_program({"record", "-q", "-o", path("other.kvl"), "--max-tokens", "150", "--ignore-eos",
                         "--task", "sort:7"})
                .exit_code,
            0);
  const std::string file = path("centres.safetensors");
  const Json made = json_of({"calibrate", path("other.kvl"), "-o", file, "-q", "--json"});
  EXPECT_GT(made["queries"], 150);
  EXPECT_EQ(run_program({"calibrate", path("other.kvl"), "-o", file, "-q"}).exit_code, 2);  // exists
  auto replay = [&](const char* trace, const std::string& more) {
    return run_program({"replay", path(trace), "-q", "--policy", "triattention:calibration=" + file + more,
                        "--budget", "80%", "-o", path("tri.kvr"), "--force"});
  };
  const Outcome fair = replay("full.kvl", "");
  EXPECT_EQ(fair.exit_code, 0) << fair.err;
  EXPECT_EQ(fair.out.find("no fair comparison"), std::string::npos);
  const Outcome refused = replay("other.kvl", "");
  EXPECT_EQ(refused.exit_code, 2);
  EXPECT_THAT(refused.err, HasSubstr("fitted on this recording"));
  const Outcome forced = replay("other.kvl", ":same_trace=allow");
  EXPECT_EQ(forced.exit_code, 0) << forced.err;
  EXPECT_THAT(forced.out, HasSubstr("no fair comparison"));
  const Outcome without = run_program({"replay", path("full.kvl"), "-q", "--policy", "triattention",
                                       "--budget", "80%", "-o", path("tri.kvr"), "--force"});
  EXPECT_EQ(without.exit_code, 2);
  EXPECT_THAT(without.err, HasSubstr("kvlapse calibrate"));
}

TEST_F(ReplayCli, MeasuredProfilesAreHeldAgainstTheModel) {
  for (const char* gpu : {"h100-80gb", "h200"}) {
    const Json check = json_of({"predict", "--gpu", gpu, "--check", "--json"});
    EXPECT_EQ(check["rows"].size(), 8u);
    for (const Json& row : check["rows"])
      EXPECT_LE(std::abs(row["difference_ratio"].get<double>()), 0.1) << row;
  }
  const auto of_data_sheet = [](double value) {
    return Json{{"value", value}, {"provenance", "data sheet"}};
  };
  std::ofstream(path("sheet.json")) << Json{
      {"gpu", "a data sheet's"},
      {"memory_gib", of_data_sheet(80)},
      {"weight_read_gbps", of_data_sheet(3350)},
      {"kv_read_gbps", of_data_sheet(3350)},
      {"step_overhead_us", of_data_sheet(0)},
      {"per_sequence_us",
       of_data_sheet(0)}}.dump();
  EXPECT_EQ(run_program({"predict", "--gpu", path("sheet.json"), "--check"}).exit_code,
            2);  // nothing measured

  Json launches = Json::parse(std::ifstream(path("sheet.json")));
  launches["launch_us"] = of_data_sheet(3);
  std::ofstream(path("launches.json")) << launches.dump();
  EXPECT_THAT(run_program({"predict", "--gpu", path("launches.json"), "--check"}).err,
              testing::HasSubstr("launch_us: expected launches by batch beside it, found none"));

  // From a bench to a profile to a check; a step that is far off is found.
  Json bench = {{"rows", Json::array()}};
  for (const auto& [weights, kv] :
       std::vector<std::pair<double, double>>{{1e9, 1e8}, {1e9, 4e9}, {8e9, 1e8}, {8e9, 9e9}, {4e9, 2e9}})
    bench["rows"].push_back({{"bench", "decode"},
                             {"case", "m"},
                             {"device", "a GPU"},
                             {"median", 0.5 + weights / 2e9 + kv / 1e9},
                             {"unit", "ms"},
                             {"batch", 1},
                             {"context", 10},
                             {"weight_bytes", static_cast<int64_t>(weights)},
                             {"kv_bytes", static_cast<int64_t>(kv)}});
  std::ofstream(path("bench.json")) << bench.dump();
  auto fit = [&] {
    return run_program({"predict", "--fit", path("bench.json"), "--memory-gib", "80", "-o", path("gpu.json"),
                        "--force", "--json"});
  };
  const Json profile = Json::parse(fit().out);
  EXPECT_NEAR(profile["step_overhead_us"]["value"].get<double>(), 500, 1e-3);
  EXPECT_NEAR(profile["weight_read_gbps"]["value"].get<double>(), 2000, 1e-3);
  EXPECT_NEAR(profile["kv_read_gbps"]["value"].get<double>(), 1000, 1e-3);
  EXPECT_EQ(run_program({"predict", "--gpu", path("gpu.json"), "--check"}).exit_code, 0);
  bench["rows"][4]["median"] = 20;
  std::ofstream(path("bench.json")) << bench.dump();
  ASSERT_EQ(fit().exit_code, 0);
  EXPECT_EQ(run_program({"predict", "--gpu", path("gpu.json"), "--check"}).exit_code, 1);

  for (const auto& [rows, says] : std::vector<std::pair<Json, const char*>>{
           {Json::array({1, 2}), "step 0: expected an object, found 1"},
           {Json::array({{{"bench", 5}}}), "step 0: bench: expected text, found 5"},
           {Json::array({{{"bench", "decode"}, {"median", "fast"}}}), "expected the number 'median'"},
           {Json::array(), "expected rows of `kvlapse bench decode`, found none"}}) {
    std::ofstream(path("bench.json")) << Json{{"rows", rows}}.dump();
    const auto refused = fit();
    EXPECT_EQ(refused.exit_code, 2);
    EXPECT_THAT(refused.err, testing::HasSubstr(says));
    EXPECT_THAT(refused.err, testing::HasSubstr("bench.json"));
  }
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
