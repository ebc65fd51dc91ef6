// GgufFile: a GGUF v2 or v3 file (little-endian): typed metadata and tensors, memory-mapped. Every count,
// length, offset and size is checked against the file before it is used, so hostile headers are refused with
// one line that names file, field, expected and found, and the views stay inside the mapping. Read-only and
// thread-safe. Source: ggml's docs/gguf.md.
#pragma once

#include <filesystem>
#include <map>
#include <variant>

#include "core/model/mapped_file.h"
#include "core/model/tensor_file.h"

namespace kvlapse {

// Integers of every width are widened; strings point into the mapping.
using GgufValue = std::variant<bool, int64_t, double, std::string_view, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string_view>>;

class GgufFile final : public TensorFile {
 public:
  explicit GgufFile(const std::filesystem::path& path);

  std::span<const TensorView> tensors() const override { return tensors_; }
  // Scalars and strings as they are, arrays as their first elements and length.
  std::span<const std::pair<std::string, std::string>> metadata() const override { return text_; }
  std::string describe() const override { return path_.string(); }
  int version() const { return version_; }
  const std::map<std::string, GgufValue, std::less<>>& values() const { return values_; }

  // Null when the key is absent; throws Error when it holds another type.
  template <typename T>
  const T* find_value(std::string_view key) const {
    auto found = values_.find(key);
    if (found == values_.end()) return nullptr;
    const T* value = std::get_if<T>(&found->second);
    if (!value) wrong_type(key, found->second.index());
    return value;
  }
  // Throws Error when the key is absent.
  template <typename T>
  const T& value(std::string_view key) const {
    if (const T* found = find_value<T>(key)) return *found;
    missing(key);
  }

 private:
  [[noreturn]] void wrong_type(std::string_view key, size_t found) const;
  [[noreturn]] void missing(std::string_view key) const;

  std::filesystem::path path_;
  MappedFile file_;
  int version_ = 0;
  std::map<std::string, GgufValue, std::less<>> values_;
  std::vector<std::pair<std::string, std::string>> text_;
  std::vector<TensorView> tensors_;
};

}  // namespace kvlapse
