#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <nlohmann/json.hpp>

namespace kvlapse {
namespace {

nlohmann::json info(const std::string& model, const std::string& more = "") {
  FILE* pipe =
      popen((KVLAPSE_BINARY " info --json " KVLAPSE_TEST_DATA "/" + model + " " + more).c_str(), "r");
  std::array<char, 4096> buffer;
  std::string text;
  while (size_t n = std::fread(buffer.data(), 1, buffer.size(), pipe)) text.append(buffer.data(), n);
  EXPECT_EQ(pclose(pipe), 0);
  return nlohmann::json::parse(text);
}

TEST(ModelInfo, KnownCacheSizes) {
  EXPECT_EQ(info("model_configs/qwen3_8b")["kv_bytes_per_token"], 144 * 1024);
  auto llama = info("model_configs/llama_3_1_8b", "--tokens 30000");
  EXPECT_EQ(llama["cache_bytes"][0]["tokens"], 30000);
  EXPECT_EQ(llama["cache_bytes"][0]["bytes"], 3'932'160'000);
  EXPECT_EQ(llama["rope"]["scaling"], "llama3");
  EXPECT_EQ(info("model_configs/qwen3_8b", "--kv-dtype fp8")["kv_bytes_per_token"], 72 * 1024);
}

TEST(ModelInfo, TypesAndTokenizerOfAFile) {
  auto file = info("tiny_models/gguf_q8_0.gguf");
  EXPECT_EQ(file["format"], "GGUF v3");
  EXPECT_EQ(file["architecture"], "llama");
  EXPECT_EQ(file["layers"], 2);
  EXPECT_EQ(file["tokenizer"], "byte-level BPE, 64 tokens, 1 merges, pre-tokenizer gpt-2");
  bool q8_0 = false;
  for (const auto& type : file["types"]) q8_0 |= type["type"] == "Q8_0" && type["bytes"].get<int>() > 0;
  EXPECT_TRUE(q8_0);
}

}  // namespace
}  // namespace kvlapse
