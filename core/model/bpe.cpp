// Byte-pair encoding with a priority queue: symbols form a linked list, the queue holds candidate merges by
// rank and position, stale candidates are recognised by the symbols they name. O(n log n) for a piece of n
// symbols.
#include <algorithm>
#include <array>
#include <limits>
#include <queue>

#include "core/base/error.h"
#include "core/model/token_model.h"
#include "core/model/utf8.h"

namespace kvlapse {
namespace {

// (left, right) -> (rank, result), open addressing: the inner loop of encoding is this look-up.
class MergeTable {
 public:
  explicit MergeTable(const std::vector<Merge>& merges) {
    size_t capacity = 16;
    while (capacity < 2 * merges.size()) capacity *= 2;
    entries_.resize(capacity);
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      Entry& entry = entries_[slot(merges[rank].left, merges[rank].right)];
      if (entry.left < 0)  // of a repeated merge the first counts
        entry = {merges[rank].left, merges[rank].right, static_cast<int32_t>(rank), merges[rank].result};
    }
  }

  struct Entry {
    int32_t left = -1, right = -1, rank = 0, result = 0;
  };
  const Entry* find(int32_t left, int32_t right) const {
    const Entry& entry = entries_[slot(left, right)];
    return entry.left < 0 ? nullptr : &entry;
  }

 private:
  size_t slot(int32_t left, int32_t right) const {
    uint64_t key = (uint64_t{static_cast<uint32_t>(left)} << 32) | static_cast<uint32_t>(right);
    size_t at = (key * 0x9e3779b97f4a7c15ull) >> 20;
    for (;; ++at) {
      at &= entries_.size() - 1;
      if (entries_[at].left < 0 || (entries_[at].left == left && entries_[at].right == right)) return at;
    }
  }

  std::vector<Entry> entries_;
};

struct Symbol {
  int32_t id;
  int32_t previous, next;  // indices, -1 = none
};

struct Candidate {
  int32_t rank, left_symbol, left_id, right_id, result;
  bool operator>(const Candidate& other) const {
    return rank != other.rank ? rank > other.rank : left_symbol > other.left_symbol;
  }
};

// Merges `ids` in place.
void merge_all(const MergeTable& merges, std::vector<int32_t>& ids) {
  std::vector<Symbol> symbols(ids.size());
  std::vector<Candidate> heap;
  auto consider = [&](int32_t left) {
    int32_t right = symbols[left].next;
    if (right < 0) return;
    if (const auto* merge = merges.find(symbols[left].id, symbols[right].id))
      heap.push_back({merge->rank, left, merge->left, merge->right, merge->result});
  };
  auto n = static_cast<int32_t>(ids.size());
  for (int32_t i = 0; i < n; ++i) symbols[i] = {ids[i], i - 1, i + 1 < n ? i + 1 : -1};
  for (int32_t i = 0; i + 1 < n; ++i) consider(i);
  std::make_heap(heap.begin(), heap.end(), std::greater<>());

  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    Candidate best = heap.back();
    heap.pop_back();
    Symbol& left = symbols[best.left_symbol];
    if (left.id != best.left_id || left.next < 0 || symbols[left.next].id != best.right_id) continue;
    Symbol& right = symbols[left.next];
    right.id = -1;  // candidates that name it are stale
    left.id = best.result;
    left.next = right.next;
    if (left.next >= 0) symbols[left.next].previous = best.left_symbol;
    for (int32_t at : {left.previous, best.left_symbol}) {
      if (at < 0) continue;
      size_t before = heap.size();
      consider(at);
      if (heap.size() > before) std::push_heap(heap.begin(), heap.end(), std::greater<>());
    }
  }
  ids.clear();
  for (int32_t i = 0; i >= 0 && n > 0; i = symbols[i].next) ids.push_back(symbols[i].id);
}

class ByteLevelBpeModel final : public TokenModel {
 public:
  explicit ByteLevelBpeModel(ByteLevelBpe parts)
      : merges_(parts.merges),
        vocabulary_(std::move(parts.vocabulary)),
        whole_pieces_first_(parts.whole_pieces_first) {
    for (size_t byte = 0; byte < 256; ++byte) {
      auto found = vocabulary_.find(std::string(1, static_cast<char>(byte)));
      byte_ids_[byte] = found == vocabulary_.end() ? -1 : found->second;
    }
  }

  void encode(std::string_view piece, std::vector<int32_t>& ids) const override {
    if (whole_pieces_first_) {
      if (auto found = vocabulary_.find(std::string(piece)); found != vocabulary_.end()) {
        ids.push_back(found->second);
        return;
      }
    }
    std::vector<int32_t> symbols;
    symbols.reserve(piece.size());
    for (char c : piece)
      if (int32_t id = byte_ids_[static_cast<uint8_t>(c)]; id >= 0) symbols.push_back(id);
    merge_all(merges_, symbols);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }

 private:
  MergeTable merges_;
  Vocabulary vocabulary_;
  std::array<int32_t, 256> byte_ids_{};
  bool whole_pieces_first_;
};

class CharacterBpeModel final : public TokenModel {
 public:
  explicit CharacterBpeModel(CharacterBpe parts) : merges_(parts.merges), parts_(std::move(parts)) {
    byte_ids_.fill(-1);
    if (!parts_.byte_fallback) return;
    for (int byte = 0; byte < 256; ++byte)
      if (auto found = parts_.vocabulary.find(fmt::format("<0x{:02X}>", byte));
          found != parts_.vocabulary.end())
        byte_ids_[byte] = found->second;
  }

  void encode(std::string_view piece, std::vector<int32_t>& ids) const override {
    std::vector<int32_t> symbols;
    symbols.reserve(piece.size());
    for (size_t at = 0; at < piece.size();) {
      size_t length = utf8_length(piece, at);
      append_character(piece.substr(at, length), symbols);
      at += length;
    }
    merge_all(merges_, symbols);
    ids.insert(ids.end(), symbols.begin(), symbols.end());
  }

 private:
  void append_character(std::string_view character, std::vector<int32_t>& symbols) const {
    if (auto found = parts_.vocabulary.find(std::string(character)); found != parts_.vocabulary.end()) {
      symbols.push_back(found->second);
      return;
    }
    bool has_bytes = std::all_of(character.begin(), character.end(),
                                 [&](char c) { return byte_ids_[static_cast<uint8_t>(c)] >= 0; });
    if (has_bytes) {
      for (char c : character) symbols.push_back(byte_ids_[static_cast<uint8_t>(c)]);
      return;
    }
    if (parts_.unknown < 0)
      fail("{}: vocabulary: expected a token for '{}', found none", parts_.source, character);
    if (!parts_.fuse_unknown || symbols.empty() || symbols.back() != parts_.unknown)
      symbols.push_back(parts_.unknown);
  }

  MergeTable merges_;
  CharacterBpe parts_;
  std::array<int32_t, 256> byte_ids_{};
};

// SentencePiece's BPE has no list of merges: any two neighbours whose text is a token may merge, the token of
// the highest score first.
class SentencePieceBpeModel final : public TokenModel {
 public:
  explicit SentencePieceBpeModel(SentencePieceBpe parts) : parts_(std::move(parts)) {}

  void encode(std::string_view piece, std::vector<int32_t>& ids) const override {
    std::vector<Span> spans;
    for (size_t at = 0; at < piece.size();) {
      size_t length = utf8_length(piece, at);
      auto index = static_cast<int32_t>(spans.size());
      spans.push_back({at, length, index - 1, at + length < piece.size() ? index + 1 : -1});
      at += length;
    }
    std::priority_queue<Bigram> queue;
    auto consider = [&](int32_t left) {
      if (left < 0 || spans[left].next < 0) return;
      size_t length = spans[left].length + spans[spans[left].next].length;
      auto found = parts_.vocabulary.find(std::string(piece.substr(spans[left].begin, length)));
      if (found != parts_.vocabulary.end()) queue.push({parts_.scores[found->second], left, length});
    };
    for (int32_t i = 0; i < static_cast<int32_t>(spans.size()); ++i) consider(i);
    while (!queue.empty()) {
      Bigram best = queue.top();
      queue.pop();
      Span& left = spans[best.left];
      if (left.length == 0 || left.next < 0 || left.length + spans[left.next].length != best.length) continue;
      Span& right = spans[left.next];
      left.length = best.length;
      right.length = 0;
      left.next = right.next;
      if (left.next >= 0) spans[left.next].previous = best.left;
      consider(left.previous);
      consider(best.left);
    }
    for (int32_t i = 0; i >= 0 && !spans.empty(); i = spans[i].next)
      append(piece.substr(spans[i].begin, spans[i].length), ids);
  }

 private:
  struct Span {
    size_t begin, length;  // length 0: merged into the one before
    int32_t previous, next;
  };
  struct Bigram {
    float score;
    int32_t left;
    size_t length;
    bool operator<(const Bigram& other) const {
      return score != other.score ? score < other.score : left > other.left;
    }
  };

  void append(std::string_view symbol, std::vector<int32_t>& ids) const {
    if (auto found = parts_.vocabulary.find(std::string(symbol)); found != parts_.vocabulary.end()) {
      ids.push_back(found->second);
      return;
    }
    for (char c : symbol) {
      int32_t id = parts_.byte_tokens[static_cast<uint8_t>(c)];
      if (id < 0) id = parts_.unknown;
      if (id < 0) fail("{}: vocabulary: expected a token for '{}', found none", parts_.source, symbol);
      ids.push_back(id);
    }
  }

  SentencePieceBpe parts_;
};

}  // namespace

std::unique_ptr<TokenModel> make_byte_level_bpe(ByteLevelBpe parts) {
  return std::make_unique<ByteLevelBpeModel>(std::move(parts));
}

std::unique_ptr<TokenModel> make_character_bpe(CharacterBpe parts) {
  return std::make_unique<CharacterBpeModel>(std::move(parts));
}

std::unique_ptr<TokenModel> make_sentence_piece_bpe(SentencePieceBpe parts) {
  return std::make_unique<SentencePieceBpeModel>(std::move(parts));
}

}  // namespace kvlapse
