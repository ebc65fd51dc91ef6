// Small tokenizers of each family against the library that defines them: tests/data/tokenizers/make.py.
#include <gtest/gtest.h>

#include <fstream>
#include <nlohmann/json.hpp>

#include "core/model/tokenizer.h"

namespace kvlapse {
namespace {

class TokenizerFamilies : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenizerFamilies, GivesTheIdsOfTheLibrary) {
  std::string folder = KVLAPSE_TEST_DATA "/tokenizers/";
  auto tokenizer = open_tokenizer_json(folder + GetParam() + ".json");
  auto golden = nlohmann::json::parse(std::ifstream(folder + "golden.json"));
  const auto& strings = golden["strings"];
  ASSERT_GT(strings.size(), 100u);
  for (size_t i = 0; i < strings.size(); ++i) {
    auto text = strings[i].get<std::string>();
    EXPECT_EQ(tokenizer->encode(text, SpecialTokens::parse),
              golden[GetParam()]["ids"][i].get<std::vector<int32_t>>())
        << text;
    EXPECT_EQ(tokenizer->encode(text, SpecialTokens::plain),
              golden[GetParam()]["plain"][i].get<std::vector<int32_t>>())
        << text;
  }
}

INSTANTIATE_TEST_SUITE_P(All, TokenizerFamilies, ::testing::Values("gpt2", "smollm", "qwen2", "llama3"));

}  // namespace
}  // namespace kvlapse
