// MappedFile: a file's bytes, read-only and memory-mapped; the one way in which model files are read.
// Readable for as long as it lives, from any thread. A file that another process truncates meanwhile is not
// guarded against.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace kvlapse {

class MappedFile {
 public:
  // Throws Error naming the path and the system's reason; an empty file gives an empty span.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return {data_, size_}; }

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kvlapse
