// UTF-8, strictly as RFC 3629 has it: no overlong forms, no surrogates, nothing above U+10FFFF. Pure
// functions.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace kvlapse {

// Bytes of the character that begins at `at`; 0 when no valid one does.
size_t utf8_length(std::string_view text, size_t at);
// Offset of the first byte that is not part of a valid character; npos when all of `text` is valid.
size_t find_invalid_utf8(std::string_view text);
// Bytes at the end of `text` that may still become a valid character when more follow: 0 to 3.
size_t unfinished_utf8(std::string_view text);
// The code point of the valid character at `at`.
char32_t utf8_code_point(std::string_view text, size_t at);
void append_utf8(std::string& out, char32_t code_point);
// Invalid bytes become U+FFFD, one each.
std::string replace_invalid_utf8(std::string_view text);

}  // namespace kvlapse
