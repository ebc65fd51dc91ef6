// Live equals replay: what a real decode evicted is what the replay of its trace evicts.
#include "replay/self_replay.h"

#include <gtest/gtest.h>

#include <cctype>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/policy/registry.h"
#include "replay/fit_centres.h"
#include "tests/support/replay/recorded_run.h"
#include "tests/support/trace/synthetic_trace.h"

namespace kvlapse {
namespace {

using test::RecordedRun;
using test::TemporaryFolder;

std::vector<int32_t> some_prompt(int n, int salt = 0) {
  std::vector<int32_t> ids;
  for (int i = 0; i < n; ++i) ids.push_back((i * 7 + salt * 13 + i * i) % 64);
  return ids;
}

RecordedRun tiny_run(std::string policy, std::string budget) {
  RecordedRun run;
  run.model = KVLAPSE_TEST_DATA "/tiny_qwen3";
  run.policy = std::move(policy);
  run.budget = std::move(budget);
  run.prompts = {some_prompt(30)};
  run.max_tokens = 220;
  run.temperature = 1;  // a random model repeats itself when greedy
  return run;
}

// Every policy that can run live, with the variants that change how victims are taken.
std::vector<std::string> live_policies() {
  std::vector<std::string> specs;
  for (const PolicyEntry& entry : policy_registry()) {
    const PolicyInfo info = entry.info();
    if (!info.evicts || contains(info.signals, Signal::future)) continue;
    const std::string name =
        info.reference.empty() ? std::string(info.name) : fmt::format("{}@{}", info.name, info.reference);
    specs.push_back(name);
  }
  for (const char* spec :
       {"longflow:granularity=kv_head", "longflow:cast=fp16", "longflow:ties=last", "random:pin_prompt=1",
        "streaming_llm:positions=cache", "streaming_llm@kvpress:positions=cache"})
    specs.push_back(spec);
  return specs;
}

// The policy, calibrated on a run of that model where it asks for that.
std::string calibrated(const TemporaryFolder& folder, const std::string& model, const std::string& policy) {
  if (policy != "triattention") return policy;
  const std::filesystem::path file =
      folder / (std::filesystem::path(model).filename().string() + ".safetensors");
  if (!std::filesystem::exists(file)) {
    RecordedRun run = tiny_run("full", "1");
    run.model = model;
    run.prompts = {some_prompt(25, 9)};
    run.seed = 77;
    test::record_run(folder / "other.kvl", run);
    std::ofstream(file, std::ios::binary) << fit_centres({folder / "other.kvl"}).to_bytes();
  }
  return policy + ":calibration=" + file.string();
}

// Some references protect a hundred tokens and more.
void record_at_smallest_budget(const TemporaryFolder& folder, const std::filesystem::path& file,
                               const std::string& policy) {
  for (const auto& [budget, max_tokens] : {std::pair{"48", 220}, {"100", 250}, {"280", 330}}) {
    RecordedRun run = tiny_run(policy, budget);
    run.max_tokens = max_tokens;
    if (max_tokens > 220) run.model = KVLAPSE_MODELS "/reasoner-6m";  // the tiny model's context is shorter
    run.policy = calibrated(folder, run.model, policy);
    try {
      return test::record_run(file, run);
    } catch (const Error& error) {
      if (std::string(error.what()).find("protected set") == std::string::npos) throw;
    }
  }
  FAIL() << policy << ": no budget of the test is large enough";
}

TEST(SelfReplay, EveryLivePolicyEvictsTheSameVictims) {
  TemporaryFolder folder;
  for (const std::string& policy : live_policies()) {
    record_at_smallest_budget(folder, folder / "run.kvl", policy);
    const SelfReplayReport report = self_replay(TraceReader(folder / "run.kvl"));
    EXPECT_EQ(report.mismatches, 0) << policy;
    EXPECT_FALSE(report.first_mismatch) << policy;
    EXPECT_GT(report.decisions, 0) << policy;
  }
}

// The tiny model with room for two thousand tokens.
std::string long_tiny_model(const std::filesystem::path& folder) {
  const std::filesystem::path from = KVLAPSE_TEST_DATA "/tiny_qwen3", to = folder / "tiny_long";
  std::filesystem::create_directory(to);
  std::filesystem::copy_file(from / "model.safetensors", to / "model.safetensors");
  nlohmann::json config = nlohmann::json::parse(std::ifstream(from / "config.json"));
  config["max_position_embeddings"] = 2304;
  std::ofstream(to / "config.json") << config;
  return to.string();
}

// Long enough for every cadence, window and table to wrap many times; the sequences of a batch differ in seed
// and length.
class LongSelfReplay : public testing::TestWithParam<std::string> {};

TEST_P(LongSelfReplay, TwoThousandTokensOfThreeSeeds) {
  TemporaryFolder folder;
  RecordedRun run = tiny_run(GetParam(), "300");
  run.model = long_tiny_model(folder.path());
  run.policy = calibrated(folder, run.model, run.policy);
  run.prompts = {some_prompt(30, 3), some_prompt(47, 4), some_prompt(90, 5)};
  run.max_tokens = 2000;
  test::record_run(folder / "run.kvl", run);
  const SelfReplayReport report = self_replay(TraceReader(folder / "run.kvl"));
  EXPECT_EQ(report.mismatches, 0);
  EXPECT_GT(report.decisions, 3 * 2 * 1600);  // sequences, layers, tokens beyond the budget
}

INSTANTIATE_TEST_SUITE_P(EveryPolicy, LongSelfReplay, testing::ValuesIn(live_policies()),
                         [](const auto& policy) {
                           std::string name = policy.param;
                           for (char& c : name)
                             if (std::isalnum(static_cast<unsigned char>(c)) == 0) c = '_';
                           return name;
                         });

TEST(SelfReplay, PromptLongerThanTheBudgetAndRaggedBatches) {
  TemporaryFolder folder;
  RecordedRun run = tiny_run("longflow", "40");
  run.prompts = {some_prompt(90), some_prompt(12, 1), some_prompt(41, 2)};
  run.kv_dtype = DType::bf16;
  test::record_run(folder / "run.kvl", run);
  const SelfReplayReport report = self_replay(TraceReader(folder / "run.kvl"));
  EXPECT_EQ(report.mismatches, 0);
  EXPECT_GT(report.decisions, 3 * 100);
}

TEST(SelfReplay, ReportsTheFirstVictimThatDiffers) {
  TemporaryFolder folder;
  RecordedRun run = tiny_run("random:seed=1", "48");
  run.claimed_policy = "random:seed=2";
  test::record_run(folder / "lie.kvl", run);
  const SelfReplayReport report = self_replay(TraceReader(folder / "lie.kvl"));
  EXPECT_GT(report.mismatches, report.decisions / 2);
  ASSERT_TRUE(report.first_mismatch);
  EXPECT_EQ(report.first_mismatch->layer, 0);
  EXPECT_EQ(report.first_mismatch->step, 47);  // the first token beyond the budget: 48 held, one must go
  EXPECT_NE(report.first_mismatch->recorded_pos, report.first_mismatch->replayed_pos);
}

TEST(SelfReplay, Layer0OfAFullTraceEqualsAClosedRun) {
  TemporaryFolder folder;
  test::record_run(folder / "full.kvl", tiny_run("full", "1"));
  const TraceReader full(folder / "full.kvl");
  const std::vector<int32_t> tokens = full.sequence(0).tokens;
  for (const std::string& policy : live_policies()) {
    RecordedRun run = tiny_run(policy, "48");
    run.policy = calibrated(folder, run.model, policy);
    run.teachers = {std::vector<int32_t>(tokens.begin() + 30, tokens.end())};
    try {
      test::record_run(folder / "closed.kvl", run);
    } catch (const Error&) {
      continue;  // protects more than 48: the test above covers it
    }
    const SelfReplayReport report = layer0_replay(full, TraceReader(folder / "closed.kvl"));
    EXPECT_EQ(report.mismatches, 0) << policy;
    EXPECT_GT(report.decisions, 0) << policy;
  }
}

}  // namespace
}  // namespace kvlapse
