#include "cli/model_conformance.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/base/error.h"
#include "core/base/sha256.h"
#include "core/engine/decode_session.h"
#include "core/model/mapped_file.h"
#include "core/policy/registry.h"
#include "core/policy/spec.h"

namespace kvlapse::cli {
namespace {

// Absolute for logits, relative to the largest magnitude of the tensor for the rest. Another order of fp32
// summation moves logits by 6e-5 and the others by 6e-6.
constexpr double kLogitTolerance = 2e-4;
constexpr double kRelativeTolerance = 5e-5;

template <typename T>
constexpr TensorType type_of() {
  if constexpr (std::is_same_v<T, float>)
    return TensorType::f32;
  else if constexpr (std::is_same_v<T, int32_t>)
    return TensorType::i32;
  else if constexpr (std::is_same_v<T, int64_t>)
    return TensorType::i64;
  else
    return TensorType::u8;
}

template <typename T>
std::vector<T> read(const TensorFile& file, std::string_view name) {
  const TensorView& tensor = file.get(name);
  if (tensor.type != type_of<T>())
    fail("{}: tensor '{}': expected {}, found {}", file.describe(), name, tensor_type_name(type_of<T>()),
         tensor_type_name(tensor.type));
  std::vector<T> values(static_cast<size_t>(tensor.elements()));
  if (!values.empty()) std::memcpy(values.data(), tensor.data, tensor.bytes);
  return values;
}

std::string metadata_of(const TensorFile& file, std::string_view key) {
  for (const auto& [name, value] : file.metadata())
    if (name == key) return value;
  return {};
}

// Largest difference, and the largest magnitude of what was expected.
struct Difference {
  double largest = 0, magnitude = 0;

  void add(float expected, float found) {
    double d = std::abs(static_cast<double>(expected) - found);
    largest = std::max(largest, std::isnan(d) ? HUGE_VAL : d);
    magnitude = std::max(magnitude, std::abs(static_cast<double>(expected)));
  }
  void add(std::span<const float> expected, const float* found) {
    for (size_t i = 0; i < expected.size(); ++i) add(expected[i], found[i]);
  }
  double relative() const { return magnitude > 0 ? largest / magnitude : largest; }
};

double log_sum_exp(std::span<const float> logits) {
  double most = *std::max_element(logits.begin(), logits.end()), total = 0;
  for (float l : logits) total += std::exp(l - most);
  return most + std::log(total);
}

// Compares while the session decodes with the golden tokens as its teacher.
class Comparison final : public StepObserver {
 public:
  Comparison(const TensorFile& golden, const ModelSpec& spec, Backend& backend)
      : golden_(golden),
        spec_(spec),
        backend_(backend),
        prompt_ids_(read<int32_t>(golden, "prompt_ids")),
        gen_ids_(read<int32_t>(golden, "gen_ids")),
        gen_logit_(read<float>(golden, "gen_logit")),
        gen_lse_(read<float>(golden, "gen_lse")),
        logit_steps_(read<int32_t>(golden, "logits.step")),
        top_ids_(read<int32_t>(golden, "logits.top_ids")),
        top_(read<float>(golden, "logits.top")),
        full_step0_(read<float>(golden, "logits.full_step0")),
        hidden_(read<float>(golden, "hidden.step0")),
        layers_(read<int32_t>(golden, "qkv.layer")),
        positions_(read<int32_t>(golden, "qkv.pos")),
        q_(read<float>(golden, "qkv.q")),
        k_(read<float>(golden, "qkv.k")),
        v_(read<float>(golden, "qkv.v")),
        attn_out_(read<float>(golden, "qkv.attn_out")) {
    const LayerSpec& l = spec.layer;
    size_t sites = layers_.size() * positions_.size(), n_steps = gen_ids_.size();
    expect("prompt_ids", prompt_ids_.size(), std::max<size_t>(1, prompt_ids_.size()));
    expect("gen_logit", gen_logit_.size(), n_steps);
    expect("gen_lse", gen_lse_.size(), n_steps);
    expect("logits.full_step0", full_step0_.size(), spec.n_vocab);
    expect("logits.top", top_.size(), top_ids_.size());
    if (logit_steps_.empty() || top_.size() % logit_steps_.size() != 0)
      fail("{}: tensor 'logits.top': expected a row for each of {} steps, found {} elements",
           golden.describe(), logit_steps_.size(), top_.size());
    expect("hidden.step0", hidden_.size(), static_cast<size_t>(spec.n_layers + 1) * spec.width);
    expect("qkv.q", q_.size(), sites * l.n_q_heads * l.head_dim);
    expect("qkv.k", k_.size(), sites * l.n_kv_heads * l.head_dim);
    expect("qkv.v", v_.size(), sites * l.n_kv_heads * l.head_dim);
    expect("qkv.attn_out", attn_out_.size(), sites * l.n_q_heads * l.head_dim);
    for (int32_t id : top_ids_)
      if (id < 0 || id >= spec.n_vocab)
        fail("{}: tensor 'logits.top_ids': expected ids below {}, found {}", golden.describe(), spec.n_vocab,
             id);
  }

  std::span<const int32_t> prompt_ids() const { return prompt_ids_; }
  std::span<const int32_t> gen_ids() const { return gen_ids_; }

  void on_attended(int, int layer, Pos pos, const TokenRows& rows, const SlotTable&,
                   LayerInputs& inputs) override {
    const int last = static_cast<int>(prompt_ids_.size()) - 1;
    if (raw(pos) == last) compare_hidden(layer, last);
    auto l = std::find(layers_.begin(), layers_.end(), layer);
    auto p = std::find(positions_.begin(), positions_.end(), raw(pos));
    if (l == layers_.end() || p == positions_.end()) return;
    size_t site = static_cast<size_t>(l - layers_.begin()) * positions_.size() + (p - positions_.begin());
    auto compare = [&](Difference& difference, const std::vector<float>& all, const float* found, int heads) {
      size_t n = static_cast<size_t>(heads) * spec_.layer.head_dim;
      difference.add(std::span(all).subspan(site * n, n), found);
    };
    compare(q, q_, rows.q, spec_.layer.n_q_heads);
    compare(k, k_, rows.k, spec_.layer.n_kv_heads);
    compare(v, v_, rows.v, spec_.layer.n_kv_heads);
    const auto dim = static_cast<size_t>(spec_.layer.head_dim);
    for (int h = 0; h < spec_.layer.n_q_heads; ++h)
      attention.add(std::span(attn_out_).subspan((site * spec_.layer.n_q_heads + h) * dim, dim),
                    inputs.output(h).data());
    ++sites_compared;
  }

  void on_step(const StepSummary& summary) override {
    std::span<const float> all = backend_.logits(0);
    const size_t step = static_cast<size_t>(raw(summary.pos)) + 1 - prompt_ids_.size();
    if (step == 0) {
      logits.add(full_step0_, all.data());
      compare_hidden(spec_.n_layers, static_cast<int>(prompt_ids_.size()) - 1);
    }
    logits.add(gen_logit_[step], all[gen_ids_[step]]);
    logits.add(gen_lse_[step], static_cast<float>(log_sum_exp(all)));
    if (auto at = std::find(logit_steps_.begin(), logit_steps_.end(), step); at != logit_steps_.end()) {
      size_t n = top_.size() / logit_steps_.size(), first = (at - logit_steps_.begin()) * n;
      for (size_t i = first; i < first + n; ++i) logits.add(top_[i], all[top_ids_[i]]);
    }
    auto chosen = std::max_element(all.begin(), all.end()) - all.begin();
    if (chosen != gen_ids_[step] && first_divergence < 0) first_divergence = static_cast<int>(step);
    ++steps_compared;
  }

  Difference logits, q, k, v, attention, hidden;
  int first_divergence = -1, worst_hidden_layer = -1, steps_compared = 0, sites_compared = 0;

 private:
  void expect(std::string_view tensor, size_t found, size_t expected) const {
    if (found != expected)
      fail("{}: tensor '{}': expected {} elements, found {}", golden_.describe(), tensor, expected, found);
  }

  // The residual stream before layer `layer`; the prompt is one block, so its last row is the last position.
  void compare_hidden(int layer, int row) {
    std::span<const float> found = backend_.residual(row);
    if (found.empty()) return;
    Difference one;
    one.add(std::span(hidden_).subspan(static_cast<size_t>(layer) * spec_.width, spec_.width), found.data());
    if (one.relative() > hidden.relative()) {
      hidden = one;
      worst_hidden_layer = layer;
    }
  }

  const TensorFile& golden_;
  const ModelSpec& spec_;
  Backend& backend_;
  std::vector<int32_t> prompt_ids_, gen_ids_;
  std::vector<float> gen_logit_, gen_lse_;
  std::vector<int32_t> logit_steps_, top_ids_;
  std::vector<float> top_, full_step0_, hidden_;
  std::vector<int32_t> layers_, positions_;
  std::vector<float> q_, k_, v_, attn_out_;
};

void check_identity(const TensorFile& golden, const Model& model) {
  std::string expected = metadata_of(golden, "gguf_sha256");
  if (expected.empty() || std::filesystem::is_directory(model.path)) return;
  std::string found = sha256_hex(MappedFile(model.path).bytes());
  if (found != expected)
    fail("{}: gguf_sha256: expected the model with {}, found {} in {}", golden.describe(), expected, found,
         model.path.string());
}

const Tokenizer& tokenizer_of(const Model& model) {
  if (!model.tokenizer) fail("{}: expected a tokenizer, found none", model.path.string());
  return *model.tokenizer;
}

// String i of a ragged tensor.
template <typename T>
std::vector<T> ragged(const TensorFile& file, const std::string& name, size_t i) {
  auto all = read<T>(file, name);
  auto offsets = read<int64_t>(file, name + "_off");
  if (i + 1 >= offsets.size() || offsets[i] < 0 || offsets[i] > offsets[i + 1] ||
      offsets[i + 1] > static_cast<int64_t>(all.size()))
    fail("{}: tensor '{}_off': expected rising offsets up to {}, found others at {}", file.describe(), name,
         all.size(), i);
  return {all.begin() + offsets[i], all.begin() + offsets[i + 1]};
}

std::string ragged_text(const TensorFile& file, const std::string& name, size_t i) {
  auto bytes = ragged<uint8_t>(file, name, i);
  return {bytes.begin(), bytes.end()};
}

}  // namespace

bool is_model_golden(const TensorFile& golden) {
  return golden.find("gen_ids") && golden.find("prompt_ids");
}
bool is_tokenizer_golden(const TensorFile& golden) {
  return golden.find("text_off") && golden.find("ids_off");
}

ModelCheck check_model(const TensorFile& golden, const Model& model, Backend& backend) {
  check_identity(golden, model);
  Comparison comparison(golden, model.spec, backend);
  auto policy = make_policy("full");
  const auto n_steps = static_cast<int>(comparison.gen_ids().size());
  SessionOptions options;
  options.policy = policy.get();
  options.max_tokens = std::max(1, n_steps);
  options.ignore_eos = true;
  options.prefill_block = static_cast<int>(comparison.prompt_ids().size());
  options.observers = {&comparison};
  DecodeSession session(backend, model, options);
  SequenceRequest request;
  request.prompt.assign(comparison.prompt_ids().begin(), comparison.prompt_ids().end());
  request.teacher.assign(comparison.gen_ids().begin(), comparison.gen_ids().end());
  session.add_sequence(std::move(request));
  while (session.step()) {
  }

  bool prompt_equal = true;
  if (golden.find("prompt_text") && model.tokenizer) {
    auto text = read<uint8_t>(golden, "prompt_text");
    auto ids = model.tokenizer->encode({reinterpret_cast<const char*>(text.data()), text.size()},
                                       SpecialTokens::parse);
    prompt_equal =
        std::equal(ids.begin(), ids.end(), comparison.prompt_ids().begin(), comparison.prompt_ids().end());
  }

  const bool tokens_equal = comparison.first_divergence < 0 && comparison.steps_compared == n_steps;
  const double qkv = std::max({comparison.q.relative(), comparison.k.relative(), comparison.v.relative()});
  ModelCheck result;
  result.row = {{"file", golden.describe()},
                {"steps", comparison.steps_compared},
                {"prompt_ids_equal", prompt_equal},
                {"tokens_equal", tokens_equal},
                {"first_divergence", comparison.first_divergence},
                {"max_logit_error", comparison.logits.largest},
                {"max_qkv_error", qkv},
                {"max_attention_error", comparison.attention.relative()},
                {"max_hidden_error", comparison.hidden.relative()}};
  if (tokens_equal) result.row.erase("first_divergence");
  result.passed =
      prompt_equal && tokens_equal && comparison.sites_compared > 0 &&
      comparison.logits.largest <= kLogitTolerance &&
      std::max({qkv, comparison.attention.relative(), comparison.hidden.relative()}) <= kRelativeTolerance;
  result.verdict = fmt::format(
      "{} of {} tokens{}, logits within {:.1e}, q k v within {:.1e}, attention {:.1e}, hidden states {:.1e} "
      "(largest at layer {})",
      tokens_equal ? "all" : fmt::format("the first {}", std::max(0, comparison.first_divergence)), n_steps,
      prompt_equal ? "" : ", PROMPT IDS DIFFER", comparison.logits.largest, qkv,
      comparison.attention.relative(), comparison.hidden.relative(), comparison.worst_hidden_layer);
  return result;
}

ModelCheck check_tokenizer(const TensorFile& golden, const Model& model) {
  check_identity(golden, model);
  const Tokenizer& tokenizer = tokenizer_of(model);
  const auto n = static_cast<size_t>(std::max<int64_t>(0, golden.get("text_off").elements() - 1));
  int mismatches = 0;
  std::string first;
  for (size_t i = 0; i < n; ++i) {
    std::string text = ragged_text(golden, "text", i);
    auto ids = tokenizer.encode(text, SpecialTokens::parse);
    bool equal = ids == ragged<int32_t>(golden, "ids", i);
    if (golden.find("ids_plain_off"))
      equal =
          equal && tokenizer.encode(text, SpecialTokens::plain) == ragged<int32_t>(golden, "ids_plain", i);
    if (golden.find("decoded_off"))
      equal = equal && tokenizer.decode(ids) == ragged_text(golden, "decoded", i);
    if (equal) continue;
    if (mismatches++ == 0)
      first = Json(text.substr(0, 60)).dump(-1, ' ', true, Json::error_handler_t::replace);
  }
  ModelCheck result;
  result.row = {{"file", golden.describe()}, {"strings", n}, {"tokenizer_mismatches", mismatches}};
  result.passed = n > 0 && mismatches == 0;
  result.verdict = mismatches == 0
                       ? fmt::format("all {} strings, both modes, and back", n)
                       : fmt::format("{} of {} strings differ, the first is {}", mismatches, n, first);
  return result;
}

}  // namespace kvlapse::cli
