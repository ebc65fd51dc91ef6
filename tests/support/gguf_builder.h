// GgufBuilder: GGUF bytes for tests, well formed unless told otherwise, so that a test can break one field at
// a time.
#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

namespace kvlapse::testing {

// A file in the temporary folder that goes away with the object.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::string& bytes, const std::string& suffix = ".gguf") {
    static int counter = 0;
    path_ = std::filesystem::temp_directory_path() /
            ("kvlapse_test_" + std::to_string(::getpid()) + "_" + std::to_string(counter++) + suffix);
    std::ofstream(path_, std::ios::binary) << bytes;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;

  template <typename T>
  static std::string raw(T value) {
    std::string bytes(sizeof(T), '\0');
    std::memcpy(bytes.data(), &value, sizeof(T));
    return bytes;
  }
  static std::string text(const std::string& s) { return raw<uint64_t>(s.size()) + s; }

  // `type` as GGUF numbers value types, `payload` the bytes that follow it.
  GgufBuilder& value(const std::string& key, uint32_t type, const std::string& payload) {
    values_ += text(key) + raw(type) + payload;
    ++n_values_;
    return *this;
  }
  GgufBuilder& u32(const std::string& key, uint32_t v) { return value(key, 4, raw(v)); }
  GgufBuilder& f32(const std::string& key, float v) { return value(key, 6, raw(v)); }
  GgufBuilder& boolean(const std::string& key, bool v) { return value(key, 7, raw<uint8_t>(v)); }
  GgufBuilder& string(const std::string& key, const std::string& v) { return value(key, 8, text(v)); }
  GgufBuilder& strings(const std::string& key, const std::vector<std::string>& all) {
    std::string payload = raw<uint32_t>(8) + raw<uint64_t>(all.size());
    for (const std::string& s : all) payload += text(s);
    return value(key, 9, payload);
  }
  GgufBuilder& floats(const std::string& key, const std::vector<float>& all) {
    std::string payload = raw<uint32_t>(6) + raw<uint64_t>(all.size());
    for (float v : all) payload += raw(v);
    return value(key, 9, payload);
  }
  GgufBuilder& i32s(const std::string& key, const std::vector<int32_t>& all) {
    std::string payload = raw<uint32_t>(5) + raw<uint64_t>(all.size());
    for (int32_t v : all) payload += raw(v);
    return value(key, 9, payload);
  }

  // `ne` fastest first; the data are appended at the next aligned offset.
  GgufBuilder& tensor(const std::string& name, const std::vector<uint64_t>& ne, uint32_t type,
                      const std::string& data) {
    return tensor_at(name, ne, type, data_.size(), data);
  }
  GgufBuilder& tensor_at(const std::string& name, const std::vector<uint64_t>& ne, uint32_t type,
                         uint64_t offset, const std::string& data) {
    tensors_ += text(name) + raw(static_cast<uint32_t>(ne.size()));
    for (uint64_t n : ne) tensors_ += raw(n);
    tensors_ += raw(type) + raw(offset);
    data_ += data;
    data_.resize((data_.size() + alignment - 1) / alignment * alignment);
    ++n_tensors_;
    return *this;
  }

  std::string bytes() const {
    std::string out = "GGUF" + raw(version) + raw(n_tensors_) + raw(n_values_) + values_ + tensors_;
    out.resize((out.size() + alignment - 1) / alignment * alignment);
    return out + data_;
  }

 private:
  std::string values_, tensors_, data_;
  uint64_t n_values_ = 0, n_tensors_ = 0;
};

}  // namespace kvlapse::testing
