#include "core/model/model_weights.h"

#include <xxhash.h>

#include <algorithm>
#include <cstring>

#include "core/base/error.h"
#include "core/model/model_config.h"

namespace kvlapse {
namespace {

// Index of the first NaN among n elements whose bits, sign aside, exceed `infinity`; n when there is none.
// Blocks are reduced without a branch so that the compiler vectorises them.
template <typename Bits>
size_t first_nan(const std::byte* data, size_t n, Bits infinity) {
  constexpr size_t kBlock = 4096;
  constexpr Bits kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  Bits block[kBlock];
  for (size_t begin = 0; begin < n; begin += kBlock) {
    const size_t size = std::min(kBlock, n - begin);
    std::memcpy(block, data + begin * sizeof(Bits),
                size * sizeof(Bits));  // a file's tensors may be unaligned
    Bits most = 0;
    for (size_t i = 0; i < size; ++i) most = std::max<Bits>(most, block[i] & kMagnitude);
    if (most <= infinity) continue;
    for (size_t i = 0; i < size; ++i)
      if ((block[i] & kMagnitude) > infinity) return begin + i;
  }
  return n;
}

size_t first_nan(const TensorView& t) {
  const auto n = static_cast<size_t>(t.elements());
  switch (t.type) {
    case TensorType::f32: return first_nan<uint32_t>(t.data, n, 0x7f800000u);
    case TensorType::f16: return first_nan<uint16_t>(t.data, n, 0x7c00u);
    case TensorType::bf16: return first_nan<uint16_t>(t.data, n, 0x7f80u);
    default: break;
  }
  // Quantised blocks are NaN when one of their scales is: as values, a stretch at a time.
  const int block = block_elements(t.type);
  const size_t stretch = static_cast<size_t>(block) * 64;
  std::vector<float> values(stretch);
  for (size_t begin = 0; begin < n; begin += stretch) {
    const size_t size = std::min(stretch, n - begin);
    dequantize(t.type, t.data + begin / block * block_bytes(t.type), static_cast<int64_t>(size),
               values.data());
    for (size_t i = 0; i < size; ++i)
      if (values[i] != values[i]) return begin + i;
  }
  return n;
}

std::string shape_text(std::span<const int64_t> shape) {
  return fmt::format("[{}]", fmt::join(shape, ", "));
}

class Loader {
 public:
  Loader(Weights& out, const std::function<std::string(TensorRole, int)>& name)
      : out_(out), name_(name), hash_(XXH3_createState()) {
    XXH3_128bits_reset(hash_);
  }
  ~Loader() { XXH3_freeState(hash_); }
  Loader(const Loader&) = delete;
  Loader& operator=(const Loader&) = delete;

  Matrix matrix(TensorRole role, int layer, int64_t rows, int64_t columns) {
    const auto [file, view] = get(role, layer, {rows, columns});
    switch (view->type) {
      case TensorType::i32:
      case TensorType::i64:
      case TensorType::u8:
        fail("{}: tensor '{}': expected a type that can be multiplied, found {}", file->describe(),
             view->name, tensor_type_name(view->type));
      default: break;
    }
    if (columns % block_elements(view->type) != 0)
      fail("{}: tensor '{}': expected rows of whole blocks of {}, found {} columns", file->describe(),
           view->name, block_elements(view->type), columns);
    return {view->type, rows, columns, aligned(*view)};
  }

  // A matrix whose rows pair dimensions (2i, 2i + 1) in every head, as (i, i + D/2). Rows move whole, so
  // quantised blocks stay as they are.
  Matrix half_split(Matrix interleaved, int head_dim) {
    const size_t row = interleaved.row_bytes();
    const int half = head_dim / 2;
    out_.owned.push_back(std::make_unique<std::byte[]>(interleaved.bytes()));
    std::byte* rows = out_.owned.back().get();
    for (int64_t head = 0; head < interleaved.rows; head += head_dim)
      for (int i = 0; i < head_dim; ++i)
        std::memcpy(rows + row * (head + i), interleaved.row(head + 2 * (i % half) + i / half), row);
    interleaved.data = rows;
    return interleaved;
  }

  std::vector<float> vector(TensorRole role, int layer, int64_t n) {
    const auto [file, view] = get(role, layer, {n});
    std::vector<float> values(n);
    dequantize(view->type, view->data, n, values.data());
    return values;
  }

  std::string hash() const {
    const XXH128_hash_t h = XXH3_128bits_digest(hash_);
    return fmt::format("{:016x}{:016x}", h.high64, h.low64);
  }

 private:
  std::pair<const TensorFile*, const TensorView*> get(TensorRole role, int layer,
                                                      std::initializer_list<int64_t> shape) {
    const std::string name = name_(role, layer);
    for (const auto& file : out_.files) {
      const TensorView* view = file->find(name);
      if (!view) continue;
      const std::vector<int64_t> expected(shape);
      if (view->shape != expected)
        fail("{}: tensor '{}': expected shape {}, found {}", file->describe(), name, shape_text(expected),
             shape_text(view->shape));
      if (const size_t at = first_nan(*view); at < static_cast<size_t>(view->elements()))
        fail("{}: tensor '{}': expected numbers, found NaN at element {}", file->describe(), name, at);
      XXH3_128bits_update(hash_, view->data, view->bytes);
      return {file.get(), view};
    }
    fail("{}: tensor '{}' is missing (expected shape {})", out_.files.front()->describe(), name,
         shape_text(std::vector<int64_t>(shape)));
  }

  // The kernels read whole elements: a tensor at an odd address is copied.
  const std::byte* aligned(const TensorView& view) {
    if (reinterpret_cast<uintptr_t>(view.data) % alignof(float) == 0) return view.data;
    out_.owned.push_back(std::make_unique<std::byte[]>(view.bytes));
    std::memcpy(out_.owned.back().get(), view.data, view.bytes);
    return out_.owned.back().get();
  }

  Weights& out_;
  const std::function<std::string(TensorRole, int)>& name_;
  XXH3_state_t* hash_;
};

}  // namespace

std::string huggingface_name(TensorRole role, int layer) {
  auto in_layer = [&](const char* rest) { return fmt::format("model.layers.{}.{}", layer, rest); };
  switch (role) {
    case TensorRole::embedding: return "model.embed_tokens.weight";
    case TensorRole::head: return "lm_head.weight";
    case TensorRole::final_norm: return "model.norm.weight";
    case TensorRole::input_norm: return in_layer("input_layernorm.weight");
    case TensorRole::ffn_norm: return in_layer("post_attention_layernorm.weight");
    case TensorRole::q: return in_layer("self_attn.q_proj.weight");
    case TensorRole::k: return in_layer("self_attn.k_proj.weight");
    case TensorRole::v: return in_layer("self_attn.v_proj.weight");
    case TensorRole::o: return in_layer("self_attn.o_proj.weight");
    case TensorRole::q_bias: return in_layer("self_attn.q_proj.bias");
    case TensorRole::k_bias: return in_layer("self_attn.k_proj.bias");
    case TensorRole::v_bias: return in_layer("self_attn.v_proj.bias");
    case TensorRole::q_norm: return in_layer("self_attn.q_norm.weight");
    case TensorRole::k_norm: return in_layer("self_attn.k_norm.weight");
    case TensorRole::gate: return in_layer("mlp.gate_proj.weight");
    case TensorRole::up: return in_layer("mlp.up_proj.weight");
    case TensorRole::down: return in_layer("mlp.down_proj.weight");
  }
  return {};
}

Weights load_weights(const ModelSpec& spec, std::vector<std::shared_ptr<const TensorFile>> files,
                     const std::function<std::string(TensorRole, int layer)>& name) {
  Weights out;
  out.files = std::move(files);
  TransformerWeights& t = out.transformer;
  t.n_vocab = spec.n_vocab;
  t.width = spec.width;
  t.ffn_width = spec.ffn_width;
  t.n_q_heads = spec.layer.n_q_heads;
  t.n_kv_heads = spec.layer.n_kv_heads;
  t.head_dim = spec.layer.head_dim;
  t.norm_eps = spec.norm_eps;
  t.rope = rope_table(spec.rope, t.head_dim);

  Loader load(out, name);
  const int64_t width = t.width, ffn = t.ffn_width, dim = t.head_dim;
  const int64_t q_rows = t.n_q_heads * dim, kv_rows = t.n_kv_heads * dim;
  t.embedding = load.matrix(TensorRole::embedding, 0, t.n_vocab, width);
  t.head = spec.tied_embeddings ? t.embedding : load.matrix(TensorRole::head, 0, t.n_vocab, width);
  t.final_norm = load.vector(TensorRole::final_norm, 0, width);
  for (int i = 0; i < spec.n_layers; ++i) {
    LayerWeights& l = t.layers.emplace_back();
    l.input_norm = load.vector(TensorRole::input_norm, i, width);
    l.q = load.matrix(TensorRole::q, i, q_rows, width);
    l.k = load.matrix(TensorRole::k, i, kv_rows, width);
    if (spec.interleaved_rope_rows) {
      l.q = load.half_split(l.q, t.head_dim);
      l.k = load.half_split(l.k, t.head_dim);
    }
    l.v = load.matrix(TensorRole::v, i, kv_rows, width);
    if (spec.qkv_bias) {
      l.q_bias = load.vector(TensorRole::q_bias, i, q_rows);
      l.k_bias = load.vector(TensorRole::k_bias, i, kv_rows);
      l.v_bias = load.vector(TensorRole::v_bias, i, kv_rows);
    }
    if (spec.qk_norm) {
      l.q_norm = load.vector(TensorRole::q_norm, i, dim);
      l.k_norm = load.vector(TensorRole::k_norm, i, dim);
    }
    l.o = load.matrix(TensorRole::o, i, width, q_rows);
    l.ffn_norm = load.vector(TensorRole::ffn_norm, i, width);
    l.gate = load.matrix(TensorRole::gate, i, ffn, width);
    l.up = load.matrix(TensorRole::up, i, ffn, width);
    l.down = load.matrix(TensorRole::down, i, width, ffn);
  }
  out.hash = load.hash();
  return out;
}

}  // namespace kvlapse
