// The 40 strings of the reference, with special tokens parsed and as plain text, and back.
#include <gtest/gtest.h>

#include <chrono>
#include <cstring>

#include "core/model/gguf_file.h"
#include "core/model/tokenizer.h"
#include "tests/support/smollm2.h"

namespace kvlapse {
namespace {

template <typename T>
std::vector<T> values(const TensorFile& file, std::string_view name) {
  const TensorView& tensor = file.get(name);
  std::vector<T> out(tensor.elements());
  std::memcpy(out.data(), tensor.data, tensor.bytes);
  return out;
}

template <typename T>
std::vector<T> ragged(const TensorFile& file, const std::string& name, size_t i) {
  auto all = values<T>(file, name);
  auto offsets = values<int64_t>(file, name + "_off");
  return {all.begin() + offsets[i], all.begin() + offsets[i + 1]};
}

class SmolLm2Tokenizer : public ::testing::Test {
 protected:
  void SetUp() override {
    KVLAPSE_NEEDS_SMOLLM2();
    file_ = std::make_unique<GgufFile>(kSmolLm2);
    tokenizer_ = gguf_tokenizer(*file_);
  }
  std::unique_ptr<GgufFile> file_;
  std::unique_ptr<Tokenizer> tokenizer_;
};

TEST_F(SmolLm2Tokenizer, GoldenStrings) {
  auto golden = open_safetensors(KVLAPSE_TEST_DATA "/smollm2/tokenizer.safetensors");
  size_t n = golden->get("text_off").elements() - 1;
  ASSERT_EQ(n, 40u);
  for (size_t i = 0; i < n; ++i) {
    auto bytes = ragged<char>(*golden, "text", i);
    std::string text(bytes.begin(), bytes.end());
    auto ids = tokenizer_->encode(text, SpecialTokens::parse);
    EXPECT_EQ(ids, ragged<int32_t>(*golden, "ids", i)) << text;
    EXPECT_EQ(tokenizer_->encode(text, SpecialTokens::plain), ragged<int32_t>(*golden, "ids_plain", i))
        << text;
    auto decoded = ragged<char>(*golden, "decoded", i);
    EXPECT_EQ(tokenizer_->decode(ids), std::string(decoded.begin(), decoded.end()));
  }
}

TEST_F(SmolLm2Tokenizer, StreamingNeverSplitsACharacter) {
  std::string text = "résumé — 東京 🙂👩‍👩‍👧 ½";
  StreamDecoder stream(*tokenizer_);
  std::string joined;
  for (int32_t id : tokenizer_->encode(text, SpecialTokens::plain)) {
    std::string part = stream.push(id);
    for (char c : part.substr(0, 1))
      EXPECT_NE(static_cast<uint8_t>(c) & 0xc0, 0x80) << "starts inside a character";
    joined += part;
  }
  EXPECT_EQ(joined + stream.finish(), text);
}

TEST_F(SmolLm2Tokenizer, AMegabyteInHalfASecond) {
  std::string text;
  for (int i = 0; text.size() < 1'000'000; ++i)
    text += "Line " + std::to_string(i * 7919) + ": the quick brown fox's résumé, page " + std::to_string(i) +
            ".\n";
  auto start = std::chrono::steady_clock::now();
  auto ids = tokenizer_->encode(text, SpecialTokens::parse);
  double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  EXPECT_EQ(tokenizer_->decode(ids), text);
  RecordProperty("seconds", std::to_string(seconds));
  EXPECT_LT(seconds, 2.0) << "half a second on a quiet machine; the bound leaves room for a busy one";
  // One piece without a place to cut: merging must not be quadratic.
  std::string one_piece;
  for (int i = 0; one_piece.size() < 1'000'000; ++i)
    one_piece += static_cast<char>('a' + (i * i + i / 3) % 26);
  start = std::chrono::steady_clock::now();
  EXPECT_EQ(tokenizer_->decode(tokenizer_->encode(one_piece, SpecialTokens::parse)), one_piece);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 4.0);
}

}  // namespace
}  // namespace kvlapse
