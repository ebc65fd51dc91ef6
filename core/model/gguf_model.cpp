#include "core/model/gguf_model.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "core/base/error.h"
#include "core/model/json_document.h"

namespace kvlapse {
namespace {

// Metadata of one architecture: keys "llama.block_count" and so on, with ranges.
class GgufFields {
 public:
  GgufFields(const GgufFile& file, std::string_view prefix) : file_(file), prefix_(prefix) {}

  std::string key(std::string_view name) const { return fmt::format("{}.{}", prefix_, name); }

  int whole(std::string_view name, int64_t min, int64_t max) const {
    int64_t value = file_.value<int64_t>(key(name));
    if (value < min || value > max)
      fail("{}: {}: expected a whole number in [{}, {}], found {}", file_.describe(), key(name), min, max,
           value);
    return static_cast<int>(value);
  }
  int whole(std::string_view name, int64_t min, int64_t max, int otherwise) const {
    return file_.find_value<int64_t>(key(name)) ? whole(name, min, max) : otherwise;
  }
  double number(std::string_view name, double min, double max) const {
    double value = file_.value<double>(key(name));
    if (!(value >= min && value <= max))
      fail("{}: {}: expected a number in [{:g}, {:g}], found {:g}", file_.describe(), key(name), min, max,
           value);
    return value;
  }
  double number(std::string_view name, double min, double max, double otherwise) const {
    return file_.find_value<double>(key(name)) ? number(name, min, max) : otherwise;
  }
  std::string_view text(std::string_view name, std::string_view otherwise) const {
    const auto* value = file_.find_value<std::string_view>(key(name));
    return value ? *value : otherwise;
  }
  const GgufFile& file() const { return file_; }

 private:
  const GgufFile& file_;
  std::string prefix_;
};

Architecture read_architecture(const GgufFile& file) {
  auto name = file.value<std::string_view>("general.architecture");
  if (name == "llama") return Architecture::llama;
  if (name == "qwen2") return Architecture::qwen2;
  if (name == "qwen3") return Architecture::qwen3;
  fail("{}: general.architecture: expected llama, qwen2 or qwen3, found '{}'", file.describe(),
       quotable(name));
}

RopeSpec read_rope(const GgufFields& fields, int head_dim, int context) {
  RopeSpec rope;
  const GgufFile& file = fields.file();
  rope.theta = fields.number("rope.freq_base", 1, 1e12, 10000);
  rope.original_context = fields.whole("rope.scaling.original_context_length", 1, 1 << 30, context);
  if (int turned = fields.whole("rope.dimension_count", 1, 4096, head_dim); turned != head_dim)
    fail("{}: {}: expected the head's {} dimensions, found {} (partial rotation is not supported)",
         file.describe(), fields.key("rope.dimension_count"), head_dim, turned);
  auto type = fields.text("rope.scaling.type", "none");
  if (type == "linear" || type == "yarn") {
    rope.scaling = type == "linear" ? RopeSpec::Scaling::linear : RopeSpec::Scaling::yarn;
    rope.factor = fields.number("rope.scaling.factor", 1, 1e6);
    // The file's factor multiplies the usual one, ours replaces it.
    if (double factor = fields.number("rope.scaling.attn_factor", 0, 100, 0); factor > 0)
      rope.attention_factor = factor * (0.1 * std::log(rope.factor) + 1);
  } else if (type != "none") {
    fail("{}: {}: expected none, linear or yarn, found '{}'", file.describe(),
         fields.key("rope.scaling.type"), quotable(type));
  }
  // Llama-3.1 files carry the result of its scaling: a divisor for each frequency.
  if (const TensorView* factors = file.find("rope_freqs.weight")) {
    if (factors->type != TensorType::f32 || factors->shape != std::vector<int64_t>{head_dim / 2})
      fail("{}: tensor 'rope_freqs.weight': expected F32 [{}], found {} of {} elements", file.describe(),
           head_dim / 2, tensor_type_name(factors->type), factors->elements());
    rope.frequency_divisors.resize(head_dim / 2);
    dequantize(factors->type, factors->data, factors->elements(), rope.frequency_divisors.data());
    for (float divisor : rope.frequency_divisors)
      if (!(divisor > 0 && divisor < 1e6f))
        fail("{}: tensor 'rope_freqs.weight': expected divisors in (0, 1e6), found {:g}", file.describe(),
             divisor);
  }
  return rope;
}

void refuse_other_kinds(const GgufFields& fields) {
  const std::string_view unsupported[] = {
      "expert_count",   "attention.sliding_window", "attention.kv_lora_rank",
      "ssm.state_size", "final_logit_softcapping",  "attn_logit_softcapping"};
  for (std::string_view name : unsupported) {
    auto found = fields.file().values().find(fields.key(name));
    if (found == fields.file().values().end()) continue;
    const auto* integer = std::get_if<int64_t>(&found->second);
    if (!integer || *integer != 0)
      fail("{}: {}: expected none, found {} (not supported)", fields.file().describe(), found->first,
           integer ? fmt::format("{}", *integer) : "a value");
  }
}

// Every tensor of the file must be one that the engine reads: a bias that it skipped would change the
// results.
void check_names(const GgufFile& file, const ModelSpec& spec) {
  std::set<std::string, std::less<>> known{"rope_freqs.weight"};
  for (TensorRole role : {TensorRole::embedding, TensorRole::head, TensorRole::final_norm})
    known.insert(gguf_name(role, 0));
  for (int layer = 0; layer < spec.n_layers; ++layer) {
    for (TensorRole role : {TensorRole::input_norm, TensorRole::ffn_norm, TensorRole::q, TensorRole::k,
                            TensorRole::v, TensorRole::o, TensorRole::gate, TensorRole::up, TensorRole::down})
      known.insert(gguf_name(role, layer));
    if (spec.qkv_bias)
      for (TensorRole role : {TensorRole::q_bias, TensorRole::k_bias, TensorRole::v_bias})
        known.insert(gguf_name(role, layer));
    if (spec.qk_norm)
      for (TensorRole role : {TensorRole::q_norm, TensorRole::k_norm}) known.insert(gguf_name(role, layer));
  }
  for (const TensorView& tensor : file.tensors())
    if (!known.contains(tensor.name))
      fail("{}: tensor '{}': expected tensors of {} with {} layers, found this one besides", file.describe(),
           quotable(tensor.name), file.value<std::string_view>("general.architecture"), spec.n_layers);
}

}  // namespace

std::string gguf_name(TensorRole role, int layer) {
  auto in_layer = [&](const char* rest) { return fmt::format("blk.{}.{}", layer, rest); };
  switch (role) {
    case TensorRole::embedding: return "token_embd.weight";
    case TensorRole::head: return "output.weight";
    case TensorRole::final_norm: return "output_norm.weight";
    case TensorRole::input_norm: return in_layer("attn_norm.weight");
    case TensorRole::ffn_norm: return in_layer("ffn_norm.weight");
    case TensorRole::q: return in_layer("attn_q.weight");
    case TensorRole::k: return in_layer("attn_k.weight");
    case TensorRole::v: return in_layer("attn_v.weight");
    case TensorRole::o: return in_layer("attn_output.weight");
    case TensorRole::q_bias: return in_layer("attn_q.bias");
    case TensorRole::k_bias: return in_layer("attn_k.bias");
    case TensorRole::v_bias: return in_layer("attn_v.bias");
    case TensorRole::q_norm: return in_layer("attn_q_norm.weight");
    case TensorRole::k_norm: return in_layer("attn_k_norm.weight");
    case TensorRole::gate: return in_layer("ffn_gate.weight");
    case TensorRole::up: return in_layer("ffn_up.weight");
    case TensorRole::down: return in_layer("ffn_down.weight");
  }
  return {};
}

ModelSpec read_gguf_model(const GgufFile& file) {
  ModelSpec spec;
  spec.architecture = read_architecture(file);
  const GgufFields fields(file, file.value<std::string_view>("general.architecture"));
  refuse_other_kinds(fields);

  spec.name = std::filesystem::path(file.describe()).stem().string();
  spec.width = fields.whole("embedding_length", 1, 1 << 20);
  spec.ffn_width = fields.whole("feed_forward_length", 1, 1 << 20);
  spec.n_layers = fields.whole("block_count", 1, 4096);
  spec.context = fields.whole("context_length", 1, 1 << 28);
  LayerSpec& layer = spec.layer;
  layer.n_q_heads = fields.whole("attention.head_count", 1, 4096);
  layer.n_kv_heads = fields.whole("attention.head_count_kv", 1, 4096, layer.n_q_heads);
  if (layer.n_q_heads % layer.n_kv_heads != 0)
    fail("{}: {}: expected a divisor of {} query heads, found {}", file.describe(),
         fields.key("attention.head_count_kv"), layer.n_q_heads, layer.n_kv_heads);
  layer.head_dim = fields.whole("attention.key_length", 2, 512, spec.width / layer.n_q_heads);
  if (layer.head_dim < 2 || layer.head_dim > 512 || layer.head_dim % 2 != 0)
    fail("{}: {}: expected an even number in [2, 512], found {}", file.describe(),
         fields.key("attention.key_length"), layer.head_dim);
  if (int v = fields.whole("attention.value_length", 1, 4096, layer.head_dim); v != layer.head_dim)
    fail("{}: {}: expected the {} of the keys, found {}", file.describe(),
         fields.key("attention.value_length"), layer.head_dim, v);
  spec.norm_eps = static_cast<float>(fields.number("attention.layer_norm_rms_epsilon", 0, 1));
  spec.rope = read_rope(fields, layer.head_dim, spec.context);
  spec.qkv_bias = spec.architecture == Architecture::qwen2;
  spec.qk_norm = spec.architecture == Architecture::qwen3;
  spec.interleaved_rope_rows = spec.architecture == Architecture::llama;
  check_names(file, spec);

  const TensorView& embedding = file.get("token_embd.weight");
  if (embedding.shape.size() != 2)
    fail("{}: tensor 'token_embd.weight': expected a matrix, found {} dimensions", file.describe(),
         embedding.shape.size());
  spec.n_vocab = static_cast<int>(std::min<int64_t>(embedding.shape[0], 1 << 30));
  spec.tied_embeddings = file.find("output.weight") == nullptr;

  for (std::string_view name : {"eos", "eot", "eom"}) {
    const auto* id = file.find_value<int64_t>(fmt::format("tokenizer.ggml.{}_token_id", name));
    if (!id) continue;
    if (*id < 0 || *id >= spec.n_vocab)
      fail("{}: tokenizer.ggml.{}_token_id: expected an id below {}, found {}", file.describe(), name,
           spec.n_vocab, *id);
    auto token = static_cast<int32_t>(*id);
    if (std::find(spec.eos_ids.begin(), spec.eos_ids.end(), token) == spec.eos_ids.end())
      spec.eos_ids.push_back(token);
  }
  if (const auto* chat = file.find_value<std::string_view>("tokenizer.chat_template"))
    spec.chat_template = *chat;
  return spec;
}

}  // namespace kvlapse
