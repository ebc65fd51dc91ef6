// TokenModel: how one piece of text becomes ids: byte-level BPE, BPE over characters with byte fallback
// (merges, or SentencePiece's scores), or a list of words. Immutable and thread-safe.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace kvlapse {

using Vocabulary = std::unordered_map<std::string, int32_t>;

class TokenModel {
 public:
  virtual ~TokenModel() = default;
  // Appends the ids of `piece` (valid UTF-8, not empty). Throws Error when the vocabulary cannot express it.
  virtual void encode(std::string_view piece, std::vector<int32_t>& ids) const = 0;
};

// A merge of GPT-2's kind: left and right become one token; the earlier in the list, the sooner.
struct Merge {
  int32_t left, right, result;
};

struct ByteLevelBpe {
  Vocabulary vocabulary;  // keys are bytes, not the printable alphabet
  std::vector<Merge> merges;
  bool whole_pieces_first = false;  // Llama-3: a piece that is a token is not merged up to it
};
// Bytes without a token are dropped without a sound, as the reference does.
std::unique_ptr<TokenModel> make_byte_level_bpe(ByteLevelBpe parts);

struct CharacterBpe {
  Vocabulary vocabulary;
  std::vector<Merge> merges;
  int32_t unknown = -1;        // for characters without token and bytes; -1: an error
  bool byte_fallback = false;  // <0x00> .. <0xFF>
  bool fuse_unknown = false;   // a run of unknown characters is one token
  std::string source;          // file, for messages
};
std::unique_ptr<TokenModel> make_character_bpe(CharacterBpe parts);

struct SentencePieceBpe {
  Vocabulary vocabulary;      // of tokens that text may become: neither control, nor unknown, nor bytes
  std::vector<float> scores;  // by id; the highest merges first
  std::vector<int32_t> byte_tokens;  // 256, -1 = none
  int32_t unknown = -1;
  std::string source;
};
std::unique_ptr<TokenModel> make_sentence_piece_bpe(SentencePieceBpe parts);

struct WordList {
  Vocabulary vocabulary;
  int32_t unknown = -1;
  std::string source;
};
std::unique_ptr<TokenModel> make_word_list(WordList parts);

}  // namespace kvlapse
