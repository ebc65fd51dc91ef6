#include "trace/import/tensor_import.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>

#include "core/base/error.h"
#include "core/base/sha256.h"
#include "core/model/mapped_file.h"
#include "core/policy/spec.h"
#include "trace/import/npz_file.h"
#include "trace/row_convert.h"

namespace kvlapse {
namespace {

constexpr int32_t kHeldToTheEnd = std::numeric_limits<int32_t>::max();  // in a mask
constexpr int kMostLayers = 4096;                                       // of a trace

constexpr std::array kKinds = {RowKind::q, RowKind::k, RowKind::v};

struct LayerTensors {
  std::array<const TensorView*, 3> rows{};  // by RowKind
  const TensorView* mask = nullptr;
};

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

std::string printable(std::string_view text) {
  std::string out;
  for (unsigned char c : text.substr(0, 120)) out += c < 0x20 || c == 0x7f ? '?' : static_cast<char>(c);
  return out;
}

// One file: its tensors by layer, shapes and types checked; values are not.
class SourceFile {
 public:
  SourceFile(const std::filesystem::path& path, ImportFormat format)
      : name_(path.string()), file_(format == ImportFormat::npz ? open_npz(path) : open_safetensors(path)) {
    for (const TensorView& tensor : file_->tensors()) place(tensor);
    if (layers_.empty())
      fail("{}: expected tensors q.L<layer>, k.L<layer> and v.L<layer>, found none", name_);
    int expected = layers_.begin()->first;
    for (const auto& [layer, tensors] : layers_) {
      for (RowKind kind : kKinds)
        if (layer != expected || tensors.rows[static_cast<int>(kind)] == nullptr)
          fail("{}: layers: expected the tensor '{}.L{}', found none (layers {} to {})", name_,
               row_kind_name(kind), expected, layers_.begin()->first, layers_.rbegin()->first);
      ++expected;
    }
    check_shapes();
    if (tokens_) check_tokens();
  }

  const std::string& name() const { return name_; }
  int layer_begin() const { return layers_.begin()->first; }
  int layer_end() const { return layers_.rbegin()->first + 1; }
  const LayerTensors& layer(int layer) const { return layers_.at(layer); }
  int n_tokens() const { return n_tokens_; }
  int n_heads(RowKind kind) const { return kind == RowKind::q ? n_q_heads_ : n_kv_heads_; }
  int head_dim() const { return head_dim_; }
  DType dtype() const { return dtype_; }
  bool has_tokens() const { return tokens_ != nullptr; }

  int32_t token(int pos) const {
    if (!tokens_) return kNoToken;
    if (tokens_->type == TensorType::i64) {
      int64_t id = 0;
      std::memcpy(&id, tokens_->data + pos * sizeof id, sizeof id);
      return id >= 0 && id <= std::numeric_limits<int32_t>::max() ? static_cast<int32_t>(id) : kNoToken;
    }
    int32_t id = 0;
    std::memcpy(&id, tokens_->data + pos * sizeof id, sizeof id);
    return id;
  }

  std::string text(std::string_view key) const {
    for (const auto& [name, value] : file_->metadata())
      if (name == key) return value;
    return {};
  }
  template <typename Number>
  std::optional<Number> number(std::string_view key, Number least, Number most) const {
    const std::string written = text(key);
    if (written.empty()) return {};
    Number value{};
    const auto [end, error] = std::from_chars(written.data(), written.data() + written.size(), value);
    if (error != std::errc() || end != written.data() + written.size() || !(value >= least && value <= most))
      fail("{}: {}: expected a number from {} to {}, found '{}'", name_, key, least, most,
           printable(written));
    return value;
  }

  // Metadata of an npz are arrays: a name that nobody reads is a mistake. Other tools write their own into
  // safetensors.
  void check_names(ImportFormat format) const {
    if (format != ImportFormat::npz) return;
    constexpr std::string_view kKnown[] = {"content_hash", "kv_dtype",   "model",       "n_layers",
                                           "n_prompt",     "rope_theta", "think_begin", "think_end"};
    for (const auto& [name, value] : file_->metadata())
      if (std::find(std::begin(kKnown), std::end(kKnown), name) == std::end(kKnown))
        fail("{}: scalar '{}': expected one of {}, found another name", name_, printable(name),
             fmt::join(kKnown, ", "));
  }

  // Rows [first, first + n) as fp32.
  void load(int layer, RowKind kind, int first, int n, float* out) const {
    const size_t width = static_cast<size_t>(n_heads(kind)) * head_dim_;
    const TensorView& tensor = *layers_.at(layer).rows[static_cast<int>(kind)];
    load_rows(tensor.data + static_cast<size_t>(first) * width * dtype_bytes(dtype_), n * width, dtype_, out);
  }

  int64_t evicted() const {
    int64_t count = 0;
    for (const auto& [layer, tensors] : layers_)
      for (size_t i = 0; tensors.mask && i < tensors.mask->bytes; i += sizeof(int32_t)) {
        int32_t last = 0;
        std::memcpy(&last, tensors.mask->data + i, sizeof last);
        count += last != kHeldToTheEnd;
      }
    return count;
  }

 private:
  void place(const TensorView& tensor) {
    if (tensor.name == "tokens") {
      tokens_ = &tensor;
      return;
    }
    const size_t dot = tensor.name.find(".L");
    int layer = -1;
    if (dot != tensor.name.npos) {
      const std::string_view digits = tensor.name.substr(dot + 2);
      const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), layer);
      if (error != std::errc() || end != digits.data() + digits.size() ||
          fmt::format("{}", layer) != digits || layer < 0 || layer >= kMostLayers)
        layer = -1;
    }
    const std::string_view kind = tensor.name.substr(0, dot);
    if (layer >= 0) {
      for (RowKind each : kKinds)
        if (row_kind_name(each) == kind) {
          layers_[layer].rows[static_cast<int>(each)] = &tensor;
          return;
        }
      if (kind == "mask") {
        layers_[layer].mask = &tensor;
        return;
      }
    }
    fail(
        "{}: tensor '{}': expected q.L<layer>, k.L<layer>, v.L<layer>, mask.L<layer> or tokens, found "
        "another name",
        name_, printable(tensor.name));
  }

  DType row_type(const TensorView& tensor) const {
    if (tensor.type == TensorType::f32) return DType::f32;
    if (tensor.type == TensorType::f16) return DType::f16;
    if (tensor.type == TensorType::bf16) return DType::bf16;
    fail("{}: tensor '{}': dtype: expected fp32, fp16 or bf16, found {}", name_, tensor.name,
         tensor_type_name(tensor.type));
  }

  void expect_shape(const TensorView& tensor, std::vector<int64_t> shape, std::string_view meaning) const {
    if (tensor.shape != shape)
      fail("{}: tensor '{}': shape: expected {} = {}, found {}", name_, tensor.name, meaning,
           shape_text(shape), shape_text(tensor.shape));
  }

  void check_shapes() {
    const LayerTensors& first = layers_.begin()->second;
    for (const TensorView* tensor : first.rows)
      if (tensor->shape.size() != 3 || std::count(tensor->shape.begin(), tensor->shape.end(), 0) > 0)
        fail("{}: tensor '{}': shape: expected [tokens, heads, head_dim], found {}", name_, tensor->name,
             shape_text(tensor->shape));
    const std::vector<int64_t>&q = first.rows[0]->shape, &k = first.rows[1]->shape;
    if (k[1] > kMostLayers || q[1] > kMostLayers || q[2] > kMostLayers)
      fail("{}: tensor '{}': shape: expected at most {} heads of {}, found {}", name_, first.rows[0]->name,
           kMostLayers, kMostLayers, shape_text(q));
    if (q[1] % k[1] != 0)
      fail("{}: tensor '{}': heads: expected a multiple of the {} kv heads of '{}', found {}", name_,
           first.rows[0]->name, k[1], first.rows[1]->name, q[1]);
    n_tokens_ = static_cast<int>(q[0]);
    n_q_heads_ = static_cast<int>(q[1]);
    n_kv_heads_ = static_cast<int>(k[1]);
    head_dim_ = static_cast<int>(q[2]);
    dtype_ = row_type(*first.rows[0]);
    for (const auto& [layer, tensors] : layers_) {
      for (RowKind kind : kKinds) {
        const TensorView& tensor = *tensors.rows[static_cast<int>(kind)];
        expect_shape(tensor, {n_tokens_, n_heads(kind), head_dim_},
                     kind == RowKind::q ? "[tokens, q_heads, head_dim]" : "[tokens, kv_heads, head_dim]");
        if (const DType found = row_type(tensor); found != dtype_)
          fail("{}: tensor '{}': dtype: expected {} as of '{}', found {}", name_, tensor.name,
               dtype_name(dtype_), first.rows[0]->name, dtype_name(found));
      }
      if (!tensors.mask) continue;
      expect_shape(*tensors.mask, {n_kv_heads_, n_tokens_}, "[kv_heads, tokens]");
      if (tensors.mask->type != TensorType::i32)
        fail("{}: tensor '{}': dtype: expected I32, found {}", name_, tensors.mask->name,
             tensor_type_name(tensors.mask->type));
    }
  }

  void check_tokens() const {
    expect_shape(*tokens_, {n_tokens_}, "[tokens]");
    if (tokens_->type != TensorType::i32 && tokens_->type != TensorType::i64)
      fail("{}: tensor 'tokens': dtype: expected I32 or I64, found {}", name_,
           tensor_type_name(tokens_->type));
    for (int pos = 0; pos < n_tokens_; ++pos)
      if (token(pos) < 0)
        fail("{}: tensor 'tokens': position {}: expected an id from 0 to 2147483647, found another", name_,
             pos);
  }

  std::string name_;
  std::unique_ptr<TensorFile> file_;
  std::map<int, LayerTensors> layers_;
  const TensorView* tokens_ = nullptr;
  int n_tokens_ = 0, n_q_heads_ = 0, n_kv_heads_ = 0, head_dim_ = 0;
  DType dtype_ = DType::f32;
};

template <typename Value>
std::optional<Value> agreed(const std::string& file, std::string_view name, const std::optional<Value>& said,
                            const std::optional<Value>& asked) {
  if (said && asked && *said != *asked)
    fail("{}: {}: expected {} as given, found {}", file, name, *asked, *said);
  return said ? said : asked;
}

// Finite, and exactly representable in the trace's dtype.
void check_values(const SourceFile& source, DType dtype) {
  std::vector<float> rows, back;
  std::vector<std::byte> stored;
  for (int layer = source.layer_begin(); layer < source.layer_end(); ++layer)
    for (RowKind kind : kKinds) {
      const size_t width = static_cast<size_t>(source.n_heads(kind)) * source.head_dim();
      for (int first = 0; first < source.n_tokens(); first += kChunkSteps) {
        const int n = std::min(kChunkSteps, source.n_tokens() - first);
        rows.resize(n * width);
        source.load(layer, kind, first, n, rows.data());
        const auto where = [&](size_t i) {
          return fmt::format("{}: tensor '{}.L{}': position {}, head {}", source.name(), row_kind_name(kind),
                             layer, first + static_cast<int>(i / width),
                             i % width / static_cast<size_t>(source.head_dim()));
        };
        for (size_t i = 0; i < rows.size(); ++i)
          if (!std::isfinite(rows[i])) fail("{}: expected finite numbers, found {}", where(i), rows[i]);
        if (dtype == source.dtype()) continue;
        stored.resize(rows.size() * dtype_bytes(dtype));
        back.resize(rows.size());
        store_rows(rows.data(), rows.size(), dtype, stored.data());
        load_rows(stored.data(), rows.size(), dtype, back.data());
        for (size_t i = 0; i < rows.size(); ++i)
          if (rows[i] != back[i])
            fail("{}: expected values that {} holds exactly, found {}", where(i), dtype_name(dtype), rows[i]);
      }
    }
}

std::string hash_of(const std::filesystem::path& path) {
  return sha256_hex(MappedFile(path).bytes());
}

// Returns false when the caller asked to stop.
bool write_sequence(TraceWriter& writer, const SourceFile& source, int sequence, int n_prompt,
                    const std::function<bool(int)>& progress) {
  const TraceHeader& header = writer.header();
  const CacheGeometry& g = header.geometry;
  const int n_tokens = source.n_tokens();
  std::vector<int32_t> prompt(n_prompt), held(g.n_kv_heads);
  for (int pos = 0; pos < n_prompt; ++pos) prompt[pos] = source.token(pos);
  writer.begin_sequence(sequence, 0, 0, prompt);
  TraceSequence facts;
  facts.sequence = sequence;
  facts.think_begin = source.number<int>("think_begin", 0, n_tokens - 1).value_or(-1);
  facts.think_end = source.number<int>("think_end", 0, n_tokens - 1).value_or(-1);
  writer.describe_sequence(facts);
  const int n_layers = source.layer_end() - source.layer_begin();
  std::vector<std::array<std::vector<float>, 3>> rows(n_layers);
  for (int first = 0; first < n_tokens; first += kChunkSteps) {
    if (progress && !progress(first)) return false;
    const int n = std::min(kChunkSteps, n_tokens - first);
    for (int l = 0; l < n_layers; ++l)
      for (RowKind kind : kKinds) {
        std::vector<float>& values = rows[l][static_cast<int>(kind)];
        values.resize(static_cast<size_t>(n) * source.n_heads(kind) * g.head_dim);
        source.load(source.layer_begin() + l, kind, first, n, values.data());
      }
    for (int pos = first; pos < first + n; ++pos) {
      std::fill(held.begin(), held.end(), pos + 1);
      for (int layer = 0; layer < g.n_layers; ++layer) {
        LayerRecord record{held, nullptr, {}};
        TokenRows token;
        if (header.has_rows(layer)) {
          const auto& [q, k, v] = rows[layer - source.layer_begin()];
          const size_t at = static_cast<size_t>(pos - first) * g.head_dim;
          token = {q.data() + at * g.n_q_heads, k.data() + at * g.n_kv_heads, v.data() + at * g.n_kv_heads};
          record.rows = &token;
        }
        writer.append(sequence, layer, Pos{pos}, record);
      }
      if (pos >= n_prompt - 1) writer.pass(sequence, source.token(pos));
    }
  }
  return true;
}

}  // namespace

ImportedTrace import_tensors(std::span<const std::filesystem::path> files, ImportFormat format,
                             const ImportFacts& facts, const std::filesystem::path& trace,
                             const ImportOptions& options) {
  std::vector<SourceFile> sources;
  sources.reserve(files.size());
  for (const std::filesystem::path& file : files) sources.emplace_back(file, format);
  const SourceFile& first = sources.front();

  TraceHeader header;
  CacheGeometry& g = header.geometry;
  g.n_q_heads = first.n_heads(RowKind::q);
  g.n_kv_heads = first.n_heads(RowKind::k);
  g.head_dim = first.head_dim();
  header.layer_begin = first.layer_begin();
  header.layer_end = first.layer_end();
  header.tier = TraceTier::qkv;
  header.n_sequences = static_cast<int>(sources.size());

  ImportedTrace out;
  std::vector<int> n_prompt;
  std::string names, hashes;
  for (size_t s = 0; s < sources.size(); ++s) {
    const SourceFile& source = sources[s];
    source.check_names(format);
    const std::array here = {source.layer_begin(), source.layer_end(), source.n_heads(RowKind::q),
                             source.n_heads(RowKind::k), source.head_dim()};
    const std::array wanted = {header.layer_begin, header.layer_end, g.n_q_heads, g.n_kv_heads, g.head_dim};
    if (here != wanted)
      fail(
          "{}: layers, q heads, kv heads and head_dim: expected {}:{}, {}, {} and {} as in {}, found {}:{}, "
          "{}, {} and {}",
          source.name(), wanted[0], wanted[1], wanted[2], wanted[3], wanted[4], first.name(), here[0],
          here[1], here[2], here[3], here[4]);
    const std::optional<int> prompt = agreed(
        source.name(), "n_prompt", source.number<int>("n_prompt", 1, source.n_tokens()), facts.n_prompt);
    if (!prompt)
      fail("{}: n_prompt: expected the prompt's tokens in the metadata or as --prompt, found neither",
           source.name());
    if (*prompt < 1 || *prompt > source.n_tokens())
      fail("{}: n_prompt: expected 1 to {}, found {}", source.name(), source.n_tokens(), *prompt);
    n_prompt.push_back(*prompt);
    const int n_layers =
        source.number<int>("n_layers", header.layer_end, kMostLayers).value_or(header.layer_end);
    const double theta =
        agreed(source.name(), "rope_theta", source.number<double>("rope_theta", 0, 1e300), facts.rope_theta)
            .value_or(0);
    std::string model = source.text("model");
    if (!model.empty() && !facts.model.empty() && model != facts.model)
      fail("{}: model: expected '{}' as given, found '{}'", source.name(), facts.model, printable(model));
    if (model.empty()) model = facts.model;
    DType dtype = facts.kv_dtype.value_or(source.dtype());
    if (const std::string said = source.text("kv_dtype"); !said.empty() && !facts.kv_dtype) {
      const auto known = {DType::f32, DType::f16, DType::bf16};
      const auto found =
          std::find_if(known.begin(), known.end(), [&](DType d) { return dtype_name(d) == said; });
      if (found == known.end())
        fail("{}: kv_dtype: expected fp32, fp16 or bf16, found '{}'", source.name(), printable(said));
      dtype = *found;
    }
    if (s == 0) {
      g.n_layers = n_layers;
      g.dtype = dtype;
      header.rope_theta = theta;
      if (!model.empty()) header.meta["model"] = model;
    } else if (n_layers != g.n_layers || dtype != g.dtype || theta != header.rope_theta ||
               (header.meta.contains("model") ? header.meta["model"] : "") != model) {
      fail(
          "{}: n_layers, kv_dtype, rope_theta and model: expected {}, {}, {} and '{}' as in {}, found {}, "
          "{}, {} and '{}'",
          source.name(), g.n_layers, dtype_name(g.dtype), header.rope_theta, header.meta["model"],
          first.name(), n_layers, dtype_name(dtype), theta, printable(model));
    }
    check_values(source, dtype);
    out.n_tokens += source.n_tokens();
    out.evicted += source.evicted();
    out.tokens_known = out.tokens_known && source.has_tokens();
    names += (s > 0 ? ", " : "") + files[s].filename().string();
    hashes += (s > 0 ? ", " : "") + hash_of(files[s]);
  }

  const std::unique_ptr<Policy> full = make_policy("full");
  header.policy = describe_policy(*full, 0, g.n_layers);
  header.meta["imported_format"] = format == ImportFormat::npz ? "npz" : "safetensors";
  header.meta["imported_file"] = names;
  header.meta["imported_sha256"] = hashes;
  header.meta["imported_evictions"] = std::to_string(out.evicted);
  TraceWriter writer(trace, header, {.force = options.force});
  int64_t done = 0;
  for (size_t s = 0; s < sources.size() && !out.interrupted; ++s) {
    const int sequence = static_cast<int>(s);
    out.interrupted = !write_sequence(writer, sources[s], sequence, n_prompt[s], [&](int pos) {
      return !options.progress || options.progress(done + pos, out.n_tokens);
    });
    writer.end_sequence(sequence, out.interrupted ? "interrupted" : "imported");
    done += sources[s].n_tokens();
  }
  writer.finish(out.interrupted);
  out.n_sequences = header.n_sequences;
  out.layer_begin = header.layer_begin;
  out.layer_end = header.layer_end;
  out.geometry = g;
  out.file_bytes = writer.file_bytes();
  return out;
}

}  // namespace kvlapse
