// PreTokenizer: how a text is cut into the pieces that the vocabulary's model sees one at a time: a sequence
// of splits, each applied to the pieces of the one before. Immutable and thread-safe.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/model/split_pattern.h"

namespace kvlapse {

class PreTokenizer {
 public:
  // Which parts of a text a split hands on: the pattern's matches and what lies between them, or one of the
  // two.
  enum class Keep : uint8_t { both, matches, gaps };

  void add(SplitPattern pattern, Keep keep) { splits_.push_back({std::move(pattern), keep}); }
  // Appends the pieces of `text` (valid UTF-8) to `pieces`, as views of it.
  void split(std::string_view text, std::vector<std::string_view>& pieces) const;

 private:
  struct Split {
    SplitPattern pattern;
    Keep keep;
  };
  std::vector<Split> splits_;
};

// The expressions of the byte-level families.
extern const std::string_view kGpt2Pattern, kQwen2Pattern, kLlama3Pattern, kOneNumberPattern;

// By the name that GGUF's tokenizer.ggml.pre gives: gpt-2, smollm, qwen2, llama-bpe and their aliases. Throws
// Error for any other name.
PreTokenizer named_pre_tokenizer(std::string_view name, std::string_view source);

}  // namespace kvlapse
