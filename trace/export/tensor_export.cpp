#include "trace/export/tensor_export.h"

#include <fmt/format.h>

#include <cstdint>
#include <cstdio>
#include <functional>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <vector>

#include "core/base/error.h"
#include "trace/crc32.h"

namespace kvlapse {
namespace {

constexpr int kPieceTokens = 512;

using Sink = std::function<void(std::span<const std::byte>)>;

struct Tensor {
  std::string name;
  std::string_view type;  // of safetensors
  std::vector<int64_t> shape;
  size_t bytes = 0;
  std::function<void(const Sink&)> write;
};

class OutputFile {
 public:
  explicit OutputFile(const std::filesystem::path& path)
      : path_(path), file_(std::fopen(path.c_str(), "wb"), &std::fclose) {
    if (!file_) fail("export: {}: cannot be written", path.string());
  }
  void write(std::span<const std::byte> bytes) {
    if (std::fwrite(bytes.data(), 1, bytes.size(), file_.get()) != bytes.size()) broken();
    size_ += bytes.size();
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }
  uint64_t size() const { return size_; }
  // Overwrites what was written before; the end stays the place of the next write.
  void patch(uint64_t offset, std::string_view text) {
    if (std::fseek(file_.get(), static_cast<long>(offset), SEEK_SET) != 0 ||
        std::fwrite(text.data(), 1, text.size(), file_.get()) != text.size() ||
        std::fseek(file_.get(), 0, SEEK_END) != 0)
      broken();
  }
  void finish() {
    if (std::fflush(file_.get()) != 0) broken();
  }

 private:
  [[noreturn]] void broken() const {
    fail("export: {}: cannot be written: is the disk full?", path_.string());
  }
  std::filesystem::path path_;
  std::unique_ptr<std::FILE, int (*)(std::FILE*)> file_;
  uint64_t size_ = 0;
};

std::string_view safetensors_type(DType type) {
  switch (type) {
    case DType::f32: return "F32";
    case DType::f16: return "F16";
    case DType::bf16: return "BF16";
    case DType::f8e4m3: break;
  }
  fail("export: q, k and v: expected fp32, fp16 or bf16, found {}", dtype_name(type));
}

std::vector<int32_t> last_seen(const TraceReader& trace, int sequence, int layer) {
  const CacheGeometry& g = trace.header().geometry;
  const int n_tokens = trace.n_steps(sequence);
  std::vector<int32_t> last(static_cast<size_t>(g.n_kv_heads) * n_tokens,
                            std::numeric_limits<int32_t>::max());
  for (const TraceEviction& e : trace.evictions(sequence, layer, 0, n_tokens)) {
    const int begin = e.kv_head == kWholeLayer ? 0 : e.kv_head;
    const int end = e.kv_head == kWholeLayer ? g.n_kv_heads : e.kv_head + 1;
    for (int h = begin; h < end; ++h) last[static_cast<size_t>(h) * n_tokens + e.pos] = e.step;
  }
  return last;
}

std::vector<Tensor> tensors_of(const TraceReader& trace, const TensorExport& what, bool widen_bf16) {
  const TraceHeader& header = trace.header();
  const CacheGeometry& g = header.geometry;
  if (header.tier != TraceTier::qkv)
    fail("export: {}: expected a trace with q, k and v (tier qkv), found tier {}", trace.file().string(),
         tier_name(header.tier));
  if (what.sequence < 0 || what.sequence >= trace.n_sequences())
    fail("export: {}: sequence: expected 0 to {}, found {}", trace.file().string(), trace.n_sequences() - 1,
         what.sequence);
  const int begin = what.layer_begin < 0 ? header.layer_begin : what.layer_begin;
  const int end = what.layer_end < 0 ? header.layer_end : what.layer_end;
  if (begin < header.layer_begin || end > header.layer_end || begin >= end)
    fail("export: {}: layers: expected a range within the recorded {}:{}, found {}:{}", trace.file().string(),
         header.layer_begin, header.layer_end, begin, end);
  const int n_tokens = trace.n_steps(what.sequence);
  const bool widen = widen_bf16 && g.dtype == DType::bf16;
  const DType type = widen ? DType::f32 : g.dtype;
  std::vector<Tensor> tensors;
  if (const std::vector<int32_t> ids = trace.sequence(what.sequence).tokens;
      !ids.empty() && ids[0] != kNoToken)
    tensors.push_back(
        {"tokens", "I32", {n_tokens}, n_tokens * sizeof(int32_t), [ids, n_tokens](const Sink& sink) {
           sink(std::as_bytes(std::span(ids).first(n_tokens)));
         }});
  for (int layer = begin; layer < end; ++layer) {
    for (const auto& [name, kind] : {std::pair{"q", RowKind::q}, {"k", RowKind::k}, {"v", RowKind::v}}) {
      const int n_heads = kind == RowKind::q ? g.n_q_heads : g.n_kv_heads;
      const size_t row_values = static_cast<size_t>(n_heads) * g.head_dim;
      Tensor t{
          fmt::format("{}.L{}", name, layer), safetensors_type(type), {n_tokens, n_heads, g.head_dim}, 0, {}};
      t.bytes = static_cast<size_t>(n_tokens) * row_values * dtype_bytes(type);
      t.write = [&trace, kind = kind, layer, n_tokens, row_values, type, widen,
                 sequence = what.sequence](const Sink& sink) {
        std::vector<std::byte> piece(kPieceTokens * row_values * dtype_bytes(type));
        for (int first = 0; first < n_tokens; first += kPieceTokens) {
          const int n = std::min(kPieceTokens, n_tokens - first);
          if (widen)
            trace.read_rows(sequence, layer, kind, first, n, reinterpret_cast<float*>(piece.data()));
          else
            trace.read_rows_raw(sequence, layer, kind, first, n, piece.data());
          sink(std::span(piece).first(static_cast<size_t>(n) * row_values * dtype_bytes(type)));
        }
      };
      tensors.push_back(std::move(t));
    }
    Tensor mask{fmt::format("mask.L{}", layer), "I32", {g.n_kv_heads, n_tokens}, 0, {}};
    mask.bytes = static_cast<size_t>(g.n_kv_heads) * n_tokens * sizeof(int32_t);
    mask.write = [&trace, layer, sequence = what.sequence](const Sink& sink) {
      const std::vector<int32_t> last = last_seen(trace, sequence, layer);
      sink(std::as_bytes(std::span(last)));
    };
    tensors.push_back(std::move(mask));
  }
  return tensors;
}

template <typename T>
void put(std::string& out, T value) {
  out.append(reinterpret_cast<const char*>(&value), sizeof value);  // little endian, as every file of ours
}

// What an import needs to know besides the tensors: metadata of safetensors, scalars of an npz.
struct Fact {
  std::string name, text;
  std::string npy_type, npy_data;
};

std::vector<Fact> facts_of(const TraceReader& trace, const TensorExport& what) {
  const TraceHeader& header = trace.header();
  const TraceSequence sequence = trace.sequence(what.sequence);
  std::vector<Fact> facts;
  const auto text = [&](const char* name, const std::string& value) {
    if (!value.empty()) facts.push_back({name, value, fmt::format("|S{}", value.size()), value});
  };
  const auto whole = [&](const char* name, int64_t value) {
    std::string data;
    put(data, value);
    facts.push_back({name, fmt::format("{}", value), "<i8", data});
  };
  text("content_hash", trace.content_hash());
  text("kv_dtype", std::string(dtype_name(header.geometry.dtype)));
  if (const auto model = header.meta.find("model"); model != header.meta.end()) text("model", model->second);
  whole("n_layers", header.geometry.n_layers);
  whole("n_prompt", sequence.n_prompt);
  if (header.rope_theta > 0) {
    std::string data;
    put(data, header.rope_theta);
    facts.push_back({"rope_theta", fmt::format("{}", header.rope_theta), "<f8", data});
  }
  if (sequence.think_begin >= 0) whole("think_begin", sequence.think_begin);
  if (sequence.think_end >= 0) whole("think_end", sequence.think_end);
  return facts;
}

std::string_view npy_type(const Tensor& t) {
  return t.type == "F32" ? "<f4" : t.type == "F16" ? "<f2" : "<i4";
}

// Version 1.0 of the npy format; the data begins at a multiple of 64 bytes.
std::string npy_header(std::string_view type, const std::vector<int64_t>& sizes) {
  std::string shape;
  for (int64_t d : sizes) shape += fmt::format("{}, ", d);
  std::string dict = fmt::format("{{'descr': '{}', 'fortran_order': False, 'shape': ({}), }}", type, shape);
  dict.append(63 - (10 + dict.size()) % 64, ' ');
  dict += '\n';
  std::string out("\x93NUMPY\x01\x00", 8);
  put(out, static_cast<uint16_t>(dict.size()));
  return out + dict;
}

// Fields that a zip's local header and central directory share, from "version needed" on.
std::string zip_fields(uint32_t crc, uint64_t bytes, const std::string& name) {
  std::string out;
  put<uint16_t>(out, 20);        // version needed
  put<uint16_t>(out, 0);         // flags
  put<uint16_t>(out, 0);         // stored
  put<uint32_t>(out, 0x210000);  // 1980-01-01: equal traces give equal files
  put(out, crc);
  put(out, static_cast<uint32_t>(bytes));
  put(out, static_cast<uint32_t>(bytes));
  put(out, static_cast<uint16_t>(name.size()));
  put<uint16_t>(out, 0);  // no extra field
  return out;
}

}  // namespace

void export_safetensors(const TraceReader& trace, const TensorExport& what,
                        const std::filesystem::path& file) {
  const std::vector<Tensor> tensors = tensors_of(trace, what, false);
  nlohmann::ordered_json metadata = {{"format", "kvlapse"}};
  for (const Fact& fact : facts_of(trace, what)) metadata[fact.name] = fact.text;
  std::string header =
      "{\"__metadata__\":" + metadata.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace);
  size_t offset = 0;
  for (const Tensor& t : tensors) {
    std::string shape;
    for (int64_t d : t.shape) shape += fmt::format("{}{}", shape.empty() ? "" : ",", d);
    header += fmt::format(",\"{}\":{{\"dtype\":\"{}\",\"shape\":[{}],\"data_offsets\":[{},{}]}}", t.name,
                          t.type, shape, offset, offset + t.bytes);
    offset += t.bytes;
  }
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  std::string length;
  put(length, static_cast<uint64_t>(header.size()));
  OutputFile out(file);
  out.write(length);
  out.write(header);
  for (const Tensor& t : tensors) t.write([&](std::span<const std::byte> bytes) { out.write(bytes); });
  out.finish();
}

void export_npz(const TraceReader& trace, const TensorExport& what, const std::filesystem::path& file) {
  constexpr uint64_t kMostBytes = uint64_t{4} * 1000 * 1000 * 1000;  // 32-bit offsets
  const std::vector<Tensor> tensors = tensors_of(trace, what, true);
  uint64_t total = 0;
  for (const Tensor& t : tensors) total += t.bytes + 1024;
  if (total > kMostBytes)
    fail("export: {}: npz: expected at most {} bytes of tensors, found {}: choose --layers, or safetensors",
         trace.file().string(), kMostBytes, total);
  OutputFile out(file);
  std::string directory;
  uint16_t n_members = 0;
  const auto add = [&](const std::string& array, const std::string& npy, size_t data_bytes,
                       const std::function<void(const Sink&)>& write) {
    const std::string name = array + ".npy";
    const uint64_t start = out.size(), bytes = npy.size() + data_bytes;
    out.write("PK\x03\x04");
    const uint64_t fields = out.size();
    out.write(zip_fields(0, bytes, name));
    out.write(name);
    Crc32 crc;
    crc.add(std::as_bytes(std::span(npy)));
    out.write(npy);
    write([&](std::span<const std::byte> piece) {
      crc.add(piece);
      out.write(piece);
    });
    const std::string known = zip_fields(crc.value(), bytes, name);
    out.patch(fields, known);
    directory += "PK\x01\x02";
    put<uint16_t>(directory, 20);  // made by
    directory += known;
    put<uint16_t>(directory, 0);  // comment
    put<uint16_t>(directory, 0);  // disk
    put<uint16_t>(directory, 0);  // internal attributes
    put<uint32_t>(directory, 0);  // external attributes
    put(directory, static_cast<uint32_t>(start));
    directory += name;
    ++n_members;
  };
  for (const Fact& fact : facts_of(trace, what))
    add(fact.name, npy_header(fact.npy_type, {}), fact.npy_data.size(),
        [&](const Sink& sink) { sink(std::as_bytes(std::span(fact.npy_data))); });
  for (const Tensor& t : tensors) add(t.name, npy_header(npy_type(t), t.shape), t.bytes, t.write);
  const uint64_t start = out.size();
  out.write(directory);
  std::string end("PK\x05\x06");
  put<uint32_t>(end, 0);  // disks
  put(end, n_members);
  put(end, n_members);
  put(end, static_cast<uint32_t>(directory.size()));
  put(end, static_cast<uint32_t>(start));
  put<uint16_t>(end, 0);  // comment
  out.write(end);
  out.finish();
}

}  // namespace kvlapse
