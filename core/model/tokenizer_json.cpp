// tokenizer.json of Hugging Face's tokenizers library. Read part by part; a type or option that would change
// ids and that is not computed here is refused by field name and value.
#include <algorithm>
#include <set>

#include "core/base/error.h"
#include "core/model/byte_level.h"
#include "core/model/json_document.h"
#include "core/model/pipeline_tokenizer.h"

namespace kvlapse {
namespace {

constexpr size_t kMaxTokens = 4'000'000;
constexpr size_t kMaxGap = 4096;  // unused ids that a vocabulary may have, besides as many as it has tokens
constexpr std::string_view kMetaspace = "\xe2\x96\x81";  // U+2581

// Text (as the file has it) by id, with room for holes; ids are checked.
struct RawVocabulary {
  size_t limit =
      0;  // of ids: follows from how many tokens the file lists, so that one entry cannot ask for gigabytes
  std::vector<std::string> texts;
  std::vector<bool> present;
  Vocabulary ids;

  void add(const std::string& text, int64_t id, const std::string& where) {
    if (id < 0 || static_cast<size_t>(id) >= limit)
      fail("{}: id of '{}': expected 0 to {} (ids without large gaps), found {}", where, quotable(text),
           limit - 1, id);
    auto at = static_cast<size_t>(id);
    if (at >= texts.size()) texts.resize(at + 1), present.resize(at + 1);
    if (present[at] && texts[at] != text)
      fail("{}: id {}: expected one token, found '{}' and '{}'", where, id, quotable(texts[at]),
           quotable(text));
    texts[at] = text;
    present[at] = true;
    ids[text] = static_cast<int32_t>(id);
  }
};

RawVocabulary read_vocabulary(const JsonNode& model, size_t n_added) {
  RawVocabulary vocabulary;
  JsonNode vocab = model.get("vocab");
  if (!vocab.value().is_object()) vocab.refuse("an object of tokens and ids");
  vocabulary.limit = std::min(2 * (vocab.value().size() + n_added) + kMaxGap, kMaxTokens);
  for (const auto& [text, id] : vocab.value().items()) {
    if (!id.is_number_integer())
      JsonNode(id, fmt::format("{} '{}'", vocab.where(), quotable(text))).refuse("an id");
    vocabulary.add(text, id.get<int64_t>(), vocab.where());
  }
  if (vocabulary.texts.empty()) fail("{}: expected tokens, found none", vocab.where());
  return vocabulary;
}

// "a b" or ["a", "b"].
std::pair<std::string, std::string> merge_parts(const JsonNode& merge) {
  const auto& value = merge.value();
  if (value.is_array() && value.size() == 2 && value[0].is_string() && value[1].is_string())
    return {value[0].get<std::string>(), value[1].get<std::string>()};
  if (!value.is_string()) merge.refuse("a merge of two tokens");
  const auto& text = value.get_ref<const std::string&>();
  size_t space = text.find(' ');
  if (space == std::string::npos || space == 0 || space + 1 == text.size())
    merge.refuse("a merge of two tokens");
  return {text.substr(0, space), text.substr(space + 1)};
}

std::vector<Merge> read_merges(const JsonNode& model, const RawVocabulary& vocabulary) {
  JsonNode all = model.get("merges");
  if (!all.value().is_array()) all.refuse("an array of merges");
  std::vector<Merge> merges;
  merges.reserve(all.value().size());
  for (size_t i = 0; i < all.value().size(); ++i) {
    auto where = [&] { return fmt::format("{}[{}]", all.where(), i); };
    auto [left, right] = merge_parts(JsonNode(all.value()[i], where()));
    auto id = [&](const std::string& text) {
      auto found = vocabulary.ids.find(text);
      if (found == vocabulary.ids.end())
        fail("{}: expected tokens of the vocabulary, found '{}'", where(), quotable(text));
      return found->second;
    };
    merges.push_back({id(left), id(right), id(left + right)});
  }
  return merges;
}

void read_added_tokens(const JsonNode& root, RawVocabulary& vocabulary, TokenizerParts& parts) {
  auto added = root.find("added_tokens");
  if (!added) return;
  for (const JsonNode& node : added->elements()) {
    AddedToken token;
    token.text = node.get("content").as_string();
    token.id = static_cast<int32_t>(node.get("id").as_integer(0, static_cast<int64_t>(vocabulary.limit) - 1));
    token.special = node.flag("special", false);
    token.strip_left = node.flag("lstrip", false);
    token.strip_right = node.flag("rstrip", false);
    if (node.flag("single_word", false))
      fail("{}: single_word: expected false, found true ('{}')", node.where(), quotable(token.text));
    vocabulary.add(token.text, token.id, node.where());
    if (token.special) {
      parts.special.resize(std::max(parts.special.size(), vocabulary.texts.size()));
      parts.special[token.id] = true;
    }
    (node.flag("normalized", !token.special) ? parts.rewritten_added : parts.raw_added).add(std::move(token));
  }
}

void read_normalizer(const JsonNode& node, TextRewriting& rewriting) {
  std::string type = node.get("type").as_string();
  if (type == "Sequence") {
    for (const JsonNode& step : node.get("normalizers").elements()) read_normalizer(step, rewriting);
  } else if (type == "NFC") {
    rewriting.compose = true;
  } else if (type == "Prepend") {
    rewriting.prefix = TextRewriting::Prefix::every_stretch;
    rewriting.prefix_text = node.get("prepend").as_string();
  } else if (type == "Replace" && node.get("pattern").text("String", "") == " ") {
    rewriting.space = node.get("content").as_string();
  } else {
    fail("{}: type: expected NFC, Prepend or Replace of a space, found '{}'", node.where(), quotable(type));
  }
}

class PreTokenizerReader {
 public:
  explicit PreTokenizerReader(TokenizerParts& parts) : parts_(parts) {}

  bool byte_level() const { return byte_level_; }

  void read(const JsonNode& node) {
    std::string type = node.get("type").as_string();
    if (type == "Sequence") {
      for (const JsonNode& step : node.get("pretokenizers").elements()) read(step);
      return;
    }
    if (type == "ByteLevel") {
      read_byte_level(node);
    } else if (type == "Split") {
      read_split(node);
    } else if (type == "Digits") {
      bool each = node.flag("individual_digits", false);
      add(std::string(kOneNumberPattern) + (each ? "" : "+"), PreTokenizer::Keep::both, node);
    } else if (type == "Metaspace") {
      read_metaspace(node);
    } else {
      fail("{}: type: expected ByteLevel, Split, Digits, Metaspace or Sequence, found '{}'", node.where(),
           type);
    }
    first_ = false;
  }

 private:
  void add(std::string_view pattern, PreTokenizer::Keep keep, const JsonNode& node) {
    parts_.pre_tokenizer.add(SplitPattern(pattern, node.where()), keep);
  }

  void read_byte_level(const JsonNode& node) {
    byte_level_ = true;
    if (node.flag("add_prefix_space", true)) {
      if (!first_) fail("{}: add_prefix_space: expected false behind another step, found true", node.where());
      parts_.rewriting.prefix = TextRewriting::Prefix::every_stretch;
      parts_.rewriting.prefix_text = " ";
      parts_.rewriting.prefix_unless_there = true;
    }
    if (node.flag("use_regex", true)) add(kGpt2Pattern, PreTokenizer::Keep::both, node);
  }

  void read_split(const JsonNode& node) {
    JsonNode pattern = node.get("pattern");
    std::string expression;
    if (auto regex = pattern.find("Regex")) {
      expression = regex->as_string();
    } else {
      for (char c : pattern.get("String").as_string()) {
        if (static_cast<uint8_t>(c) < 0x80 && !std::isalnum(static_cast<unsigned char>(c)))
          expression += '\\';
        expression += c;
      }
    }
    std::string behavior = node.get("behavior").as_string();
    bool invert = node.flag("invert", false);
    if (behavior == "Isolated") {
      add(expression, PreTokenizer::Keep::both, node);
    } else if (behavior == "Removed") {
      add(expression, invert ? PreTokenizer::Keep::matches : PreTokenizer::Keep::gaps, node);
    } else {
      fail("{}: behavior: expected Isolated or Removed, found '{}'", node.where(), quotable(behavior));
    }
  }

  void read_metaspace(const JsonNode& node) {
    TextRewriting& rewriting = parts_.rewriting;
    rewriting.space = node.text("replacement", kMetaspace);
    rewriting.prefix_text = rewriting.space;
    rewriting.prefix_unless_there = true;
    std::string scheme =
        node.text("prepend_scheme", node.flag("add_prefix_space", true) ? "always" : "never");
    if (scheme == "always") {
      rewriting.prefix = TextRewriting::Prefix::every_stretch;
    } else if (scheme == "first") {
      rewriting.prefix = TextRewriting::Prefix::first_stretch;
    } else if (scheme != "never") {
      fail("{}: prepend_scheme: expected always, first or never, found '{}'", node.where(), quotable(scheme));
    }
    if (node.flag("split", true)) fail("{}: split: expected false, found true", node.where());
  }

  TokenizerParts& parts_;
  bool byte_level_ = false;
  bool first_ = true;
};

// The ids that a TemplateProcessing puts before a text.
void read_post_processor(const JsonNode& node, TokenizerParts& parts) {
  std::string type = node.get("type").as_string();
  if (type == "Sequence") {
    for (const JsonNode& step : node.get("processors").elements()) read_post_processor(step, parts);
  } else if (type == "TemplateProcessing") {
    for (const JsonNode& piece : node.get("single").elements()) {
      if (piece.find("Sequence")) break;
      std::string name = piece.get("SpecialToken").get("id").as_string();
      for (const JsonNode& id : node.get("special_tokens").get(name).get("ids").elements())
        parts.prompt_prefix.push_back(
            static_cast<int32_t>(id.as_integer(0, static_cast<int64_t>(parts.tokens.size()) - 1)));
    }
  } else if (type != "ByteLevel") {
    fail("{}: type: expected TemplateProcessing, ByteLevel or Sequence, found '{}'", node.where(),
         quotable(type));
  }
}

bool has_type(const JsonNode& node, std::string_view type) {
  if (node.text("type", "") == type) return true;
  for (std::string_view list : {"pretokenizers", "decoders"})
    if (auto steps = node.find(list))
      for (const JsonNode& step : steps->elements())
        if (has_type(step, type)) return true;
  return false;
}

// Bytes of a token of a vocabulary of characters: U+2581 is a space, <0x0A> a byte.
std::string character_token_bytes(const std::string& text, bool byte_fallback, std::string_view space) {
  if (byte_fallback)
    if (const std::optional<uint8_t> byte = byte_token(text)) return std::string(1, static_cast<char>(*byte));
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    if (!space.empty() && std::string_view(text).substr(at).starts_with(space)) {
      bytes += ' ';
      at += space.size();
    } else {
      bytes += text[at++];
    }
  }
  return bytes;
}

int32_t unknown_id(const JsonNode& model, const RawVocabulary& vocabulary) {
  auto unknown = model.find("unk_token");
  if (!unknown) return -1;
  auto found = vocabulary.ids.find(unknown->as_string());
  return found == vocabulary.ids.end() ? -1 : found->second;
}

void refuse_options(const JsonNode& model) {
  for (std::string_view option : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (auto value = model.find(option); value && !value->as_string().empty()) value->refuse("null or ''");
  if (auto dropout = model.find("dropout"); dropout && dropout->as_number() != 0)
    dropout->refuse("null or 0");
}

class TokenizerJsonReader {
 public:
  explicit TokenizerJsonReader(const std::filesystem::path& path) : path_(path.string()), document_(path) {}

  std::unique_ptr<Tokenizer> read() {
    JsonNode root = document_.root();
    JsonNode model = root.get("model");
    // Before `type` was written, BPE was the only kind with merges.
    std::string type = model.text("type", model.find("merges") ? "BPE" : "WordLevel");
    if (type != "BPE" && type != "WordLevel")
      fail("{}: type: expected BPE or WordLevel, found '{}'", model.where(), quotable(type));

    auto added = root.find("added_tokens");
    vocabulary_ = read_vocabulary(model, added ? added->value().size() : 0);
    Vocabulary of_model = vocabulary_.ids;
    read_added_tokens(root, vocabulary_, parts_);
    PreTokenizerReader pre_tokenizer(parts_);
    if (auto node = root.find("normalizer")) read_normalizer(*node, parts_.rewriting);
    if (auto node = root.find("pre_tokenizer")) pre_tokenizer.read(*node);
    auto decoder = root.find("decoder");
    bool byte_level = pre_tokenizer.byte_level() || (decoder && has_type(*decoder, "ByteLevel"));

    size_t n_merges = 0;
    if (type == "WordLevel") {
      parts_.tokens = vocabulary_.texts;
      parts_.model = make_word_list({std::move(of_model), unknown_id(model, vocabulary_), path_});
    } else {
      refuse_options(model);
      std::vector<Merge> merges = read_merges(model, vocabulary_);
      n_merges = merges.size();
      if (byte_level) {
        read_byte_level(model, of_model, std::move(merges));
      } else {
        read_characters(model, std::move(of_model), std::move(merges));
      }
    }
    parts_.special.resize(parts_.tokens.size());
    if (auto node = root.find("post_processor")) read_post_processor(*node, parts_);
    parts_.description = fmt::format("{}, {} tokens, {} merges",
                                     type == "WordLevel" ? "words"
                                     : byte_level        ? "byte-level BPE"
                                                         : "BPE",
                                     parts_.tokens.size(), n_merges);
    return make_pipeline_tokenizer(std::move(parts_));
  }

 private:
  void read_byte_level(const JsonNode& model, const Vocabulary& of_model, std::vector<Merge> merges) {
    ByteLevelBpe bpe;
    bpe.merges = std::move(merges);
    bpe.whole_pieces_first = model.flag("ignore_merges", false);
    parts_.tokens = vocabulary_.texts;
    for (const auto& [text, id] : of_model) {
      auto bytes = byte_level_decode(text);
      if (!bytes) continue;  // an added token: its text is what it stands for
      parts_.tokens[id] = *bytes;
      bpe.vocabulary.emplace(std::move(*bytes), id);
    }
    parts_.model = make_byte_level_bpe(std::move(bpe));
  }

  void read_characters(const JsonNode& model, Vocabulary of_model, std::vector<Merge> merges) {
    CharacterBpe bpe;
    bpe.merges = std::move(merges);
    bpe.byte_fallback = model.flag("byte_fallback", false);
    bpe.fuse_unknown = model.flag("fuse_unk", false);
    bpe.unknown = unknown_id(model, vocabulary_);
    bpe.source = path_;
    bpe.vocabulary = std::move(of_model);
    for (const std::string& text : vocabulary_.texts)
      parts_.tokens.push_back(character_token_bytes(text, bpe.byte_fallback, parts_.rewriting.space));
    parts_.model = make_character_bpe(std::move(bpe));
  }

  std::string path_;
  JsonDocument document_;
  RawVocabulary vocabulary_;
  TokenizerParts parts_;
};

}  // namespace

std::unique_ptr<Tokenizer> open_tokenizer_json(const std::filesystem::path& path) {
  return TokenizerJsonReader(path).read();
}

}  // namespace kvlapse
