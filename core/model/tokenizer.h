// Tokenizer: text to ids and back, for tokenizer.json and GGUF vocabularies. Immutable and thread-safe.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvlapse {

enum class SpecialTokens : uint8_t {
  parse,  // special tokens in the text become their single id
  plain,  // ... are ordinary text
};

class Tokenizer {
 public:
  virtual ~Tokenizer() = default;
  virtual int n_vocab() const = 0;
  // Throws Error on invalid UTF-8, or on a character that the vocabulary cannot express (naming both).
  virtual std::vector<int32_t> encode(std::string_view text, SpecialTokens mode) const = 0;
  // Raw bytes of one token, which may be part of a UTF-8 character; special tokens as their text.
  virtual std::string_view token_bytes(int32_t id) const = 0;
  virtual bool is_special(int32_t id) const = 0;
  // Ids that the model's files put before every prompt (a beginning-of-text token); encode() does not add
  // them.
  virtual std::span<const int32_t> prompt_prefix() const { return {}; }
  // One line for people: kind, number of tokens and merges.
  virtual std::string describe() const { return {}; }

  std::string decode(std::span<const int32_t> ids) const;
};

class GgufFile;

// Hugging Face's tokenizer.json: BPE (byte-level, or characters with byte fallback) or WordLevel. What it
// asks for and we do not do is refused by name. Throws Error with file, field, expected and found.
std::unique_ptr<Tokenizer> open_tokenizer_json(const std::filesystem::path& path);
// The vocabulary of a GGUF file: tokenizer.ggml.model gpt2 (byte-level BPE) or llama (SentencePiece's BPE).
std::unique_ptr<Tokenizer> gguf_tokenizer(const GgufFile& file);

// Streams ids out as text without ever splitting a UTF-8 character.
class StreamDecoder {
 public:
  explicit StreamDecoder(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string push(int32_t id);  // text that is complete so far
  std::string finish();          // what remains, invalid bytes as U+FFFD

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace kvlapse
