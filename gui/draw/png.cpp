#include "gui/draw/png.h"

#include <fstream>

#include "core/base/error.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wall"
#pragma GCC diagnostic ignored "-Wextra"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wmissing-field-initializers"
#define STB_IMAGE_WRITE_IMPLEMENTATION
#define STB_IMAGE_WRITE_STATIC
#include <stb_image_write.h>
#pragma GCC diagnostic pop

namespace kvlapse::gui {

std::string encode_png(int width, int height, std::span<const uint32_t> pixels) {
  std::string out;
  const auto append = [](void* context, void* data, int size) {
    static_cast<std::string*>(context)->append(static_cast<const char*>(data), static_cast<size_t>(size));
  };
  if (stbi_write_png_to_func(append, &out, width, height, 4, pixels.data(), width * 4) == 0) {
    fail("PNG of {} x {} pixels: could not encode", width, height);
  }
  return out;
}

void write_png(const std::filesystem::path& file, int width, int height, std::span<const uint32_t> pixels) {
  const std::string bytes = encode_png(width, height, pixels);
  std::ofstream out(file, std::ios::binary);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  if (!out.flush()) fail("{}: could not write {} bytes", file.string(), bytes.size());
}

}  // namespace kvlapse::gui
