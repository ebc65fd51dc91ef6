#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>

#include "core/base/error.h"
#include "core/model/mapped_file.h"
#include "core/model/tensor_file.h"

namespace kvlapse {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the format's own limit
constexpr int kMaxDepth = 3;                       // header, tensor, shape

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

class SafetensorsFile final : public TensorFile {
 public:
  explicit SafetensorsFile(const std::filesystem::path& path) : path_(path.string()), file_(path) {
    std::span<const std::byte> bytes = file_.bytes();
    if (bytes.size() < 8) fail("{}: header: expected at least 8 bytes, found {}", path_, bytes.size());
    uint64_t header_bytes = 0;
    std::memcpy(&header_bytes, bytes.data(), 8);
    if (header_bytes > kMaxHeaderBytes || header_bytes > bytes.size() - 8)
      fail("{}: header length: expected at most {} bytes, found {}", path_,
           std::min<uint64_t>(kMaxHeaderBytes, bytes.size() - 8), header_bytes);
    read_header({reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<size_t>(header_bytes)},
                bytes.subspan(8 + header_bytes), 8 + header_bytes);
  }

  std::span<const TensorView> tensors() const override { return tensors_; }
  std::span<const std::pair<std::string, std::string>> metadata() const override { return metadata_; }
  std::string describe() const override { return path_; }

 private:
  void read_header(std::string_view text, std::span<const std::byte> data, uint64_t data_offset) {
    std::set<std::string> names;
    std::string twice;
    int deepest = 0;
    // A JSON object drops repeated keys silently; they must be seen here.
    auto watch = [&](int depth, json::parse_event_t event, json& value) {
      deepest = std::max(deepest, depth);
      if (event == json::parse_event_t::key && depth == 1 && !names.insert(value.get<std::string>()).second)
        twice = value.get<std::string>();
      return deepest <= kMaxDepth;
    };
    json header;
    try {
      header = json::parse(text, watch);
    } catch (const json::exception& e) {
      fail("{}: header: expected a JSON object, found {}", path_, one_line(e.what()));
    }
    if (deepest > kMaxDepth)
      fail("{}: header: expected at most {} levels of JSON, found more", path_, kMaxDepth);
    if (!header.is_object()) fail("{}: header: expected a JSON object, found {}", path_, header.type_name());
    if (!twice.empty()) fail("{}: tensor '{}': expected once, found twice", path_, one_line(twice));

    for (auto& [name, entry] : header.items()) {
      if (name == "__metadata__")
        read_metadata(entry);
      else
        read_tensor(name, entry, data, data_offset);
    }
    check_layout(data.size(), data_offset);
  }

  void read_metadata(const json& entry) {
    if (!entry.is_object()) fail("{}: __metadata__: expected an object, found {}", path_, entry.type_name());
    for (auto& [key, value] : entry.items()) {
      if (!value.is_string())
        fail("{}: __metadata__ '{}': expected a string, found {}", path_, one_line(key), value.type_name());
      metadata_.emplace_back(key, value.get<std::string>());
    }
  }

  void read_tensor(const std::string& name, const json& entry, std::span<const std::byte> data,
                   uint64_t data_offset) {
    const std::string shown = one_line(name);
    if (!entry.is_object())
      fail("{}: tensor '{}': expected an object, found {}", path_, shown, entry.type_name());
    for (const char* key : {"dtype", "shape", "data_offsets"})
      if (!entry.contains(key)) fail("{}: tensor '{}': field '{}' is missing", path_, shown, key);

    TensorView tensor;
    const json& dtype = entry["dtype"];
    if (!dtype.is_string())
      fail("{}: tensor '{}': dtype: expected a string, found {}", path_, shown, dtype.type_name());
    tensor.type = parse_type(dtype.get_ref<const std::string&>(), shown);

    const json& shape = entry["shape"];
    if (!shape.is_array())
      fail("{}: tensor '{}': shape: expected an array, found {}", path_, shown, shape.type_name());
    uint64_t bytes = block_bytes(tensor.type);
    for (const json& d : shape) {
      const uint64_t size = natural(d, shown, "shape");
      if (__builtin_mul_overflow(bytes, size, &bytes) || size > std::numeric_limits<int32_t>::max())
        fail("{}: tensor '{}': shape: expected a size that fits the file, found {}", path_, shown,
             shape.dump());
      tensor.shape.push_back(static_cast<int64_t>(size));
    }

    const json& offsets = entry["data_offsets"];
    if (!offsets.is_array() || offsets.size() != 2)
      fail("{}: tensor '{}': data_offsets: expected two numbers, found {}", path_, shown,
           offsets.type_name());
    const uint64_t begin = natural(offsets[0], shown, "data_offsets"),
                   end = natural(offsets[1], shown, "data_offsets");
    if (begin > end || end > data.size())
      fail("{}: tensor '{}': data_offsets: expected a range within {} bytes, found [{}, {})", path_, shown,
           data.size(), begin, end);
    if (end - begin != bytes)
      fail("{}: tensor '{}': data_offsets: expected {} bytes for {} {}, found {}", path_, shown, bytes,
           tensor_type_name(tensor.type), shape.dump(), end - begin);
    tensor.data = data.data() + begin;
    tensor.bytes = bytes;
    tensor.file_offset = data_offset + begin;
    names_.push_back(std::make_unique<std::string>(name));
    tensor.name = *names_.back();
    tensors_.push_back(std::move(tensor));
  }

  // The tensors must tile the data: no overlap, no gap, nothing behind.
  void check_layout(size_t data_bytes, uint64_t data_offset) {
    std::sort(tensors_.begin(), tensors_.end(), [](const TensorView& a, const TensorView& b) {
      return a.data != b.data ? a.data < b.data : a.bytes < b.bytes;
    });
    uint64_t expected = 0;
    for (const TensorView& t : tensors_) {
      const uint64_t found = t.file_offset - data_offset;
      if (found != expected)
        fail("{}: tensor '{}': data_offsets: expected to begin at {} where the one before ends, found {}",
             path_, one_line(std::string(t.name)), expected, found);
      expected += t.bytes;
    }
    if (expected != data_bytes) fail("{}: data: expected {} bytes, found {}", path_, expected, data_bytes);
  }

  TensorType parse_type(const std::string& name, const std::string& tensor) const {
    constexpr TensorType kTypes[] = {TensorType::f32, TensorType::f16, TensorType::bf16,
                                     TensorType::i32, TensorType::i64, TensorType::u8};
    for (TensorType type : kTypes)
      if (tensor_type_name(type) == name) return type;
    fail("{}: tensor '{}': dtype: expected F32, F16, BF16, I32, I64 or U8, found '{}'", path_, tensor,
         one_line(name));
  }

  uint64_t natural(const json& value, const std::string& tensor, const char* field) const {
    if (!value.is_number_unsigned())
      fail("{}: tensor '{}': {}: expected a whole number below 2^64, found {}", path_, tensor, field,
           one_line(value.dump()));
    return value.get<uint64_t>();
  }

  // Text of the file in a one-line message: control characters dropped, length bounded.
  static std::string one_line(std::string text) {
    std::erase_if(text, [](unsigned char c) { return c < 0x20 || c == 0x7f; });
    if (text.size() > 120) text = text.substr(0, 120) + "...";
    return text;
  }

  std::string path_;
  MappedFile file_;
  std::vector<std::unique_ptr<std::string>> names_;  // what the views' names point into
  std::vector<TensorView> tensors_;                  // in file order
  std::vector<std::pair<std::string, std::string>> metadata_;
};

}  // namespace

std::unique_ptr<TensorFile> open_safetensors(const std::filesystem::path& path) {
  return std::make_unique<SafetensorsFile>(path);
}

}  // namespace kvlapse
