#include "core/model/pipeline_tokenizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <unordered_map>

#include "core/base/error.h"
#include "core/model/utf8.h"

namespace kvlapse {
namespace {

constexpr size_t kLongestCachedPiece = 64;

bool is_ascii(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

std::string compose(std::string_view text) {
  utf8proc_uint8_t* composed = nullptr;
  auto length = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                             static_cast<utf8proc_ssize_t>(text.size()), &composed,
                             static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  if (length < 0) fail("text: expected UTF-8 that can be normalised, found: {}", utf8proc_errmsg(length));
  std::string out(reinterpret_cast<const char*>(composed), static_cast<size_t>(length));
  std::free(composed);
  return out;
}

std::string replace_spaces(std::string_view text, std::string_view space) {
  std::string out;
  for (char c : text)
    if (c == ' ') {
      out += space;
    } else {
      out += c;
    }
  return out;
}

class PipelineTokenizer final : public Tokenizer {
 public:
  explicit PipelineTokenizer(TokenizerParts parts) : parts_(std::move(parts)) {}

  int n_vocab() const override { return static_cast<int>(parts_.tokens.size()); }
  std::string_view token_bytes(int32_t id) const override { return parts_.tokens[checked(id)]; }
  bool is_special(int32_t id) const override { return parts_.special[checked(id)]; }
  std::span<const int32_t> prompt_prefix() const override { return parts_.prompt_prefix; }
  std::string describe() const override { return parts_.description; }

  std::vector<int32_t> encode(std::string_view text, SpecialTokens mode) const override {
    if (size_t bad = find_invalid_utf8(text); bad != std::string_view::npos)
      fail("text: expected valid UTF-8, found byte 0x{:02x} at offset {}", static_cast<uint8_t>(text[bad]),
           bad);
    Encoding encoding(*this, mode == SpecialTokens::parse);
    return encoding.run(text);
  }

 private:
  size_t checked(int32_t id) const {
    if (id < 0 || static_cast<size_t>(id) >= parts_.tokens.size())
      fail("token: expected an id below {}, found {}", parts_.tokens.size(), id);
    return static_cast<size_t>(id);
  }

  // One call's state. Pieces repeat a lot, so each is merged once.
  class Encoding {
   public:
    Encoding(const PipelineTokenizer& tokenizer, bool parse_special)
        : parts_(tokenizer.parts_), parse_special_(parse_special) {}

    std::vector<int32_t> run(std::string_view text) {
      parts_.raw_added.split(
          text, parse_special_,
          [&](std::string_view stretch) { on_stretch(stretch, stretch.data() == text.data()); },
          [&](const AddedToken& token) { ids_.push_back(token.id); });
      return std::move(ids_);
    }

   private:
    void on_stretch(std::string_view stretch, bool first) {
      std::string_view rewritten = rewrite(stretch, first);
      parts_.rewritten_added.split(
          rewritten, parse_special_, [&](std::string_view text) { on_text(text); },
          [&](const AddedToken& token) { ids_.push_back(token.id); });
    }

    std::string_view rewrite(std::string_view stretch, bool first) {
      const TextRewriting& r = parts_.rewriting;
      if (r.changes_nothing()) return stretch;
      std::string text(stretch);
      if (r.compose && !is_ascii(text)) text = compose(text);
      if (!r.space.empty()) text = replace_spaces(text, r.space);
      bool prefix = r.prefix == TextRewriting::Prefix::every_stretch ||
                    (r.prefix == TextRewriting::Prefix::first_stretch && first);
      if (prefix && !(r.prefix_unless_there && text.starts_with(r.prefix_text)))
        text.insert(0, r.prefix_text);
      return kept_.emplace_back(std::move(text));
    }

    void on_text(std::string_view text) {
      pieces_.clear();
      parts_.pre_tokenizer.split(text, pieces_);
      for (std::string_view piece : pieces_) on_piece(piece);
    }

    void on_piece(std::string_view piece) {
      size_t begin = ids_.size();
      if (piece.size() > kLongestCachedPiece) return parts_.model->encode(piece, ids_);
      auto [at, is_new] = seen_.try_emplace(piece);
      if (is_new) {
        parts_.model->encode(piece, ids_);
        at->second = {begin, ids_.size() - begin};
      } else {
        auto [from, count] = at->second;
        for (size_t i = 0; i < count; ++i) ids_.push_back(ids_[from + i]);
      }
    }

    struct Range {
      size_t begin = 0, count = 0;
    };
    const TokenizerParts& parts_;
    bool parse_special_;
    std::vector<int32_t> ids_;
    std::deque<std::string> kept_;  // rewritten stretches, which pieces point into
    std::vector<std::string_view> pieces_;
    std::unordered_map<std::string_view, Range> seen_;  // ids of a piece within ids_
  };

  TokenizerParts parts_;
};

}  // namespace

std::unique_ptr<Tokenizer> make_pipeline_tokenizer(TokenizerParts parts) {
  return std::make_unique<PipelineTokenizer>(std::move(parts));
}

}  // namespace kvlapse
