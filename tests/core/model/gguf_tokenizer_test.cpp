#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "core/model/gguf_file.h"
#include "core/model/tokenizer.h"
#include "tests/support/error_text.h"
#include "tests/support/gguf_builder.h"

namespace kvlapse {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::error_text;
using testing::GgufBuilder;
using ::testing::HasSubstr;
using testing::TemporaryFile;

std::unique_ptr<Tokenizer> open(const GgufBuilder& builder) {
  TemporaryFile file(builder.bytes());
  return gguf_tokenizer(GgufFile(file.path()));
}

GgufBuilder byte_level(const std::string& pre = "smollm") {
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "gpt2").string("tokenizer.ggml.pre", pre);
  builder.strings("tokenizer.ggml.tokens", {"<|im_end|>", "a", "b", "ab", "1", "11"});
  builder.i32s("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 1});
  return builder;
}

TEST(GgufTokenizer, PreTokenizersDifferInNumbers) {
  auto smollm = open(byte_level().strings("tokenizer.ggml.merges", {"a b", "1 1"}));
  EXPECT_THAT(smollm->encode("ab11<|im_end|>", SpecialTokens::parse), ElementsAre(3, 4, 4, 0));
  auto gpt2 = open(byte_level("gpt-2").strings("tokenizer.ggml.merges", {"a b", "1 1"}));
  EXPECT_THAT(gpt2->encode("ab11", SpecialTokens::parse), ElementsAre(3, 5));
  auto llama3 = open(byte_level("llama-bpe").strings("tokenizer.ggml.merges", {"a b", "1 1"}));
  EXPECT_THAT(llama3->encode("1111", SpecialTokens::parse), ElementsAre(5, 4, 4));  // 111 | 1
  auto qwen2 = open(byte_level("qwen2").strings("tokenizer.ggml.merges", {"a b", "1 1"}));
  EXPECT_THAT(qwen2->encode("11", SpecialTokens::parse), ElementsAre(4, 4));
}

TEST(GgufTokenizer, SentencePieceMergesByScoreAndFallsBackToBytes) {
  GgufBuilder builder;
  builder.string("tokenizer.ggml.model", "llama");
  builder.strings("tokenizer.ggml.tokens",
                  {"<unk>", "<s>", "<0xC3>", "<0xA9>", "▁", "a", "b", "▁a", "ab", "<"});
  builder.i32s("tokenizer.ggml.token_type", {2, 3, 6, 6, 1, 1, 1, 1, 1, 1});
  builder.floats("tokenizer.ggml.scores", {0, 0, 0, 0, -5, -6, -7, -2, -1, -9});
  builder.u32("tokenizer.ggml.bos_token_id", 1).u32("tokenizer.ggml.unknown_token_id", 0);
  auto tokenizer = open(builder);
  EXPECT_THAT(tokenizer->encode("ab", SpecialTokens::parse), ElementsAre(4, 8));  // "ab" scores above "▁a"
  EXPECT_THAT(tokenizer->encode("a é", SpecialTokens::parse), ElementsAre(7, 4, 2, 3));
  EXPECT_THAT(tokenizer->encode("<s>a", SpecialTokens::parse), ElementsAre(1, 7));
  EXPECT_THAT(tokenizer->encode("<s", SpecialTokens::plain), ElementsAre(4, 9, 0));
  EXPECT_THAT(tokenizer->prompt_prefix(), ElementsAre(1));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{7, 2, 3}), " aé");
}

TEST(GgufTokenizer, RefusesBadVocabularies) {
  auto refusal = [](const GgufBuilder& builder) { return error_text([&] { open(builder); }); };
  EXPECT_THAT(refusal(byte_level().strings("tokenizer.ggml.merges", {"a b", "a z"})),
              AllOf(HasSubstr("tokenizer.ggml.merges[1]"), HasSubstr("found 'z'")));
  EXPECT_THAT(refusal(byte_level().strings("tokenizer.ggml.merges", {"ab"})), HasSubstr("found 'ab'"));
  EXPECT_THAT(refusal(byte_level()), HasSubstr("'tokenizer.ggml.merges' is missing"));
  EXPECT_THAT(refusal(byte_level("tekken").strings("tokenizer.ggml.merges", {})),
              HasSubstr("found 'tekken'"));
  EXPECT_THAT(
      refusal(GgufBuilder().string("tokenizer.ggml.model", "bert").strings("tokenizer.ggml.tokens", {"a"})),
      HasSubstr("found 'bert'"));
  EXPECT_THAT(
      refusal(GgufBuilder().string("tokenizer.ggml.model", "gpt2").strings("tokenizer.ggml.tokens", {})),
      HasSubstr("found none"));
  EXPECT_THAT(
      refusal(
          GgufBuilder().strings("tokenizer.ggml.tokens", {"a"}).i32s("tokenizer.ggml.token_type", {1, 1})),
      HasSubstr("expected 1 elements, one a token, found 2"));
  for (const char* text : {"<0x-1>", "<0x+1>", "<0x 1>", "<0x1 >", "<0xG0>", "<0x0A.", "<0x0A"})
    EXPECT_THAT(refusal(GgufBuilder()
                            .string("tokenizer.ggml.model", "llama")
                            .strings("tokenizer.ggml.tokens", {text})
                            .i32s("tokenizer.ggml.token_type", {6})
                            .floats("tokenizer.ggml.scores", {0})),
                AllOf(HasSubstr("tokenizer.ggml.tokens[0]"), HasSubstr("expected <0x00> to <0xFF>")));
}

}  // namespace
}  // namespace kvlapse
