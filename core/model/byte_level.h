// Bytes in vocabularies that are text. The byte-level alphabet of GPT-2 has a printable character for each (source:
// openai/gpt-2, encoder.py, bytes_to_unicode); SentencePiece spells them out, <0x0A>. Pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvlapse {

char32_t byte_level_character(uint8_t byte);
// The bytes that a text of that alphabet stands for; nullopt when a character is not of it.
std::optional<std::string> byte_level_decode(std::string_view text);
// The byte that SentencePiece's <0x00> to <0xFF> names; nullopt for any other text.
std::optional<uint8_t> byte_token(std::string_view text);

}  // namespace kvlapse
