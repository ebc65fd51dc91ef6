// The tokenizer that every format is read into: added tokens, normalisation, pre-tokenizer, model. Readers
// fill in the parts; encoding and decoding live here. Immutable and thread-safe.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "core/model/added_tokens.h"
#include "core/model/pre_tokenizer.h"
#include "core/model/token_model.h"
#include "core/model/tokenizer.h"

namespace kvlapse {

// What is done to each stretch of text between added tokens.
struct TextRewriting {
  enum class Prefix : uint8_t { never, first_stretch, every_stretch };

  bool compose = false;           // Unicode NFC
  std::string space;              // replaces ' '; empty: left as it is
  Prefix prefix = Prefix::never;  // whether `prefix_text` is put before it
  std::string prefix_text;
  bool prefix_unless_there = false;  // ... only when the stretch does not begin with it

  bool changes_nothing() const { return !compose && space.empty() && prefix == Prefix::never; }
};

struct TokenizerParts {
  std::string description;          // for people
  std::vector<std::string> tokens;  // bytes of each id; special tokens as their text
  std::vector<bool> special;        // by id
  std::vector<int32_t> prompt_prefix;
  AddedTokens raw_added;        // matched before the text is rewritten
  AddedTokens rewritten_added;  // matched after
  TextRewriting rewriting;
  PreTokenizer pre_tokenizer;
  std::unique_ptr<TokenModel> model;
};

std::unique_ptr<Tokenizer> make_pipeline_tokenizer(TokenizerParts parts);

}  // namespace kvlapse
