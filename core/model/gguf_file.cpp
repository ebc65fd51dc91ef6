#include "core/model/gguf_file.h"

#include <array>
#include <cstring>
#include <set>

#include "core/base/error.h"

namespace kvlapse {
namespace {

// Value types of GGUF metadata.
enum class ValueType : uint32_t { u8, i8, u16, i16, u32, i32, f32, boolean, string, array, u64, i64, f64 };
constexpr uint32_t kValueTypes = 13;
constexpr std::array<size_t, kValueTypes> kValueBytes{1, 1, 2, 2, 4, 4, 4, 1, 8, 12, 8, 8, 8};  // at least

constexpr uint64_t kMaxDimensions = 4;
constexpr size_t kSmallestTensorInfo = 8 + 4 + 8 + 4 + 8;  // empty name, one dimension
constexpr size_t kSmallestKeyValue = 8 + 4 + 1;

// ggml's type ids; empty: never assigned or withdrawn.
constexpr std::array<std::string_view, 40> kGgmlTypes{
    "F32",      "F16",      "Q4_0",    "Q4_1",  "Q4_2",       "Q4_3",       "Q5_0",       "Q5_1",
    "Q8_0",     "Q8_1",     "Q2_K",    "Q3_K",  "Q4_K",       "Q5_K",       "Q6_K",       "Q8_K",
    "IQ2_XXS",  "IQ2_XS",   "IQ3_XXS", "IQ1_S", "IQ4_NL",     "IQ3_S",      "IQ2_S",      "IQ4_XS",
    "I8",       "I16",      "I32",     "I64",   "F64",        "IQ1_M",      "BF16",       "Q4_0_4_4",
    "Q4_0_4_8", "Q4_0_8_8", "TQ1_0",   "TQ2_0", "IQ4_NL_4_4", "IQ4_NL_4_8", "IQ4_NL_8_8", "MXFP4"};

// A bounds-checked reader. `field` names what is being read, for the message of a file that ends too early.
class Cursor {
 public:
  Cursor(std::span<const std::byte> bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  uint64_t offset() const { return offset_; }
  uint64_t remaining() const { return bytes_.size() - offset_; }

  template <typename T>
  T read(std::string_view field) {
    T value{};
    std::memcpy(&value, take(sizeof(T), field), sizeof(T));
    return value;
  }

  std::string_view string(std::string_view field) {
    auto length = read<uint64_t>(field);
    return {reinterpret_cast<const char*>(take(length, field)), static_cast<size_t>(length)};
  }

  const std::byte* take(uint64_t n, std::string_view field) {
    if (n > remaining())
      fail("{}: {} at byte {}: expected {} bytes, found {} before the end of the file", file_, field, offset_,
           n, remaining());
    const std::byte* at = bytes_.data() + offset_;
    offset_ += n;
    return at;
  }

 private:
  std::span<const std::byte> bytes_;
  const std::string& file_;
  uint64_t offset_ = 0;
};

std::string printable(std::string_view text) {
  std::string out;
  for (char c : text.substr(0, 80)) out += c >= 32 && c < 127 ? c : '?';
  return out;
}

int64_t read_integer(Cursor& in, ValueType type, std::string_view field, const std::string& file) {
  switch (type) {
    case ValueType::u8: return in.read<uint8_t>(field);
    case ValueType::i8: return in.read<int8_t>(field);
    case ValueType::u16: return in.read<uint16_t>(field);
    case ValueType::i16: return in.read<int16_t>(field);
    case ValueType::u32: return in.read<uint32_t>(field);
    case ValueType::i32: return in.read<int32_t>(field);
    case ValueType::i64: return in.read<int64_t>(field);
    case ValueType::u64: {
      auto value = in.read<uint64_t>(field);
      if (value > INT64_MAX) fail("{}: {}: expected a value below 2^63, found {}", file, field, value);
      return static_cast<int64_t>(value);
    }
    default: fail("{}: {}: expected an integer type, found {}", file, field, static_cast<uint32_t>(type));
  }
}

bool read_bool(Cursor& in, std::string_view field, const std::string& file) {
  auto value = in.read<uint8_t>(field);
  if (value > 1) fail("{}: {}: expected a bool of 0 or 1, found {}", file, field, value);
  return value == 1;
}

GgufValue read_array(Cursor& in, std::string_view field, const std::string& file) {
  auto type = in.read<uint32_t>(field);
  auto count = in.read<uint64_t>(field);
  if (type >= kValueTypes) fail("{}: {}: expected an element type 0..12, found {}", file, field, type);
  auto element = static_cast<ValueType>(type);
  if (element == ValueType::array) fail("{}: {}: arrays of arrays are not supported", file, field);
  if (count > in.remaining() / kValueBytes[type])
    fail("{}: {}: expected at most {} elements in the rest of the file, found {}", file, field,
         in.remaining() / kValueBytes[type], count);
  if (element == ValueType::string) {
    std::vector<std::string_view> strings(count);
    for (std::string_view& s : strings) s = in.string(field);
    return strings;
  }
  if (element == ValueType::f32 || element == ValueType::f64) {
    std::vector<double> numbers(count);
    for (double& n : numbers) n = element == ValueType::f32 ? in.read<float>(field) : in.read<double>(field);
    return numbers;
  }
  std::vector<int64_t> integers(count);
  for (int64_t& n : integers)
    n = element == ValueType::boolean ? read_bool(in, field, file) : read_integer(in, element, field, file);
  return integers;
}

GgufValue read_value(Cursor& in, std::string_view field, const std::string& file) {
  auto type = in.read<uint32_t>(field);
  if (type >= kValueTypes) fail("{}: {}: expected a value type 0..12, found {}", file, field, type);
  switch (static_cast<ValueType>(type)) {
    case ValueType::f32: return static_cast<double>(in.read<float>(field));
    case ValueType::f64: return in.read<double>(field);
    case ValueType::boolean: return read_bool(in, field, file);
    case ValueType::string: return in.string(field);
    case ValueType::array: return read_array(in, field, file);
    default: return read_integer(in, static_cast<ValueType>(type), field, file);
  }
}

TensorType tensor_type(uint32_t ggml_type, std::string_view tensor, const std::string& file) {
  switch (ggml_type) {
    case 0: return TensorType::f32;
    case 1: return TensorType::f16;
    case 2: return TensorType::q4_0;
    case 3: return TensorType::q4_1;
    case 6: return TensorType::q5_0;
    case 7: return TensorType::q5_1;
    case 8: return TensorType::q8_0;
    case 12: return TensorType::q4_k;
    case 13: return TensorType::q5_k;
    case 14: return TensorType::q6_k;
    case 26: return TensorType::i32;
    case 27: return TensorType::i64;
    case 30: return TensorType::bf16;
    default: break;
  }
  std::string name = ggml_type < kGgmlTypes.size() ? std::string(kGgmlTypes[ggml_type])
                                                   : fmt::format("unknown type {}", ggml_type);
  fail(
      "{}: tensor '{}': type: expected F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q4_K, Q5_K or Q6_K, "
      "found {}",
      file, tensor, name);
}

TensorView read_tensor_info(Cursor& in, const std::string& file) {
  TensorView tensor;
  tensor.name = in.string("tensor name");
  if (tensor.name.empty() || tensor.name.size() > 80)
    fail("{}: tensor name: expected 1 to 80 bytes, found {}", file, tensor.name.size());
  std::string name = printable(tensor.name);
  auto n_dimensions = in.read<uint32_t>("tensor dimensions");
  if (n_dimensions == 0 || n_dimensions > kMaxDimensions)
    fail("{}: tensor '{}': expected 1 to {} dimensions, found {}", file, name, kMaxDimensions, n_dimensions);
  tensor.shape.resize(n_dimensions);
  for (size_t i = n_dimensions; i-- > 0;) {  // the file stores the fastest dimension first
    auto extent = in.read<uint64_t>("tensor dimensions");
    if (extent == 0 || extent > INT32_MAX)
      fail("{}: tensor '{}': dimension: expected 1 to 2147483647, found {}", file, name, extent);
    tensor.shape[i] = static_cast<int64_t>(extent);
  }
  tensor.type = tensor_type(in.read<uint32_t>("tensor type"), name, file);
  tensor.file_offset = in.read<uint64_t>("tensor offset");

  int64_t columns = tensor.shape.back();
  if (columns % block_elements(tensor.type) != 0)
    fail("{}: tensor '{}': row length: expected a multiple of {} for {}, found {}", file, name,
         block_elements(tensor.type), tensor_type_name(tensor.type), columns);
  unsigned __int128 elements = 1;
  for (int64_t extent : tensor.shape) elements *= static_cast<unsigned __int128>(extent);
  unsigned __int128 bytes =
      elements / static_cast<unsigned>(block_elements(tensor.type)) * block_bytes(tensor.type);
  if (bytes > INT64_MAX) fail("{}: tensor '{}': size: expected below 2^63 bytes, found more", file, name);
  tensor.bytes = static_cast<size_t>(bytes);
  return tensor;
}

std::string as_text(const GgufValue& value) {
  return std::visit(
      [](const auto& v) -> std::string {
        using T = std::decay_t<decltype(v)>;
        if constexpr (std::is_same_v<T, bool>) {
          return v ? "true" : "false";
        } else if constexpr (std::is_same_v<T, std::string_view>) {
          return std::string(v);
        } else if constexpr (std::is_arithmetic_v<T>) {
          return fmt::format("{}", v);
        } else {
          std::string text = "[";
          for (size_t i = 0; i < v.size() && i < 3; ++i) text += fmt::format("{}{}", i ? ", " : "", v[i]);
          return text + fmt::format("{}] ({} elements)", v.size() > 3 ? ", ..." : "", v.size());
        }
      },
      value);
}

constexpr std::array<std::string_view, 7> kVariantNames{
    "a bool", "an integer", "a float", "a string", "integers", "floating-point numbers", "strings"};

}  // namespace

GgufFile::GgufFile(const std::filesystem::path& path) : path_(path), file_(path) {
  const std::string name = path.string();
  Cursor in(file_.bytes(), name);
  if (std::memcmp(in.take(4, "magic"), "GGUF", 4) != 0)
    fail("{}: magic: expected 'GGUF', found other bytes", name);
  auto version = in.read<uint32_t>("version");
  if (version != 2 && version != 3)
    fail("{}: version: expected GGUF 2 or 3, little-endian, found {}{}", name, version,
         (version & 0xffffu) == 0 ? " (big-endian?)" : "");
  version_ = static_cast<int>(version);
  auto n_tensors = in.read<uint64_t>("tensor count");
  auto n_values = in.read<uint64_t>("metadata count");
  if (n_tensors > in.remaining() / kSmallestTensorInfo)
    fail("{}: tensor count: expected at most {} in a file of this size, found {}", name,
         in.remaining() / kSmallestTensorInfo, n_tensors);
  if (n_values > in.remaining() / kSmallestKeyValue)
    fail("{}: metadata count: expected at most {} in a file of this size, found {}", name,
         in.remaining() / kSmallestKeyValue, n_values);

  for (uint64_t i = 0; i < n_values; ++i) {
    std::string_view key = in.string("metadata key");
    if (key.empty() || key.size() > 65535)
      fail("{}: metadata key {}: expected 1 to 65535 bytes, found {}", name, i, key.size());
    std::string field = printable(key);
    auto [at, inserted] = values_.emplace(key, read_value(in, field, name));
    if (!inserted) fail("{}: metadata key '{}': expected once, found twice", name, field);
    text_.emplace_back(key, as_text(at->second));
  }

  tensors_.reserve(n_tensors);
  std::set<std::string_view> names;
  for (uint64_t i = 0; i < n_tensors; ++i) {
    tensors_.push_back(read_tensor_info(in, name));
    if (!names.insert(tensors_.back().name).second)
      fail("{}: tensor '{}': expected once, found twice", name, printable(tensors_.back().name));
  }

  uint64_t alignment = 32;
  if (const auto* given = find_value<int64_t>("general.alignment")) {
    if (*given < 8 || *given > 65536 || (*given & (*given - 1)) != 0)
      fail("{}: general.alignment: expected a power of two from 8 to 65536, found {}", name, *given);
    alignment = static_cast<uint64_t>(*given);
  }
  const uint64_t data_start = (in.offset() + alignment - 1) / alignment * alignment;
  for (TensorView& tensor : tensors_) {
    if (tensor.file_offset % alignment != 0)
      fail("{}: tensor '{}': offset: expected a multiple of {}, found {}", name, printable(tensor.name),
           alignment, tensor.file_offset);
    uint64_t size = file_.bytes().size();
    if (data_start > size || tensor.file_offset > size - data_start ||
        tensor.bytes > size - data_start - tensor.file_offset)
      fail(
          "{}: tensor '{}': expected {} bytes at offset {} of the data, found a file of {} bytes whose data "
          "begin at {}",
          name, printable(tensor.name), tensor.bytes, tensor.file_offset, size, data_start);
    tensor.file_offset += data_start;
    tensor.data = file_.bytes().data() + tensor.file_offset;
  }
}

void GgufFile::wrong_type(std::string_view key, size_t found) const {
  fail("{}: metadata '{}': found {} where another type was expected", describe(), key, kVariantNames[found]);
}

void GgufFile::missing(std::string_view key) const {
  fail("{}: metadata '{}' is missing", describe(), key);
}

}  // namespace kvlapse
