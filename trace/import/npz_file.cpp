#include "trace/import/npz_file.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <limits>
#include <set>

#include "core/base/error.h"
#include "core/model/mapped_file.h"
#include "trace/crc32.h"

namespace kvlapse {
namespace {

using Bytes = std::span<const std::byte>;

constexpr size_t kEndBytes = 22, kEntryBytes = 46, kLocalBytes = 30;  // of zip's records, without names
constexpr size_t kMostComment = 65535;
constexpr int kMostDimensions = 8;

std::string printable(std::string_view text) {
  std::string out;
  for (unsigned char c : text.substr(0, 120)) out += c < 0x20 || c >= 0x7f ? '?' : static_cast<char>(c);
  return out;
}

class NpzFile final : public TensorFile {
 public:
  explicit NpzFile(const std::filesystem::path& path) : path_(path.string()), file_(path) {
    const size_t end = find_end();
    const auto n_entries = number<uint16_t>(end + 10, "end of directory");
    size_t at = number<uint32_t>(end + 16, "end of directory");
    if (n_entries == 0xffff || at == 0xffffffff)
      fail("{}: zip: expected at most 65534 arrays and 4 GiB, found a zip64: use safetensors", path_);
    std::set<std::string> names;
    for (int i = 0; i < n_entries; ++i) at = read_entry(at, names);
  }

  std::span<const TensorView> tensors() const override { return tensors_; }
  std::span<const std::pair<std::string, std::string>> metadata() const override { return metadata_; }
  std::string describe() const override { return path_; }

 private:
  Bytes piece(uint64_t offset, uint64_t bytes, std::string_view what) const {
    const Bytes all = file_.bytes();
    if (offset > all.size() || bytes > all.size() - offset)
      fail("{}: {}: expected {} bytes at {}, found the end of the file at {}", path_, what, bytes, offset,
           all.size());
    return all.subspan(offset, bytes);
  }
  template <typename T>
  T number(uint64_t offset, std::string_view what) const {
    T value{};
    std::memcpy(&value, piece(offset, sizeof value, what).data(), sizeof value);
    return value;
  }
  std::string_view text(uint64_t offset, uint64_t bytes, std::string_view what) const {
    return {reinterpret_cast<const char*>(piece(offset, bytes, what).data()), bytes};
  }

  size_t find_end() const {
    const size_t size = file_.bytes().size();
    if (size >= kEndBytes)
      for (size_t back = kEndBytes; back <= std::min(size, kEndBytes + kMostComment); ++back)
        if (text(size - back, 4, "zip") == "PK\x05\x06") return size - back;
    fail("{}: zip: expected the file of numpy.savez, found no zip directory", path_);
  }

  // Returns where the next entry of the directory begins.
  size_t read_entry(size_t at, std::set<std::string>& names) {
    if (text(at, 4, "zip directory") != "PK\x01\x02")
      fail("{}: zip directory: damaged at byte {}", path_, at);
    const auto method = number<uint16_t>(at + 10, "zip directory");
    const auto crc = number<uint32_t>(at + 16, "zip directory");
    const auto stored = number<uint32_t>(at + 20, "zip directory");
    const auto bytes = number<uint32_t>(at + 24, "zip directory");
    const auto name_bytes = number<uint16_t>(at + 28, "zip directory");
    const auto start = number<uint32_t>(at + 42, "zip directory");
    std::string name(text(at + kEntryBytes, name_bytes, "zip directory"));
    const size_t next = at + kEntryBytes + name_bytes + number<uint16_t>(at + 30, "zip directory") +
                        number<uint16_t>(at + 32, "zip directory");
    if (!names.insert(name).second) fail("{}: '{}': expected once, found twice", path_, printable(name));
    if (!name.ends_with(".npy"))
      fail("{}: '{}': expected arrays (*.npy) alone, found another file", path_, printable(name));
    name.resize(name.size() - 4);
    if (method != 0)
      fail("{}: '{}': expected an array that is not compressed, found zip method {}: write with numpy.savez",
           path_, printable(name), method);
    if (stored == 0xffffffff || bytes == 0xffffffff || start == 0xffffffff)
      fail("{}: '{}': expected at most 4 GiB, found a zip64 entry: use safetensors", path_, printable(name));
    if (stored != bytes || text(start, 4, name) != "PK\x03\x04")
      fail("{}: '{}': zip: damaged entry", path_, printable(name));
    const uint64_t data = start + kLocalBytes + number<uint16_t>(start + 26, printable(name)) +
                          number<uint16_t>(start + 28, printable(name));
    Crc32 found;
    found.add(piece(data, bytes, printable(name)));
    if (found.value() != crc)
      fail("{}: '{}': checksum: expected {:08x}, found {:08x}", path_, printable(name), crc, found.value());
    read_array(name, data, bytes);
    return next;
  }

  // The value behind a key of the header's dictionary, up to `until`.
  std::string_view field(std::string_view header, std::string_view key, std::string_view open, char until,
                         const std::string& name) const {
    const std::string start = fmt::format("'{}': {}", key, open);
    const size_t at = header.find(start);
    const size_t end = at == header.npos ? header.npos : header.find(until, at + start.size());
    if (end == header.npos)
      fail("{}: '{}': npy header: expected {}, found '{}'", path_, name, key, printable(header));
    return header.substr(at + start.size(), end - at - start.size());
  }

  void read_array(const std::string& raw_name, uint64_t at, uint64_t bytes) {
    const std::string name = printable(raw_name);
    if (bytes < 10 || text(at, 6, name) != "\x93NUMPY")
      fail("{}: '{}': expected an npy array, found something else", path_, name);
    const auto version = number<uint8_t>(at + 6, name);
    const uint64_t header_at = version == 1 ? 10 : 12;
    if (version < 1 || version > 3 || bytes < header_at)
      fail("{}: '{}': npy version: expected 1 to 3, found {}", path_, name, version);
    const uint64_t header_bytes =
        version == 1 ? number<uint16_t>(at + 8, name) : number<uint32_t>(at + 8, name);
    if (header_bytes > bytes - header_at)
      fail("{}: '{}': npy header: expected at most {} bytes, found {}", path_, name, bytes - header_at,
           header_bytes);
    const std::string_view header = text(at + header_at, header_bytes, name);
    const std::string_view type = field(header, "descr", "'", '\'', name);
    if (field(header, "fortran_order", "", ',', name) != "False")
      fail("{}: '{}': expected rows in C order, found Fortran order: numpy.ascontiguousarray", path_, name);
    const std::vector<int64_t> shape = shape_of(field(header, "shape", "(", ')', name), name);
    const Bytes data = piece(at + header_at + header_bytes, bytes - header_at - header_bytes, name);
    if (shape.empty()) {
      metadata_.emplace_back(raw_name, scalar(type, data, name));
      return;
    }
    TensorView tensor;
    tensor.type = type_of(type, name);
    tensor.shape = shape;
    uint64_t expected = block_bytes(tensor.type);
    for (int64_t d : shape)
      if (__builtin_mul_overflow(expected, static_cast<uint64_t>(d), &expected))
        fail("{}: '{}': shape: expected a size that fits the file", path_, name);
    if (expected != data.size())
      fail("{}: '{}': expected {} bytes of data, found {}", path_, name, expected, data.size());
    tensor.data = data.data();
    tensor.bytes = data.size();
    tensor.file_offset = static_cast<uint64_t>(data.data() - file_.bytes().data());
    names_.push_back(std::make_unique<std::string>(raw_name));
    tensor.name = *names_.back();
    tensors_.push_back(std::move(tensor));
  }

  std::vector<int64_t> shape_of(std::string_view text, const std::string& name) const {
    std::vector<int64_t> shape;
    while (true) {
      while (!text.empty() && (text[0] == ' ' || text[0] == ',')) text.remove_prefix(1);
      if (text.empty()) return shape;
      int64_t size = -1;
      const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
      if (error != std::errc() || size < 0 || size > std::numeric_limits<int32_t>::max() ||
          shape.size() == kMostDimensions)
        fail("{}: '{}': shape: expected at most {} whole numbers, found '{}'", path_, name, kMostDimensions,
             printable(text));
      shape.push_back(size);
      text.remove_prefix(static_cast<size_t>(end - text.data()));
    }
  }

  TensorType type_of(std::string_view type, const std::string& name) const {
    constexpr std::pair<std::string_view, TensorType> kTypes[] = {{"<f4", TensorType::f32},
                                                                  {"<f2", TensorType::f16},
                                                                  {"<i4", TensorType::i32},
                                                                  {"<i8", TensorType::i64}};
    for (const auto& [text, value] : kTypes)
      if (text == type) return value;
    fail("{}: '{}': dtype: expected float32, float16, int32 or int64 (<f4, <f2, <i4, <i8), found '{}'", path_,
         name, printable(type));
  }

  std::string scalar(std::string_view type, Bytes data, const std::string& name) const {
    const auto as = [&]<typename T>(T value) {
      if (data.size() != sizeof value)
        fail("{}: '{}': expected {} bytes of data, found {}", path_, name, sizeof value, data.size());
      std::memcpy(&value, data.data(), sizeof value);
      return fmt::format("{}", value);
    };
    if (type == "<i4") return as(int32_t{});
    if (type == "<i8") return as(int64_t{});
    if (type == "<f4") return as(float{});
    if (type == "<f8") return as(double{});
    const bool wide = type.starts_with("<U");  // four bytes a letter
    if (!wide && !type.starts_with("|S"))
      fail("{}: '{}': dtype: expected a number or text, found '{}'", path_, name, printable(type));
    std::string out;
    for (size_t i = 0; i < data.size(); i += wide ? 4 : 1) {
      const auto letter = static_cast<unsigned char>(data[i]);
      bool ascii = letter < 0x80;
      for (size_t more = 1; wide && more < 4 && i + more < data.size(); ++more)
        ascii = ascii && data[i + more] == std::byte{0};
      if (!ascii) fail("{}: '{}': expected ASCII text, found other letters", path_, name);
      if (letter != 0) out += static_cast<char>(letter);
    }
    return out;
  }

  std::string path_;
  MappedFile file_;
  std::vector<std::unique_ptr<std::string>> names_;  // what the views' names point into
  std::vector<TensorView> tensors_;
  std::vector<std::pair<std::string, std::string>> metadata_;
};

}  // namespace

std::unique_ptr<TensorFile> open_npz(const std::filesystem::path& path) {
  return std::make_unique<NpzFile>(path);
}

}  // namespace kvlapse
