#include "core/model/byte_level.h"

#include <array>
#include <charconv>

#include "core/model/utf8.h"

namespace kvlapse {
namespace {

constexpr char32_t kFirstShifted = 256, kEnd = 256 + 68;  // 68 bytes have no printable character of their own

constexpr bool is_printable(unsigned byte) {
  return (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
}

struct Alphabet {
  std::array<char32_t, 256> character{};
  std::array<int, kEnd> byte{};  // -1: not of the alphabet
};

constexpr Alphabet make_alphabet() {
  Alphabet alphabet;
  alphabet.byte.fill(-1);
  char32_t shifted = kFirstShifted;
  for (unsigned b = 0; b < 256; ++b) {
    alphabet.character[b] = is_printable(b) ? b : shifted++;
    alphabet.byte[alphabet.character[b]] = static_cast<int>(b);
  }
  return alphabet;
}

constexpr Alphabet kAlphabet = make_alphabet();

}  // namespace

char32_t byte_level_character(uint8_t byte) {
  return kAlphabet.character[byte];
}

std::optional<std::string> byte_level_decode(std::string_view text) {
  std::string bytes;
  for (size_t at = 0; at < text.size();) {
    size_t length = utf8_length(text, at);
    if (length == 0) return std::nullopt;
    char32_t c = utf8_code_point(text, at);
    if (c >= kEnd || kAlphabet.byte[c] < 0) return std::nullopt;
    bytes += static_cast<char>(kAlphabet.byte[c]);
    at += length;
  }
  return bytes;
}

std::optional<uint8_t> byte_token(std::string_view text) {
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>') return std::nullopt;
  uint8_t byte = 0;
  const char* end = text.data() + 5;
  const auto parsed = std::from_chars(text.data() + 3, end, byte, 16);  // takes no sign and no blank
  if (parsed.ec != std::errc() || parsed.ptr != end) return std::nullopt;
  return byte;
}

}  // namespace kvlapse
