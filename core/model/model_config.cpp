#include "core/model/model_config.h"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>

#include "core/base/error.h"

namespace kvlapse {
namespace {

using nlohmann::json;

// Values as they may stand in a one-line message.
std::string shown(const json& value) {
  std::string text = value.dump(-1, ' ', true, json::error_handler_t::replace);
  return text.size() > 80 ? text.substr(0, 80) + "..." : text;
}

json read_json(const std::filesystem::path& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) fail("{}: expected a readable file, found none", path.string());
  try {
    json value = json::parse(in);
    if (!value.is_object()) fail("{}: expected a JSON object, found {}", path.string(), value.type_name());
    return value;
  } catch (const json::exception& e) {
    fail("{}: expected a JSON object, found {}", path.string(), e.what());
  }
}

// Fields of one object of config.json, with messages that name file and field.
class Fields {
 public:
  Fields(std::string file, const json& object) : file_(std::move(file)), object_(object) {}

  // Null counts as absent, as in Python.
  bool has(const char* name) const { return object_.contains(name) && !object_[name].is_null(); }
  const json& raw(const char* name) const { return object_[name]; }

  int whole(const char* name, int min, int max) const {
    if (!has(name)) fail("{}: {}: expected a whole number, found nothing", file_, name);
    const json& value = object_[name];
    if (!value.is_number_integer() || value < min || value > max)
      fail("{}: {}: expected a whole number in [{}, {}], found {}", file_, name, min, max, shown(value));
    return value.get<int>();
  }
  int whole(const char* name, int min, int max, int otherwise) const {
    return has(name) ? whole(name, min, max) : otherwise;
  }
  double number(const char* name, double min, double max) const {
    if (!has(name)) fail("{}: {}: expected a number, found nothing", file_, name);
    const json& value = object_[name];
    if (!value.is_number() || !(value.get<double>() >= min && value.get<double>() <= max))
      fail("{}: {}: expected a number in [{:g}, {:g}], found {}", file_, name, min, max, shown(value));
    return value.get<double>();
  }
  double number(const char* name, double min, double max, double otherwise) const {
    return has(name) ? number(name, min, max) : otherwise;
  }
  bool flag(const char* name, bool otherwise) const {
    if (!has(name)) return otherwise;
    if (!object_[name].is_boolean())
      fail("{}: {}: expected true or false, found {}", file_, name, shown(object_[name]));
    return object_[name].get<bool>();
  }
  std::string text(const char* name, const char* otherwise) const {
    if (!has(name)) return otherwise;
    if (!object_[name].is_string())
      fail("{}: {}: expected a string, found {}", file_, name, shown(object_[name]));
    return object_[name].get<std::string>();
  }
  template <typename T>
  void only(const char* name, const T& expected) const {
    if (has(name) && object_[name] != json(expected))
      fail("{}: {}: expected {}, found {} (not supported)", file_, name, shown(json(expected)),
           shown(object_[name]));
  }
  void absent(const char* name) const {
    if (has(name)) fail("{}: {}: expected none, found {} (not supported)", file_, name, shown(object_[name]));
  }
  const std::string& file() const { return file_; }

 private:
  std::string file_;
  const json& object_;
};

Architecture read_architecture(const Fields& config) {
  if (!config.has("architectures") || !config.raw("architectures").is_array() ||
      config.raw("architectures").size() != 1)
    fail("{}: architectures: expected a list of one name, found {}", config.file(),
         config.has("architectures") ? shown(config.raw("architectures")) : "nothing");
  const json& name = config.raw("architectures")[0];
  if (name == "Qwen3ForCausalLM") return Architecture::qwen3;
  if (name == "Qwen2ForCausalLM") return Architecture::qwen2;
  if (name == "LlamaForCausalLM") return Architecture::llama;
  fail("{}: architectures: expected Qwen3ForCausalLM, Qwen2ForCausalLM or LlamaForCausalLM, found {}",
       config.file(), shown(name));
}

// `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before).
RopeSpec read_rope(const Fields& config, int context) {
  RopeSpec rope;
  const char* field = config.has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  rope.theta = config.number("rope_theta", 1, 1e12, 10000);
  rope.original_context = config.whole("original_max_position_embeddings", 1, 1 << 30, context);
  if (!config.has(field)) return rope;
  if (!config.raw(field).is_object())
    fail("{}: {}: expected an object, found {}", config.file(), field, shown(config.raw(field)));
  const Fields scaling(fmt::format("{}: {}", config.file(), field), config.raw(field));
  rope.theta = scaling.number("rope_theta", 1, 1e12, rope.theta);
  if (scaling.has("partial_rotary_factor")) scaling.only("partial_rotary_factor", 1.0);
  const std::string type = scaling.text("rope_type", scaling.text("type", "default").c_str());
  if (type == "default") return rope;
  rope.factor = scaling.number("factor", 1, 1e6);
  rope.original_context =
      scaling.whole("original_max_position_embeddings", 1, 1 << 30, rope.original_context);
  if (type == "linear") {
    rope.scaling = RopeSpec::Scaling::linear;
  } else if (type == "llama3") {
    rope.scaling = RopeSpec::Scaling::llama3;
    rope.low_freq_factor = scaling.number("low_freq_factor", 1e-6, 1e6);
    rope.high_freq_factor = scaling.number("high_freq_factor", 1e-6, 1e6);
    if (rope.high_freq_factor <= rope.low_freq_factor)
      fail("{}: high_freq_factor: expected more than low_freq_factor {:g}, found {:g}", scaling.file(),
           rope.low_freq_factor, rope.high_freq_factor);
  } else if (type == "yarn") {
    rope.scaling = RopeSpec::Scaling::yarn;
    rope.beta_fast = scaling.number("beta_fast", 1e-6, 1e6, 32);
    rope.beta_slow = scaling.number("beta_slow", 1e-6, 1e6, 1);
    rope.attention_factor = scaling.number("attention_factor", 0, 100, 0);
    scaling.absent("mscale");
    scaling.absent("mscale_all_dim");
    scaling.only("truncate", true);
  } else {
    fail("{}: rope_type: expected default, linear, llama3 or yarn, found '{}'", scaling.file(), type);
  }
  return rope;
}

void read_eos(const Fields& config, int n_vocab, std::vector<int32_t>& ids) {
  if (!config.has("eos_token_id")) return;
  const json& value = config.raw("eos_token_id");
  for (const json& id : value.is_array() ? value : json::array({value})) {
    if (!id.is_number_integer() || id < 0 || id >= n_vocab)
      fail("{}: eos_token_id: expected ids in [0, {}), found {}", config.file(), n_vocab, shown(id));
    if (std::find(ids.begin(), ids.end(), id.get<int32_t>()) == ids.end()) ids.push_back(id.get<int32_t>());
  }
}

}  // namespace

ModelSpec read_model_config(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "config.json";
  const json content = read_json(path);
  const Fields config(path.string(), content);

  ModelSpec spec;
  spec.architecture = read_architecture(config);
  spec.name = std::filesystem::absolute(folder).lexically_normal().filename().string();
  if (spec.name.empty()) spec.name = std::filesystem::absolute(folder).parent_path().filename().string();
  spec.n_vocab = config.whole("vocab_size", 2, 1 << 22);
  spec.width = config.whole("hidden_size", 1, 1 << 20);
  spec.ffn_width = config.whole("intermediate_size", 1, 1 << 20);
  spec.n_layers = config.whole("num_hidden_layers", 1, 4096);
  spec.context = config.whole("max_position_embeddings", 1, 1 << 28);
  LayerSpec& layer = spec.layer;
  layer.n_q_heads = config.whole("num_attention_heads", 1, 4096);
  layer.n_kv_heads = config.whole("num_key_value_heads", 1, 4096, layer.n_q_heads);
  if (layer.n_q_heads % layer.n_kv_heads != 0)
    fail("{}: num_key_value_heads: expected a divisor of num_attention_heads {}, found {}", config.file(),
         layer.n_q_heads, layer.n_kv_heads);
  const bool qwen3 = spec.architecture == Architecture::qwen3;
  if (!config.has("head_dim") && !qwen3 && spec.width % layer.n_q_heads != 0)
    fail("{}: hidden_size: expected a multiple of num_attention_heads {}, found {}", config.file(),
         layer.n_q_heads, spec.width);
  layer.head_dim = config.whole("head_dim", 2, 512, qwen3 ? 128 : spec.width / layer.n_q_heads);
  if (layer.head_dim % 2 != 0)
    fail("{}: head_dim: expected an even number, found {}", config.file(), layer.head_dim);
  spec.norm_eps = static_cast<float>(config.number("rms_norm_eps", 0, 1, 1e-6));
  spec.rope = read_rope(config, spec.context);
  spec.tied_embeddings = config.flag("tie_word_embeddings", false);
  spec.qkv_bias = spec.architecture == Architecture::qwen2;
  spec.qk_norm = qwen3;

  config.only("hidden_act", "silu");
  config.only("use_sliding_window", false);
  config.only("attention_bias", false);
  config.only("mlp_bias", false);
  config.only("partial_rotary_factor", 1.0);
  config.absent("quantization_config");
  // Latent attention and mixtures of experts, whatever the architecture's name.
  for (const char* field : {"kv_lora_rank", "num_experts", "num_local_experts", "n_routed_experts"})
    config.absent(field);
  if (config.has("layer_types"))
    for (const json& kind : config.raw("layer_types"))
      if (kind != "full_attention")
        fail("{}: layer_types: expected full_attention, found {} (not supported)", config.file(),
             shown(kind));

  read_eos(config, spec.n_vocab, spec.eos_ids);
  if (const std::filesystem::path generation = folder / "generation_config.json";
      std::filesystem::exists(generation)) {
    const json more = read_json(generation);
    read_eos(Fields(generation.string(), more), spec.n_vocab, spec.eos_ids);
  }
  return spec;
}

RopeTable rope_table(const RopeSpec& spec, int head_dim) {
  RopeTable table;
  const int half = head_dim / 2;
  constexpr double kPi = 3.14159265358979323846;
  for (int i = 0; i < half; ++i) {
    const float exponent = static_cast<float>(2 * i) / static_cast<float>(head_dim);
    const float power = static_cast<float>(std::pow(spec.theta, static_cast<double>(exponent)));
    table.inverse_frequencies.push_back(1.0f / power);
  }
  switch (spec.scaling) {
    case RopeSpec::Scaling::none: break;
    case RopeSpec::Scaling::linear:
      for (float& f : table.inverse_frequencies) f /= static_cast<float>(spec.factor);
      break;
    case RopeSpec::Scaling::llama3: {
      const double low_wavelength = spec.original_context / spec.low_freq_factor;
      const double high_wavelength = spec.original_context / spec.high_freq_factor;
      for (float& f : table.inverse_frequencies) {
        const double wavelength = 2 * kPi / f;
        if (wavelength < high_wavelength) continue;
        const double scaled = f / spec.factor;
        const double smooth = (spec.original_context / wavelength - spec.low_freq_factor) /
                              (spec.high_freq_factor - spec.low_freq_factor);
        f = static_cast<float>(wavelength > low_wavelength ? scaled : (1 - smooth) * scaled + smooth * f);
      }
      break;
    }
    case RopeSpec::Scaling::yarn: {
      auto correction_dim = [&](double rotations) {
        return head_dim * std::log(spec.original_context / (rotations * 2 * kPi)) /
               (2 * std::log(spec.theta));
      };
      const double low = std::max(std::floor(correction_dim(spec.beta_fast)), 0.0);
      double high = std::min(std::ceil(correction_dim(spec.beta_slow)), head_dim - 1.0);
      if (low == high) high += 0.001;  // as the reference: no division by zero
      for (int i = 0; i < half; ++i) {
        const float ramp = std::clamp(static_cast<float>((i - low) / (high - low)), 0.0f, 1.0f);
        float& f = table.inverse_frequencies[i];
        const float interpolated = f / static_cast<float>(spec.factor);
        f = interpolated * ramp + f * (1 - ramp);
      }
      table.attention_factor =
          spec.attention_factor > 0
              ? static_cast<float>(spec.attention_factor)
              : static_cast<float>(spec.factor <= 1 ? 1.0 : 0.1 * std::log(spec.factor) + 1.0);
      break;
    }
  }
  for (size_t i = 0; i < spec.frequency_divisors.size(); ++i)
    table.inverse_frequencies[i] /= spec.frequency_divisors[i];
  return table;
}

}  // namespace kvlapse
