#include "core/model/utf8.h"

namespace kvlapse {
namespace {

uint8_t byte_at(std::string_view text, size_t at) {
  return static_cast<uint8_t>(text[at]);
}

size_t length_of_lead(uint8_t lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xc2 && lead <= 0xdf) return 2;
  if (lead >= 0xe0 && lead <= 0xef) return 3;
  if (lead >= 0xf0 && lead <= 0xf4) return 4;
  return 0;
}

// The second byte is what rules out overlong forms, surrogates and values above U+10FFFF.
bool second_fits(uint8_t lead, uint8_t second) {
  uint8_t low = lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  uint8_t high = lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;
  return second >= low && second <= high;
}

// How many bytes from `at` fit the character that begins there, and how many it needs (0: no character).
struct Match {
  size_t found, needed;
};

Match match(std::string_view text, size_t at) {
  uint8_t lead = byte_at(text, at);
  size_t needed = length_of_lead(lead), found = needed > 0 ? 1 : 0;
  while (found < needed && at + found < text.size()) {
    uint8_t next = byte_at(text, at + found);
    if (found == 1 ? !second_fits(lead, next) : (next & 0xc0) != 0x80) break;
    ++found;
  }
  return {found, needed};
}

}  // namespace

size_t utf8_length(std::string_view text, size_t at) {
  Match m = match(text, at);
  return m.found == m.needed ? m.needed : 0;
}

size_t find_invalid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    size_t length = utf8_length(text, at);
    if (length == 0) return at;
    at += length;
  }
  return std::string_view::npos;
}

size_t unfinished_utf8(std::string_view text) {
  for (size_t back = 1; back <= 3 && back <= text.size(); ++back) {
    size_t at = text.size() - back;
    if ((byte_at(text, at) & 0xc0) == 0x80) continue;
    Match m = match(text, at);
    return m.found == back && m.needed > back ? back : 0;
  }
  return 0;
}

char32_t utf8_code_point(std::string_view text, size_t at) {
  uint8_t lead = byte_at(text, at);
  size_t length = length_of_lead(lead);
  char32_t value = length == 1 ? lead : lead & (0x7fu >> length);
  for (size_t i = 1; i < length; ++i) value = (value << 6) | (byte_at(text, at + i) & 0x3fu);
  return value;
}

void append_utf8(std::string& out, char32_t c) {
  auto put = [&](char32_t byte) { out += static_cast<char>(byte); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xc0 | (c >> 6)), put(0x80 | (c & 0x3f));
  } else if (c < 0x10000) {
    put(0xe0 | (c >> 12)), put(0x80 | ((c >> 6) & 0x3f)), put(0x80 | (c & 0x3f));
  } else {
    put(0xf0 | (c >> 18)), put(0x80 | ((c >> 12) & 0x3f)), put(0x80 | ((c >> 6) & 0x3f)),
        put(0x80 | (c & 0x3f));
  }
}

std::string replace_invalid_utf8(std::string_view text) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    size_t length = utf8_length(text, at);
    if (length == 0) {
      out += "\xef\xbf\xbd";
      ++at;
    } else {
      out += text.substr(at, length);
      at += length;
    }
  }
  return out;
}

}  // namespace kvlapse
