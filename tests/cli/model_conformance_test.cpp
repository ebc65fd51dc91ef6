// SmolLM2 through the command line: what users run, with the exit code that scripts see.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <nlohmann/json.hpp>

#include "tests/support/smollm2.h"

namespace kvlapse {
namespace {

struct Output {
  std::string text;
  int exit_code = -1;
};

Output run(const std::string& arguments) {
  Output output;
  FILE* pipe = popen((KVLAPSE_BINARY " " + arguments + " 2>&1").c_str(), "r");
  std::array<char, 4096> buffer;
  while (size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) output.text.append(buffer.data(), n);
  output.exit_code = WEXITSTATUS(pclose(pipe));
  return output;
}

const std::string kGolden = KVLAPSE_TEST_DATA "/smollm2/";

class SmolLm2Conformance : public ::testing::Test {
 protected:
  void SetUp() override {
    KVLAPSE_NEEDS_SMOLLM2();
  }
  std::string model_ = kSmolLm2.string();
};

TEST_F(SmolLm2Conformance, EngineAndTokenizerAreExact) {
  Output output = run("conformance " + kGolden + "math.safetensors " + kGolden + "text.safetensors " +
                      kGolden + "tokenizer.safetensors --json --model " + model_);
  ASSERT_EQ(output.exit_code, 0) << output.text;
  auto rows = nlohmann::json::parse(output.text)["rows"];
  ASSERT_EQ(rows.size(), 3u);
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(rows[i]["tokens_equal"], true);
    EXPECT_FALSE(rows[i].contains("first_divergence"));
    EXPECT_LT(rows[i]["max_logit_error"].get<double>(), 2e-4);
    EXPECT_LT(rows[i]["max_qkv_error"].get<double>(), 2e-5);
    EXPECT_LT(rows[i]["max_hidden_error"].get<double>(), 2e-5);
  }
  EXPECT_EQ(rows[2]["tokenizer_mismatches"], 0);
}

TEST_F(SmolLm2Conformance, AnotherModelIsNoMatch) {
  Output output = run("conformance " + kGolden +
                      "math.safetensors --model " KVLAPSE_TEST_DATA "/tiny_models/gguf_f32.gguf");
  EXPECT_EQ(output.exit_code, 2);
  EXPECT_NE(output.text.find("gguf_sha256: expected"), std::string::npos) << output.text;
}

TEST_F(SmolLm2Conformance, WithoutAModelItIsAUsageError) {
  Output output = run("conformance " + kGolden + "math.safetensors");
  EXPECT_EQ(output.exit_code, 64);
}

}  // namespace
}  // namespace kvlapse
