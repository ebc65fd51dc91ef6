// PNG: RGBA pixels to a file or to memory. Thread-safe.
#pragma once

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

namespace kvlapse::gui {

// `pixels` [height][width] RGBA, first row on top. Throws Error.
void write_png(const std::filesystem::path& file, int width, int height, std::span<const uint32_t> pixels);
std::string encode_png(int width, int height, std::span<const uint32_t> pixels);

}  // namespace kvlapse::gui
