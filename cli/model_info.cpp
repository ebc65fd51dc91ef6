#include "cli/model_info.h"

#include <fmt/format.h>

#include <fstream>
#include <map>

#include "cli/progress.h"
#include "core/base/error.h"
#include "core/model/chat_template.h"
#include "core/model/model.h"

namespace kvlapse::cli {
namespace {

namespace fs = std::filesystem;

std::string_view architecture_name(Architecture architecture) {
  switch (architecture) {
    case Architecture::llama: return "llama";
    case Architecture::qwen2: return "qwen2";
    case Architecture::qwen3: return "qwen3";
  }
  return "?";
}

Json rope_info(const RopeSpec& rope) {
  constexpr std::string_view kScalings[] = {"none", "linear", "llama3", "yarn"};
  Json info = {{"theta", rope.theta}, {"scaling", kScalings[static_cast<int>(rope.scaling)]}};
  if (rope.scaling != RopeSpec::Scaling::none) info["factor"] = rope.factor;
  if (rope.original_context > 0) info["original_context"] = rope.original_context;
  if (!rope.frequency_divisors.empty()) info["scaling"] = "divisors in the file";
  return info;
}

// By storage type: tensors, elements, bytes.
Json type_info(const ModelFiles& files) {
  struct Sum {
    int tensors = 0;
    int64_t elements = 0;
    uint64_t bytes = 0;
  };
  std::map<std::string_view, Sum> sums;
  for (const auto& file : files.tensors)
    for (const TensorView& t : file->tensors()) {
      Sum& sum = sums[tensor_type_name(t.type)];
      ++sum.tensors;
      sum.elements += t.elements();
      sum.bytes += t.bytes;
    }
  Json types = Json::array();
  for (const auto& [name, sum] : sums)
    types.push_back(
        {{"type", name}, {"tensors", sum.tensors}, {"elements", sum.elements}, {"bytes", sum.bytes}});
  return types;
}

std::vector<int64_t> usual_lengths(int context) {
  std::vector<int64_t> lengths;
  for (int64_t n : {1024, 4096, 8192, 32768, 131072})
    if (n < context) lengths.push_back(n);
  lengths.push_back(context);
  return lengths;
}

std::string chat_family(const ModelSpec& spec) {
  if (spec.chat_template.empty()) return "none";
  try {
    return std::string(apply_chat_template(spec.chat_template, {}, "").family);
  } catch (const Error&) {
    return "unknown";
  }
}

}  // namespace

bool is_model_path(const fs::path& path) {
  if (fs::is_directory(path)) return true;
  char magic[4] = {};
  std::ifstream(path, std::ios::binary).read(magic, sizeof magic);
  return std::string_view(magic, sizeof magic) == "GGUF";
}

Json model_info(const fs::path& path, DType kv_dtype, std::vector<int64_t> lengths) {
  ModelFiles files = open_model_files(path);
  const ModelSpec& spec = files.spec;
  const CacheGeometry geometry = spec.cache_geometry(spec.context, kv_dtype);
  if (lengths.empty()) lengths = usual_lengths(spec.context);
  Json cache = Json::array();
  for (int64_t n : lengths)
    cache.push_back({{"tokens", n}, {"bytes", geometry.cache_bytes(static_cast<uint64_t>(n))}});
  int64_t parameters = 0;
  uint64_t weight_bytes = 0;
  Json types = type_info(files);
  for (const Json& t : types) {
    parameters += t["elements"].get<int64_t>();
    weight_bytes += t["bytes"].get<uint64_t>();
  }
  return {{"kind", "model"},
          {"path", files.path.string()},
          {"model", spec.name},
          {"format", files.format},
          {"architecture", architecture_name(spec.architecture)},
          {"layers", spec.n_layers},
          {"width", spec.width},
          {"ffn_width", spec.ffn_width},
          {"q_heads", spec.layer.n_q_heads},
          {"kv_heads", spec.layer.n_kv_heads},
          {"head_dim", spec.layer.head_dim},
          {"vocabulary", spec.n_vocab},
          {"context", spec.context},
          {"rope", rope_info(spec.rope)},
          {"norm_eps", spec.norm_eps},
          {"tied_embeddings", spec.tied_embeddings},
          {"qkv_bias", spec.qkv_bias},
          {"qk_norm", spec.qk_norm},
          {"parameters", parameters},
          {"weight_bytes", weight_bytes},
          {"types", types},
          {"kv_dtype", dtype_name(kv_dtype)},
          {"kv_bytes_per_token", geometry.token_bytes()},
          {"cache_bytes", cache},
          {"tokenizer", files.tokenizer ? files.tokenizer->describe() : "none"},
          {"eos_ids", spec.eos_ids},
          {"chat_template", chat_family(spec)}};
}

void print_model_info(const Json& info) {
  auto line = [](const char* name, const std::string& value) { fmt::print("  {:<14}{}\n", name, value); };
  auto number = [&](const char* key) { return info[key].get<int64_t>(); };
  auto text = [&](const char* key) { return info[key].get<std::string>(); };
  auto bytes = [](const Json& value) { return format_bytes(static_cast<double>(value.get<uint64_t>())); };
  fmt::print("{}\n", text("path"));
  line("model", fmt::format("{}, {}, {}", text("model"), text("format"), text("architecture")));
  line("layers",
       fmt::format("{} of width {}, FFN {}", number("layers"), number("width"), number("ffn_width")));
  line("attention",
       fmt::format("{} query heads, {} kv heads of {}{}{}", number("q_heads"), number("kv_heads"),
                   number("head_dim"), info["qkv_bias"].get<bool>() ? ", biases" : "",
                   info["qk_norm"].get<bool>() ? ", QK-norm" : ""));
  line("RoPE", fmt::format("theta {:g}, scaling {}", info["rope"]["theta"].get<double>(),
                           info["rope"]["scaling"].get<std::string>()));
  line("context", fmt::format("{} tokens", number("context")));
  if (info["types"].empty()) {
    line("weights", "none in the folder");
  } else {
    std::string types;
    for (const Json& t : info["types"])
      types += fmt::format("{}{} x {}", types.empty() ? "" : ", ", t["tensors"].get<int>(),
                           t["type"].get<std::string>());
    line("weights", fmt::format("{} parameters, {} ({}){}", number("parameters"), bytes(info["weight_bytes"]),
                                types, info["tied_embeddings"].get<bool>() ? ", tied embedding" : ""));
  }
  line("tokenizer", text("tokenizer"));
  line("chat template", text("chat_template"));
  line("cache", fmt::format("{} bytes a token in {}", number("kv_bytes_per_token"), text("kv_dtype")));
  for (const Json& at : info["cache_bytes"])
    line("", fmt::format("{:>9} tokens  {:>15} bytes  {}", at["tokens"].get<int64_t>(),
                         at["bytes"].get<uint64_t>(), bytes(at["bytes"])));
}

}  // namespace kvlapse::cli
