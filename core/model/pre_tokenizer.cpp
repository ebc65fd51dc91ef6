#include "core/model/pre_tokenizer.h"

#include "core/base/error.h"
#include "core/model/json_document.h"

namespace kvlapse {

constexpr std::string_view kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
constexpr std::string_view kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
constexpr std::string_view kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
// What the library's Digits step calls numeric: Unicode 17's numbers, one version ahead of its expressions.
constexpr std::string_view kOneNumberPattern = R"([\p{N}\x{11de0}-\x{11de9}\x{16ff4}-\x{16ff6}])";

void PreTokenizer::split(std::string_view text, std::vector<std::string_view>& pieces) const {
  std::vector<std::string_view> current, next;
  if (!text.empty()) current.push_back(text);
  for (const Split& split : splits_) {
    next.clear();
    bool keep_matches = split.keep != Keep::gaps, keep_gaps = split.keep != Keep::matches;
    for (std::string_view piece : current) {
      for (size_t at = 0; at < piece.size();) {
        SplitPattern::Match match = split.pattern.find(piece, at);
        size_t begin = std::min(match.begin, piece.size()), end = std::min(match.end, piece.size());
        if (keep_gaps && begin > at) next.push_back(piece.substr(at, begin - at));
        if (keep_matches && end > begin) next.push_back(piece.substr(begin, end - begin));
        at = end;
      }
    }
    current.swap(next);
  }
  pieces.insert(pieces.end(), current.begin(), current.end());
}

PreTokenizer named_pre_tokenizer(std::string_view name, std::string_view source) {
  PreTokenizer result;
  auto add = [&](std::string_view pattern) {
    result.add(SplitPattern(pattern, source), PreTokenizer::Keep::both);
  };
  if (name == "gpt-2" || name == "gpt2") {
    add(kGpt2Pattern);
  } else if (name == "smollm") {
    add(kOneNumberPattern);
    add(kGpt2Pattern);
  } else if (name == "qwen2" || name == "deepseek-r1-qwen") {
    add(kQwen2Pattern);
  } else if (name == "llama-bpe" || name == "llama3" || name == "llama-v3") {
    add(kLlama3Pattern);
  } else {
    fail("{}: expected gpt-2, smollm, qwen2, deepseek-r1-qwen or llama-bpe, found '{}'", source,
         quotable(name));
  }
  return result;
}

}  // namespace kvlapse
