#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "core/model/tokenizer.h"
#include "tests/support/error_text.h"
#include "tests/support/gguf_builder.h"

namespace kvlapse {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using testing::error_text;
using ::testing::HasSubstr;
using testing::TemporaryFile;

json byte_level() {
  return json::parse(R"j({
    "added_tokens": [
      {"id": 0, "content": "<|end|>", "special": true, "normalized": false},
      {"id": 7, "content": "<think>", "special": false, "normalized": false}],
    "normalizer": null,
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "use_regex": true},
    "decoder": {"type": "ByteLevel"},
    "post_processor": null,
    "model": {"type": "BPE", "vocab": {"<|end|>": 0, "a": 1, "b": 2, "ab": 3, "Ġ": 4, "Ġa": 5, "abab": 6},
              "merges": ["a b", ["Ġ", "a"], "ab ab"]}
  })j");
}

std::unique_ptr<Tokenizer> open(const json& document) {
  TemporaryFile file(document.dump(), ".json");
  return open_tokenizer_json(file.path());
}

std::string open_error(const json& document) {
  return error_text([&] { open(document); });
}

TEST(TokenizerJson, ByteLevelBpe) {
  auto tokenizer = open(byte_level());
  EXPECT_EQ(tokenizer->n_vocab(), 8);
  EXPECT_THAT(tokenizer->encode("ab ab", SpecialTokens::parse), ElementsAre(3, 4, 3));
  EXPECT_THAT(tokenizer->encode("ababa", SpecialTokens::parse), ElementsAre(6, 1));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{6, 5, 0}), "abab a<|end|>");
  // A byte without a token is dropped.
  EXPECT_THAT(tokenizer->encode("azb", SpecialTokens::parse), ElementsAre(3));
}

TEST(TokenizerJson, PlainModeKeepsOnlySpecialTokensAsText) {
  auto tokenizer = open(byte_level());
  EXPECT_THAT(tokenizer->encode("a<|end|><think>b", SpecialTokens::parse), ElementsAre(1, 0, 7, 2));
  EXPECT_THAT(tokenizer->encode("a<|end|><think>b", SpecialTokens::plain), ElementsAre(1, 7, 2));
  EXPECT_TRUE(tokenizer->is_special(0));
  EXPECT_FALSE(tokenizer->is_special(7));
}

TEST(TokenizerJson, IgnoreMergesTakesAWholePieceFirst) {
  json document = byte_level();
  document["model"]["vocab"]["ba"] = 8;
  EXPECT_THAT(open(document)->encode("ba", SpecialTokens::parse), ElementsAre(2, 1));
  document["model"]["ignore_merges"] = true;
  EXPECT_THAT(open(document)->encode("ba", SpecialTokens::parse), ElementsAre(8));
}

TEST(TokenizerJson, BeginningOfTextIsAPromptPrefix) {
  json document = byte_level();
  document["post_processor"] = json::parse(R"j({"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [], "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}}})j");
  auto tokenizer = open(document);
  EXPECT_THAT(tokenizer->prompt_prefix(), ElementsAre(0));
  EXPECT_THAT(tokenizer->encode("a", SpecialTokens::parse), ElementsAre(1));
}

TEST(TokenizerJson, CompositionBeforeTheVocabularyIsAsked) {
  json document = byte_level();
  document["normalizer"] = {{"type", "NFC"}};
  document["model"]["vocab"]["Ã"] = 8;
  document["model"]["vocab"]["©"] = 9;
  EXPECT_THAT(open(document)->encode("e\u0301", SpecialTokens::parse), ElementsAre(8, 9));  // U+00E9: C3 A9
}

TEST(TokenizerJson, WordsAreCharactersForTheBuiltInKind) {
  json document = json::parse(R"j({
    "added_tokens": [{"id": 0, "content": "<|end|>", "special": true, "normalized": false}],
    "normalizer": null, "post_processor": null, "decoder": {"type": "Fuse"},
    "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "[\\s\\S]"}, "behavior": "Isolated", "invert": false},
    "model": {"type": "WordLevel", "vocab": {"<|end|>": 0, "\n": 1, "x": 2, " ": 3}, "unk_token": "<|unknown|>"}
  })j");
  auto tokenizer = open(document);
  EXPECT_THAT(tokenizer->encode("x x\n<|end|>", SpecialTokens::parse), ElementsAre(2, 3, 2, 1, 0));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{2, 1}), "x\n");
  EXPECT_THAT(error_text([&] { tokenizer->encode("xé", SpecialTokens::parse); }),
              HasSubstr("expected a token for 'é'"));
}

TEST(TokenizerJson, CharactersWithByteFallback) {
  json document = json::parse(R"j({
    "added_tokens": [], "post_processor": null, "pre_tokenizer": null, "decoder": null,
    "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"},
      {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]},
    "model": {"type": "BPE", "byte_fallback": true, "fuse_unk": true, "unk_token": "<unk>",
      "vocab": {"<unk>": 0, "<0xC3>": 1, "<0xA9>": 2, "▁": 3, "a": 4, "▁a": 5}, "merges": ["▁ a"]}
  })j");
  auto tokenizer = open(document);
  EXPECT_THAT(tokenizer->encode("a aé", SpecialTokens::parse), ElementsAre(5, 5, 1, 2));
  EXPECT_THAT(tokenizer->encode("xy", SpecialTokens::parse), ElementsAre(3, 0));
  EXPECT_EQ(tokenizer->decode(std::vector<int32_t>{5, 1, 2}), " aé");
}

TEST(TokenizerJson, InvalidUtf8IsRefusedWithItsPlace) {
  auto tokenizer = open(byte_level());
  EXPECT_THAT(error_text([&] { tokenizer->encode("ab\xff", SpecialTokens::parse); }),
              HasSubstr("valid UTF-8, found byte 0xff at offset 2"));
  for (std::string_view bad : {"\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "\xe2\x82", "\x80"})
    error_text([&] { tokenizer->encode(bad, SpecialTokens::parse); });
}

TEST(TokenizerJson, StreamsInvalidBytesAsReplacements) {
  json document = byte_level();
  document["model"]["vocab"]["â"] = 8;  // byte E2
  auto tokenizer = open(document);
  StreamDecoder stream(*tokenizer);
  EXPECT_EQ(stream.push(8), "");
  EXPECT_EQ(stream.push(1), "\ufffda");
  EXPECT_EQ(stream.push(8), "");
  EXPECT_EQ(stream.finish(), "\ufffd");
}

TEST(TokenizerJson, RefusesBadFiles) {
  TemporaryFile broken("{\"model\": ", ".json");
  EXPECT_THAT(error_text([&] { open_tokenizer_json(broken.path()); }), HasSubstr("expected JSON"));
  auto with = [](auto change) {
    json document = byte_level();
    change(document);
    return open_error(document);
  };
  EXPECT_THAT(with([](json& d) { d["model"]["merges"].push_back("a z"); }),
              AllOf(HasSubstr("model.merges[3]"), HasSubstr("expected tokens of the vocabulary, found 'z'")));
  EXPECT_THAT(with([](json& d) { d["model"]["merges"].push_back("b b"); }), HasSubstr("found 'bb'"));
  EXPECT_THAT(with([](json& d) { d["model"]["merges"].push_back(7); }),
              HasSubstr("a merge of two tokens, found 7"));
  EXPECT_THAT(with([](json& d) { d["model"]["vocab"]["x"] = 1; }), HasSubstr("id 1: expected one token"));
  EXPECT_THAT(with([](json& d) { d["model"]["vocab"]["x"] = -1; }), HasSubstr("found -1"));
  EXPECT_THAT(with([](json& d) { d["model"]["vocab"]["x"] = 399999; }), HasSubstr("without large gaps"));
  EXPECT_THAT(with([](json& d) { d["model"]["vocab"] = json::object(); }),
              HasSubstr("expected tokens, found none"));
  EXPECT_THAT(with([](json& d) { d["model"]["type"] = "Unigram"; }), HasSubstr("found 'Unigram'"));
  EXPECT_THAT(with([](json& d) {
                d["normalizer"] = {{"type", "Lowercase"}};
              }),
              HasSubstr("found 'Lowercase'"));
  EXPECT_THAT(with([](json& d) {
                d["pre_tokenizer"] = {{"type", "BertPreTokenizer"}};
              }),
              HasSubstr("found 'BertPreTokenizer'"));
  EXPECT_THAT(with([](json& d) { d["model"]["dropout"] = 0.1; }),
              HasSubstr("dropout: expected null or 0, found 0.1"));
  EXPECT_THAT(with([](json& d) { d.erase("model"); }), HasSubstr("expected a field 'model'"));
  EXPECT_THAT(
      with([](json& d) {
        d["pre_tokenizer"] = {{"type", "Split"}, {"pattern", {{"Regex", "(a"}}}, {"behavior", "Isolated"}};
      }),
      HasSubstr("expected a regular expression, found '(a'"));
}

TEST(TokenizerJson, AHostileExpressionEndsInAnError) {
  json document = byte_level();
  document["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"Regex", "(a|a)*c"}}}, {"behavior", "Isolated"}};
  auto tokenizer = open(document);
  EXPECT_THAT(error_text([&] { tokenizer->encode(std::string(64, 'a') + "xc", SpecialTokens::parse); }),
              HasSubstr("failed"));
}

}  // namespace
}  // namespace kvlapse
