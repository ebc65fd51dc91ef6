// The vocabulary that a GGUF file carries (keys tokenizer.ggml.*). Source of the meaning of types and of the
// SentencePiece rules: llama.cpp, llama-vocab.cpp.
#include "core/base/error.h"
#include "core/model/byte_level.h"
#include "core/model/gguf_file.h"
#include "core/model/json_document.h"
#include "core/model/pipeline_tokenizer.h"

namespace kvlapse {
namespace {

constexpr std::string_view kMetaspace = "\xe2\x96\x81";  // U+2581 stands for a space
enum TokenKind : int64_t {
  kNormal = 1,
  kUnknown = 2,
  kControl = 3,
  kUserDefined = 4,
  kUnused = 5,
  kByte = 6
};

using Strings = std::vector<std::string_view>;
using Integers = std::vector<int64_t>;
using Numbers = std::vector<double>;

class GgufTokenizerReader {
 public:
  explicit GgufTokenizerReader(const GgufFile& file)
      : file_(file), texts_(file.value<Strings>("tokenizer.ggml.tokens")) {
    if (texts_.empty()) fail("{}: tokenizer.ggml.tokens: expected tokens, found none", file.describe());
    kinds_.assign(texts_.size(), kNormal);
    if (const auto* kinds = file.find_value<Integers>("tokenizer.ggml.token_type")) {
      check_count("tokenizer.ggml.token_type", kinds->size());
      kinds_ = *kinds;
    }
  }

  std::unique_ptr<Tokenizer> read() {
    auto model = file_.value<std::string_view>("tokenizer.ggml.model");
    for (std::string_view text : texts_) parts_.tokens.emplace_back(text);
    add_special_tokens();
    if (model == "gpt2") {
      read_byte_level();
    } else if (model == "llama") {
      read_sentence_piece();
    } else {
      fail("{}: tokenizer.ggml.model: expected gpt2 or llama, found '{}'", file_.describe(), quotable(model));
    }
    return make_pipeline_tokenizer(std::move(parts_));
  }

 private:
  bool is_text(size_t id) const { return kinds_[id] == kNormal || kinds_[id] == kUserDefined; }

  void check_count(std::string_view key, size_t found) const {
    if (found != texts_.size())
      fail("{}: {}: expected {} elements, one a token, found {}", file_.describe(), key, texts_.size(),
           found);
  }

  void add_special_tokens() {
    parts_.special.resize(texts_.size());
    for (size_t id = 0; id < texts_.size(); ++id) {
      bool special = kinds_[id] == kControl || kinds_[id] == kUnknown;
      parts_.special[id] = special;
      if (special || kinds_[id] == kUserDefined)
        parts_.raw_added.add({std::string(texts_[id]), static_cast<int32_t>(id), special, false, false});
    }
  }

  // The id that a key names; -1 when the file has no such key.
  int32_t token_id(std::string_view key) const {
    const auto* id = file_.find_value<int64_t>(key);
    if (!id) return -1;
    if (*id < 0 || static_cast<size_t>(*id) >= texts_.size())
      fail("{}: {}: expected an id below {}, found {}", file_.describe(), key, texts_.size(), *id);
    return static_cast<int32_t>(*id);
  }

  bool flag(std::string_view key, bool otherwise) const {
    const bool* value = file_.find_value<bool>(key);
    return value ? *value : otherwise;
  }

  void add_prompt_prefix(bool by_default) {
    int32_t bos = token_id("tokenizer.ggml.bos_token_id");
    if (flag("tokenizer.ggml.add_bos_token", by_default) && bos >= 0) parts_.prompt_prefix.push_back(bos);
  }

  std::vector<Merge> read_merges() const {
    std::unordered_map<std::string_view, int32_t> ids;
    for (size_t id = 0; id < texts_.size(); ++id) ids.emplace(texts_[id], static_cast<int32_t>(id));
    const auto& all = file_.value<Strings>("tokenizer.ggml.merges");
    std::vector<Merge> merges;
    merges.reserve(all.size());
    std::string both;
    for (size_t i = 0; i < all.size(); ++i) {
      size_t space = all[i].find(' ', 1);
      if (space == std::string_view::npos || space + 1 == all[i].size())
        fail("{}: tokenizer.ggml.merges[{}]: expected two tokens with a space between, found '{}'",
             file_.describe(), i, quotable(all[i]));
      std::string_view left = all[i].substr(0, space), right = all[i].substr(space + 1);
      both.assign(left).append(right);
      auto id = [&](std::string_view text) {
        auto found = ids.find(text);
        if (found == ids.end())
          fail("{}: tokenizer.ggml.merges[{}]: expected tokens of the vocabulary, found '{}'",
               file_.describe(), i, quotable(text));
        return found->second;
      };
      merges.push_back({id(left), id(right), id(both)});
    }
    return merges;
  }

  void read_byte_level() {
    auto pre = file_.value<std::string_view>("tokenizer.ggml.pre");
    std::string where = file_.describe() + ": tokenizer.ggml.pre";
    parts_.pre_tokenizer = named_pre_tokenizer(pre, where);
    bool llama3 = pre.starts_with("llama");
    // Qwen's own tokenizer composes its input; llama.cpp does not.
    parts_.rewriting.compose = pre.find("qwen") != std::string_view::npos;
    if (flag("tokenizer.ggml.add_space_prefix", false))
      fail("{}: tokenizer.ggml.add_space_prefix: expected false with gpt2, found true", file_.describe());

    ByteLevelBpe bpe;
    bpe.merges = read_merges();
    bpe.whole_pieces_first = llama3;
    size_t n_merges = bpe.merges.size();
    for (size_t id = 0; id < texts_.size(); ++id) {
      if (kinds_[id] != kNormal) continue;
      auto bytes = byte_level_decode(texts_[id]);
      if (!bytes) continue;
      parts_.tokens[id] = *bytes;
      bpe.vocabulary.emplace(std::move(*bytes), static_cast<int32_t>(id));
    }
    parts_.model = make_byte_level_bpe(std::move(bpe));
    add_prompt_prefix(llama3);
    parts_.description =
        fmt::format("byte-level BPE, {} tokens, {} merges, pre-tokenizer {}", texts_.size(), n_merges, pre);
  }

  void read_sentence_piece() {
    SentencePieceBpe bpe;
    const auto& scores = file_.value<Numbers>("tokenizer.ggml.scores");
    check_count("tokenizer.ggml.scores", scores.size());
    bpe.scores.assign(scores.begin(), scores.end());
    bpe.byte_tokens.assign(256, -1);
    bpe.unknown = token_id("tokenizer.ggml.unknown_token_id");
    bpe.source = file_.describe();
    for (size_t id = 0; id < texts_.size(); ++id) {
      auto token = static_cast<int32_t>(id);
      if (kinds_[id] == kByte) {
        const std::optional<uint8_t> byte = byte_token(texts_[id]);
        if (!byte)
          fail("{}: tokenizer.ggml.tokens[{}]: expected <0x00> to <0xFF> for a byte, found '{}'",
               file_.describe(), id, quotable(texts_[id]));
        bpe.byte_tokens[*byte] = token;
        parts_.tokens[id] = std::string(1, static_cast<char>(*byte));
      } else if (is_text(id)) {
        bpe.vocabulary.emplace(texts_[id], token);
        std::string& bytes = parts_.tokens[id];
        for (size_t at = 0; (at = bytes.find(kMetaspace, at)) != std::string::npos; ++at)
          bytes.replace(at, kMetaspace.size(), " ");
      }
    }
    parts_.model = make_sentence_piece_bpe(std::move(bpe));
    parts_.rewriting.space = kMetaspace;
    if (flag("tokenizer.ggml.add_space_prefix", true)) {
      parts_.rewriting.prefix = TextRewriting::Prefix::every_stretch;
      parts_.rewriting.prefix_text = kMetaspace;
    }
    add_prompt_prefix(true);
    parts_.description = fmt::format("SentencePiece BPE, {} tokens", texts_.size());
  }

  const GgufFile& file_;
  const Strings& texts_;
  Integers kinds_;
  TokenizerParts parts_;
};

}  // namespace

std::unique_ptr<Tokenizer> gguf_tokenizer(const GgufFile& file) {
  return GgufTokenizerReader(file).read();
}

}  // namespace kvlapse
