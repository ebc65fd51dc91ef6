// The bytes of one fuzz input as a file that the readers can open by path.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <string>

namespace kvlapse::fuzz {

class MemoryFile {
 public:
  MemoryFile(const uint8_t* data, size_t size) : file_(memfd_create("input", 0)) {
    if (file_ < 0 || ::write(file_, data, size) != static_cast<ssize_t>(size)) std::abort();
  }
  ~MemoryFile() { ::close(file_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::filesystem::path path() const { return "/proc/self/fd/" + std::to_string(file_); }

 private:
  int file_;
};

// A folder in which `name` is that file, for readers that take a folder.
class MemoryFolder {
 public:
  explicit MemoryFolder(const std::string& name)
      : path_(std::filesystem::temp_directory_path() / ("kvlapse_fuzz_" + std::to_string(::getpid()))),
        name_(name) {
    std::filesystem::create_directories(path_);
  }
  ~MemoryFolder() { std::filesystem::remove_all(path_); }
  MemoryFolder(const MemoryFolder&) = delete;
  MemoryFolder& operator=(const MemoryFolder&) = delete;

  const std::filesystem::path& with(const MemoryFile& file) const {
    std::filesystem::remove(path_ / name_);
    std::filesystem::create_symlink(file.path(), path_ / name_);
    return path_;
  }

 private:
  std::filesystem::path path_;
  std::string name_;
};

}  // namespace kvlapse::fuzz
