// The byte-level alphabet of GPT-2: each byte has a printable character, so that vocabularies are text.
// Source: openai/gpt-2, encoder.py, bytes_to_unicode. Pure functions.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace kvlapse {

char32_t byte_level_character(uint8_t byte);
// The bytes that a text of that alphabet stands for; nullopt when a character is not of it.
std::optional<std::string> byte_level_decode(std::string_view text);

}  // namespace kvlapse
