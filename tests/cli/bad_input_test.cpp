// What bad input gets: one line that names what, where, expected and found, and the right exit code.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/support/cli/program.h"

namespace kvlapse::test {
namespace {

namespace fs = std::filesystem;
using testing::AllOf;
using testing::HasSubstr;

class BadInput : public testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / ("kvlapse_bad_input_" + std::to_string(getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }
  std::string path(const std::string& name) const { return (folder_ / name).string(); }

  // A copy of the built-in model to damage.
  fs::path model_copy() const {
    fs::path copy = folder_ / "model";
    fs::copy(fs::path(KVLAPSE_MODELS) / "reasoner-6m", copy, fs::copy_options::recursive);
    return copy;
  }

  static void expect(const Outcome& outcome, int exit_code, const std::vector<std::string>& named) {
    EXPECT_EQ(outcome.exit_code, exit_code) << outcome.err;
    EXPECT_EQ(std::count(outcome.err.begin(), outcome.err.end(), '\n'), 1)
        << "expected one line: " << outcome.err;
    for (const std::string& word : named) EXPECT_THAT(outcome.err, HasSubstr(word));
  }
  // Records into `name` with extra arguments, quietly.
  Outcome record(const std::string& name, std::vector<std::string> extra) const {
    std::vector<std::string> arguments{"record", "-q", "-o", path(name)};
    arguments.insert(arguments.end(), extra.begin(), extra.end());
    return run_program(arguments);
  }

  fs::path folder_;
};

std::string read(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  std::ostringstream text;
  text << in.rdbuf();
  return text.str();
}

void write(const fs::path& file, const std::string& bytes) {
  std::ofstream out(file, std::ios::binary);
  out << bytes;
}

TEST_F(BadInput, UnknownCommandAndOption) {
  expect(run_program({"recrod"}), 64, {"recrod", "record"});
  expect(run_program({"record", "--no-such-option", "-o", path("a.kvl")}), 64, {"--no-such-option"});
}

TEST_F(BadInput, UnknownModel) {
  expect(record("a.kvl", {"--model", "nosuch"}), 2, {"nosuch", "models"});
}

TEST_F(BadInput, WrongShape) {
  fs::path model = model_copy();
  std::string config = read(model / "config.json");
  size_t at = config.find("\"intermediate_size\": 768");
  ASSERT_NE(at, std::string::npos);
  config.replace(at, 24, "\"intermediate_size\": 512");
  write(model / "config.json", config);
  expect(record("a.kvl", {"--model", model.string()}), 2, {"mlp", "512", "768"});
}

TEST_F(BadInput, NanInWeights) {
  fs::path model = model_copy();
  std::string weights = read(model / "model.safetensors");
  weights[weights.size() - 1] = static_cast<char>(0x7f);  // the last bf16 becomes a NaN
  weights[weights.size() - 2] = static_cast<char>(0xff);
  write(model / "model.safetensors", weights);
  expect(record("a.kvl", {"--model", model.string()}), 2, {"model.safetensors", "NaN"});
}

TEST_F(BadInput, TruncatedWeights) {
  fs::path model = model_copy();
  fs::resize_file(model / "model.safetensors", 1 << 20);
  expect(record("a.kvl", {"--model", model.string()}), 2, {"model.safetensors", "data_offsets", "found"});
}

TEST_F(BadInput, PromptLongerThanTheContext) {
  write(path("long.txt"), std::string(9000, 'a'));
  expect(record("a.kvl", {"--prompt-file", path("long.txt")}), 2, {"prompt", "8192", "9000"});
  EXPECT_FALSE(fs::exists(path("a.kvl")));
}

TEST_F(BadInput, CharactersOutsideTheVocabulary) {
  expect(record("a.kvl", {"--prompt", "caf\xc3\xa9"}), 2, {"\xc3\xa9"});
}

TEST_F(BadInput, InvalidUtf8) {
  expect(record("a.kvl", {"--prompt", "ab\xff"}), 2, {"UTF-8"});
}

TEST_F(BadInput, BudgetBelowTheProtectedSet) {
  expect(record("a.kvl", {"--task", "sort", "--policy", "streaming_llm", "--budget", "4"}), 2,
         {"streaming_llm", "budget 4"});
  expect(record("a.kvl", {"--task", "sort", "--policy", "random:pin_prompt=1", "--budget", "64"}), 2,
         {"random", "pinned prompt"});
  EXPECT_FALSE(fs::exists(path("a.kvl")));
}

TEST_F(BadInput, PolicyTaskAndBudgetNames) {
  expect(record("a.kvl", {"--policy", "longflw", "--budget", "64"}), 64, {"longflw", "longflow"});
  expect(record("a.kvl", {"--policy", "rkv:lamda=1", "--budget", "64"}), 64, {"lamda", "lambda"});
  expect(record("a.kvl", {"--policy", "rkv:lambda=7", "--budget", "64"}), 64, {"lambda", "7"});
  expect(record("a.kvl", {"--policy", "longflow", "--budget", "many"}), 64, {"budget", "many"});
  expect(record("a.kvl", {"--policy", "longflow"}), 64, {"longflow", "--budget"});
  expect(record("a.kvl", {"--task", "srot"}), 64, {"srot", "sort"});
}

// What a decoder that keeps its steps to itself cannot do is refused before a GPU is asked for.
TEST_F(BadInput, FusedDecoder) {
  const auto fused = [&](std::vector<std::string> extra) {
    extra.insert(extra.begin(), {"--task", "sort", "--decoder", "fused"});
    return record("a.kvl", extra);
  };
  expect(record("a.kvl", {"--decoder", "fast"}), 64, {"--decoder", "fused", "fast"});
  expect(fused({}), 64, {"--device", "cuda", "cpu"});
  expect(fused({"--device", "cuda", "--tier", "qkv"}), 64, {"--tier", "events", "qkv"});
  expect(fused({"--device", "cuda", "--policy", "rkv", "--budget", "64"}), 64,
         {"--policy", "longflow", "rkv"});
  expect(fused({"--device", "cuda", "--temperature", "0.7"}), 64, {"--temperature", "0.7"});
  expect(fused({"--device", "cuda", "--kv-dtype", "fp16"}), 64, {"--kv-dtype", "bf16", "fp16"});
  EXPECT_FALSE(fs::exists(path("a.kvl")));
}

TEST_F(BadInput, UnwritableOutput) {
  expect(record("no/such/folder/a.kvl", {"--task", "sort", "--max-tokens", "8"}), 2,
         {"no/such/folder/a.kvl"});
}

TEST_F(BadInput, ExistingOutputIsKept) {
  write(path("a.kvl"), "precious");
  expect(record("a.kvl", {"--task", "sort", "--max-tokens", "8"}), 2, {"a.kvl", "--force"});
  EXPECT_EQ(read(path("a.kvl")), "precious");
}

TEST_F(BadInput, TraceWithoutRows) {
  ASSERT_EQ(record("a.kvl", {"--task", "sort", "--max-tokens", "64", "--tier", "events"}).exit_code, 0);
  expect(run_program(
             {"replay", path("a.kvl"), "--policy", "longflow", "--budget", "32", "-q", "-o", path("a.kvr")}),
         2, {"a.kvl", "qkv"});
}

TEST_F(BadInput, NotATrace) {
  write(path("a.kvl"), std::string(4096, 'x'));
  expect(run_program({"info", path("a.kvl")}), 2, {"a.kvl"});
  expect(run_program({"replay", "--self", path("a.kvl")}), 2, {"a.kvl"});
  expect(run_program({"info", path("missing.kvl")}), 2, {"missing.kvl"});
  EXPECT_EQ(run_program({"verify", path("a.kvl")}).exit_code, 1);
}

TEST_F(BadInput, TraceOfANewerFormat) {
  ASSERT_EQ(record("a.kvl", {"--task", "sort", "--max-tokens", "8", "--tier", "events"}).exit_code, 0);
  std::string bytes = read(path("a.kvl"));
  bytes[60 + 3] = 99;  // user_version, big-endian at byte 60 of SQLite's header
  write(path("a.kvl"), bytes);
  expect(run_program({"info", path("a.kvl")}), 2, {"a.kvl", "99"});
}

// Every command has help with examples, and says so on stdout with exit code 0.
TEST(Help, EveryCommandHasExamples) {
  Outcome all = run_program({"--help"});
  EXPECT_EQ(all.exit_code, 0);
  for (const char* command : {"record", "replay", "eval", "info", "verify", "sql", "policies", "doctor",
                              "conformance", "merge", "choose", "memory", "predict"}) {
    EXPECT_THAT(all.out, HasSubstr(command));
    Outcome help = run_program({command, "--help"});
    EXPECT_EQ(help.exit_code, 0) << command;
    EXPECT_THAT(help.out, HasSubstr("Examples:")) << command;
  }
}

// The chain, short: record with eviction, verify, replay the same victims, results twice the same bytes.
TEST(Chain, RecordVerifyReplay) {
  fs::path folder = fs::temp_directory_path() / ("kvlapse_chain_" + std::to_string(getpid()));
  fs::create_directories(folder);
  auto path = [&](const char* name) { return (folder / name).string(); };
  for (const char* policy : {"longflow", "rkv", "streaming_llm", "random:pin_prompt=1", "h2o"}) {
    Outcome recorded =
        run_program({"record", "-q", "--force", "--task", "sort:1", "--max-tokens", "500", "--ignore-eos",
                     "--policy", policy, "--budget", "192", "-o", path("a.kvl"), "--json"});
    ASSERT_EQ(recorded.exit_code, 0) << recorded.err;
    EXPECT_THAT(recorded.out, HasSubstr("\"generated_tokens\": 500"));
    EXPECT_EQ(run_program({"verify", path("a.kvl")}).exit_code, 0);
    Outcome self = run_program({"replay", "--self", path("a.kvl"), "--json", "-q"});
    EXPECT_EQ(self.exit_code, 0) << self.err;
    EXPECT_THAT(self.out, AllOf(HasSubstr("\"mismatches\": 0"), testing::Not(HasSubstr("\"decisions\": 0,"))))
        << policy;
  }
  ASSERT_EQ(run_program({"record", "-q", "--task", "sort:1", "--max-tokens", "400", "-o", path("full.kvl")})
                .exit_code,
            0);
  for (const char* out : {"1.kvr", "2.kvr"})
    ASSERT_EQ(run_program({"replay", path("full.kvl"), "--policy", "longflow,rkv", "--budget", "160,25%",
                           "-q", "-o", path(out)})
                  .exit_code,
              0);
  EXPECT_EQ(read(path("1.kvr")), read(path("2.kvr")));
  fs::remove_all(folder);
}

}  // namespace
}  // namespace kvlapse::test
