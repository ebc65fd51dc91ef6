#include "core/model/split_pattern.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>

#include "core/base/error.h"
#include "core/model/json_document.h"
#include "core/model/utf8.h"

namespace kvlapse {
namespace {

constexpr size_t kMaxExpression = 4096;
constexpr uint32_t kMatchLimit = 2'000'000;  // backtracking steps of one match
constexpr uint32_t kHeapLimitKib = 65536;

// White_Space. PCRE2's own \s has U+180E in addition.
constexpr std::string_view kWhiteSpace =
    R"(\x{9}-\x{d}\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000})";

// Letters and numbers of Unicode 15 and 16, which PCRE2 10.42 (Unicode 14) does not know; harmless with a
// newer one.
constexpr std::string_view kNewLetters =
    R"(\x{1c89}-\x{1c8a}\x{a7cb}-\x{a7cd}\x{a7da}-\x{a7dc}\x{105c0}-\x{105f3}\x{10d4a}-\x{10d65})"
    R"(\x{10d6f}-\x{10d85}\x{10ec2}-\x{10ec4}\x{1123f}-\x{11240}\x{11380}-\x{11389}\x{1138b}\x{1138e})"
    R"(\x{11390}-\x{113b5}\x{113b7}\x{113d1}\x{113d3}\x{11bc0}-\x{11be0}\x{11f02}\x{11f04}-\x{11f10})"
    R"(\x{11f12}-\x{11f33}\x{1342f}\x{13441}-\x{13446}\x{13460}-\x{143fa}\x{16100}-\x{1611d})"
    R"(\x{16d40}-\x{16d6c}\x{18cff}\x{1b132}\x{1b155}\x{1df25}-\x{1df2a}\x{1e030}-\x{1e06d})"
    R"(\x{1e4d0}-\x{1e4eb}\x{1e5d0}-\x{1e5ed}\x{1e5f0}\x{2b739}\x{2ebf0}-\x{2ee5d}\x{31350}-\x{323af})";
constexpr std::string_view kNewNumbers =
    R"(\x{10d40}-\x{10d49}\x{116d0}-\x{116e3}\x{11bf0}-\x{11bf9}\x{11f50}-\x{11f59}\x{16130}-\x{16139})"
    R"(\x{16d70}-\x{16d79}\x{1ccf0}-\x{1ccf9}\x{1d2c0}-\x{1d2d3}\x{1e4f0}-\x{1e4f9}\x{1e5f1}-\x{1e5fa})";

// Rewrites \s, \S, \p{L} and \p{N}, inside and outside of character classes.
std::string adapt(std::string_view expression) {
  std::string out;
  bool in_class = false;
  auto members = [&](std::string_view property, std::string_view more) {
    out += fmt::format(fmt::runtime(in_class ? "{}{}" : "[{}{}]"), property, more);
  };
  for (size_t i = 0; i < expression.size(); ++i) {
    std::string_view rest = expression.substr(i);
    if (rest.starts_with("\\s")) {
      members("", kWhiteSpace);
      ++i;
    } else if (rest.starts_with("\\p{L}")) {
      members("\\p{L}", kNewLetters);
      i += 4;
    } else if (rest.starts_with("\\p{N}")) {
      members("\\p{N}", kNewNumbers);
      i += 4;
    } else if (rest.starts_with("\\S") && !in_class) {
      out += fmt::format("[^{}]", kWhiteSpace);
      ++i;
    } else if (rest[0] == '\\' && rest.size() > 1) {
      out += rest.substr(0, 2);
      ++i;
    } else {
      if (rest[0] == '[') in_class = true;
      if (rest[0] == ']') in_class = false;
      out += rest[0];
    }
  }
  return out;
}

struct FreeMatchData {
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
};

}  // namespace

struct SplitPattern::Compiled {
  std::string source;
  pcre2_code* code = nullptr;
  pcre2_match_context* context = nullptr;

  ~Compiled() {
    pcre2_match_context_free(context);
    pcre2_code_free(code);
  }
};

SplitPattern::SplitPattern(std::string_view expression, std::string_view source)
    : compiled_(std::make_unique<Compiled>()) {
  compiled_->source = source;
  if (expression.size() > kMaxExpression)
    fail("{}: expression: expected at most {} bytes, found {}", source, kMaxExpression, expression.size());
  std::string adapted = adapt(expression);
  int error = 0;
  size_t error_offset = 0;
  compiled_->code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(adapted.data()), adapted.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &error_offset, nullptr);
  if (!compiled_->code) {
    std::array<PCRE2_UCHAR, 256> reason{};
    pcre2_get_error_message(error, reason.data(), reason.size());
    fail("{}: expression: expected a regular expression, found '{}' ({})", source, quotable(expression),
         reinterpret_cast<const char*>(reason.data()));
  }
  pcre2_jit_compile(compiled_->code, PCRE2_JIT_COMPLETE);  // without it the interpreter matches
  compiled_->context = pcre2_match_context_create(nullptr);
  pcre2_set_match_limit(compiled_->context, kMatchLimit);
  pcre2_set_heap_limit(compiled_->context, kHeapLimitKib);
}

SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

SplitPattern::Match SplitPattern::find(std::string_view text, size_t from) const {
  // Match data are scratch memory of one match; a thread keeps its own, large enough for any pattern's first
  // group.
  thread_local std::unique_ptr<pcre2_match_data, FreeMatchData> data(pcre2_match_data_create(1, nullptr));
  while (from < text.size()) {
    int found = pcre2_match(compiled_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                            PCRE2_NO_UTF_CHECK, data.get(), compiled_->context);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) {
      std::array<PCRE2_UCHAR, 256> reason{};
      pcre2_get_error_message(found, reason.data(), reason.size());
      fail("{}: expression: failed at byte {} of a text ({})", compiled_->source, from,
           reinterpret_cast<const char*>(reason.data()));
    }
    const size_t* offsets = pcre2_get_ovector_pointer(data.get());
    if (offsets[0] < offsets[1] && offsets[0] >= from) return {offsets[0], offsets[1]};
    from = std::max(from, offsets[1]);
    if (from < text.size()) from += utf8_length(text, from);
  }
  return {std::string_view::npos, std::string_view::npos};
}

}  // namespace kvlapse
