#include "core/model/text_search.h"

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <memory>

#include "core/base/error.h"

namespace kvlapse {
namespace {

std::vector<TextMatch> find_substring(std::string_view text, std::string_view pattern, size_t most) {
  std::vector<TextMatch> matches;
  if (pattern.empty()) return matches;
  const auto same = [](char a, char b) {
    return std::tolower(static_cast<unsigned char>(a)) == std::tolower(static_cast<unsigned char>(b));
  };
  auto from = text.begin();
  while (matches.size() < most) {
    const auto found = std::search(from, text.end(), pattern.begin(), pattern.end(), same);
    if (found == text.end()) break;
    const size_t begin = static_cast<size_t>(found - text.begin());
    matches.push_back({begin, begin + pattern.size()});
    from = found + static_cast<std::ptrdiff_t>(pattern.size());
  }
  return matches;
}

std::string pcre_message(int code) {
  std::array<PCRE2_UCHAR, 200> text{};
  pcre2_get_error_message(code, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

}  // namespace

std::vector<TextMatch> find_text(std::string_view text, std::string_view pattern, bool regex, size_t most) {
  if (!regex) return find_substring(text, pattern, most);
  std::vector<TextMatch> matches;
  int error = 0;
  size_t offset = 0;
  const std::unique_ptr<pcre2_code, decltype(&pcre2_code_free)> code(
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                    PCRE2_UTF | PCRE2_MATCH_INVALID_UTF, &error, &offset, nullptr),
      &pcre2_code_free);
  if (!code) fail("search pattern \"{}\": {} at letter {}", pattern, pcre_message(error), offset);
  const std::unique_ptr<pcre2_match_data, decltype(&pcre2_match_data_free)> data(
      pcre2_match_data_create_from_pattern(code.get(), nullptr), &pcre2_match_data_free);
  size_t from = 0;
  while (from <= text.size() && matches.size() < most) {
    const int found = pcre2_match(code.get(), reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, 0,
                                  data.get(), nullptr);
    if (found == PCRE2_ERROR_NOMATCH) break;
    if (found < 0) fail("search pattern \"{}\": {}", pattern, pcre_message(found));
    const size_t* range = pcre2_get_ovector_pointer(data.get());
    if (range[1] > range[0]) matches.push_back({range[0], range[1]});
    from = range[1] > range[0] ? range[1] : range[1] + 1;
    // An empty match must not resume inside a letter.
    while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xc0) == 0x80) ++from;
  }
  return matches;
}

}  // namespace kvlapse
