#include "core/engine/conformance.h"

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstring>
#include <map>
#include <set>

#include "core/base/error.h"
#include "core/base/sha256.h"
#include "core/engine/tensor_memory.h"
#include "core/policy/checked_inputs.h"
#include "core/policy/spec.h"

namespace kvlapse {
namespace {

constexpr double kTie = 1e-6;  // relative

// How a group's scores can be compared.
enum class ScoreKind : uint8_t { none, per_slot };

struct Group {
  std::string_view name;  // tensors are <name>.<field>
  std::string_view spec;  // {x} is replaced by the press's argument x, then by the file's metadata
  ScoreKind scores = ScoreKind::none;
  std::string_view budget = "budget";  // metadata key
  bool every_step = false;             // the reference acts at each step, not every `divide`
  bool decoding = false;               // its decoding_* record has the same inputs, in another slot order
};

constexpr std::string_view kRecordPrefix = "decoding_";

constexpr Group kGroups[] = {
    {"longflow", "longflow@yisunlp", ScoreKind::per_slot, "budget", true},
    {"rkv_zefancai", "rkv@zefan-cai"},
    {"rkv_zefancai_lambda0.1_lastpercent", "rkv@zefan-cai:lambda=0.1"},
    {"snapkv_zefancai", "snapkv@zefan-cai"},
    {"streamingllm_zefancai", "streaming_llm@zefan-cai"},
    {"h2o_longflow", "h2o@longflow", ScoreKind::none, "budget", true},
    {"vatp_longflow", "vatp@longflow", ScoreKind::none, "budget", true},
    {"rkv_longflow", "rkv@longflow", ScoreKind::none, "rkv_longflow_budget", true},
    {"knorm_kvpress", "knorm@kvpress", ScoreKind::per_slot, "budget", false, true},
    {"keydiff_kvpress", "keydiff@kvpress", ScoreKind::per_slot, "budget", false, true},
    {"tova_kvpress", "tova@kvpress", ScoreKind::per_slot, "budget", false, true},
    {"streamingllm_kvpress", "streaming_llm@kvpress:sinks={n_sink}"},
    {"snapkv_kvpress", "snapkv@kvpress:window={window_size}:kernel={kernel_size}", ScoreKind::per_slot,
     "budget", false, true},
    {"snapkv_kernel7_kvpress", "snapkv@kvpress:window={window_size}:kernel={kernel_size}",
     ScoreKind::per_slot, "budget", false, true},
    {"lagkv_kvpress", "lagkv@kvpress:lag={lag_size}:sinks={n_sink}", ScoreKind::per_slot},
    {"lagkv_cross_kvpress", "lagkv@kvpress:lag={lag_size}:sinks={n_sink}:cross=1", ScoreKind::per_slot},
    {"lagkv_lag128_kvpress", "lagkv@kvpress:lag={lag_size}:sinks={n_sink}", ScoreKind::per_slot},
    {"observed_attention_kvpress", "observed_attention@kvpress:rows=recomputed", ScoreKind::per_slot},
    {"observed_attention_rows_kvpress", "observed_attention@kvpress:rows=observed", ScoreKind::per_slot},
    {"expected_attention_kvpress",
     "expected_attention@kvpress:queries=0:future={n_future_positions}:sinks={n_sink}:epsilon={epsilon}",
     ScoreKind::per_slot},
    {"adakv_snapkv_kvpress",
     "adakv:base=snapkv@kvpress:window={window_size}:kernel={kernel_size}:floor={alpha_safeguard}",
     ScoreKind::per_slot},
    {"adakv_knorm_kvpress", "adakv:base=knorm:floor={alpha_safeguard}", ScoreKind::per_slot},
};

std::string_view metadata(const TensorFile& file, std::string_view key) {
  for (const auto& [name, value] : file.metadata())
    if (name == key) return value;
  return {};
}

int metadata_int(const TensorFile& file, std::string_view key) {
  std::string_view text = metadata(file, key);
  int value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || value < 1)
    fail("{}: metadata '{}': expected a positive integer, found '{}'", file.describe(), key, text);
  return value;
}

// A press as constructed, "Name(a=1, b=Other(c=2))", is part of a JSON object in the metadata: group ->
// press.
std::string_view press_of(const TensorFile& file, std::string_view group) {
  std::string_view presses = metadata(file, "presses");
  const std::string key = fmt::format("\"{}\"", group);
  size_t at = presses.find(key);
  if (at == std::string_view::npos) return {};
  const size_t begin = presses.find('"', at + key.size());
  if (begin == std::string_view::npos) return {};
  return presses.substr(begin + 1, presses.find('"', begin + 1) - begin - 1);
}

std::string_view argument_of(std::string_view press, std::string_view name) {
  for (size_t at = press.find(name); at != std::string_view::npos; at = press.find(name, at + 1)) {
    const size_t end = at + name.size();
    if (end < press.size() && press[end] == '=' && at > 0 && (press[at - 1] == '(' || press[at - 1] == ' '))
      return press.substr(end + 1, press.find_first_of(",)", end) - end - 1);
  }
  return {};
}

std::string resolve_spec(const Group& group, const TensorFile& file) {
  const std::string_view press = press_of(file, group.name);
  std::string spec;
  for (std::string_view rest = group.spec; !rest.empty();) {
    const size_t open = rest.find('{');
    spec += rest.substr(0, open);
    if (open == std::string_view::npos) break;
    const size_t close = rest.find('}');
    const std::string_view name = rest.substr(open + 1, close - open - 1);
    std::string_view value = argument_of(press, name);
    if (value.empty()) value = metadata(file, name);
    if (value.empty())
      fail("{}: group '{}': the press '{}' and the metadata lack '{}'", file.describe(), group.name, press,
           name);
    spec += value;
    rest.remove_prefix(close + 1);
  }
  return spec;
}

template <typename T>
struct Array {
  std::vector<int64_t> shape;
  std::vector<T> values;
  int64_t row() const { return static_cast<int64_t>(values.size()) / shape[0]; }
};

template <typename T>
Array<T> read(const TensorFile& file, std::string_view name, size_t rank) {
  const TensorView& tensor = file.get(name);
  const TensorType type = std::is_same_v<T, float> ? TensorType::f32 : TensorType::i32;
  if (tensor.type != type || tensor.shape.size() != rank)
    fail("{}: tensor '{}': expected {} of rank {}, found {} of rank {}", file.describe(), name,
         tensor_type_name(type), rank, tensor_type_name(tensor.type), tensor.shape.size());
  Array<T> out{tensor.shape, std::vector<T>(tensor.elements())};
  if (tensor.elements() > 0) std::memcpy(out.values.data(), tensor.data, tensor.bytes);
  return out;
}

void expect_shape(const TensorFile& file, std::string_view name, const std::vector<int64_t>& found,
                  const std::vector<int64_t>& expected) {
  if (found != expected)
    fail("{}: tensor '{}': expected shape [{}], found [{}]", file.describe(), name, fmt::join(expected, ", "),
         fmt::join(found, ", "));
}

// q, k and v of a file, its own or those that its metadata names by hash.
const TensorFile& source_of(const TensorFile& file, const std::vector<const TensorFile*>& all) {
  if (file.find("q") && file.find("k") && file.find("v")) return file;
  for (const TensorFile* other : all) {
    bool same = true;
    for (std::string_view name : {"q", "k", "v"}) {
      const TensorView* tensor = other->find(name);
      const std::string_view wanted = metadata(file, fmt::format("sha256_{}", name));
      same = same && tensor && !wanted.empty() && sha256_hex({tensor->data, tensor->bytes}) == wanted;
    }
    if (same) return *other;
  }
  fail(
      "{}: q, k, v: expected the file '{}' (or another with the same tensors) beside it on the command line, "
      "found none",
      file.describe(), metadata(file, "source"));
}

// One group: our policy is asked at every step and compared; then the cache becomes what the reference kept.
class Run {
 public:
  Run(const TensorFile& file, const TensorFile& source, const Group& group, bool is_record)
      : file_(file),
        group_(group),
        name_(std::string(is_record ? kRecordPrefix : "") + std::string(group.name)),
        is_record_(is_record),
        policy_(make_policy(spec(file, group, is_record))),
        n_tokens_(metadata_int(file, "T")),
        n_prompt_(metadata_int(file, "prompt")),
        geometry_{1,
                  metadata_int(file, "Hq"),
                  metadata_int(file, "Hkv"),
                  metadata_int(file, "D"),
                  n_tokens_,
                  DType::f32},
        q_(rows(source, "q", geometry_.n_q_heads)),
        k_(rows(source, "k", geometry_.n_kv_heads)),
        v_(rows(source, "v", geometry_.n_kv_heads)),
        memory_(geometry_, q_.values, k_.values, v_.values),
        table_(geometry_.n_kv_heads, n_tokens_),
        state_(policy_->info().state_columns, geometry_.n_kv_heads, n_tokens_) {
    if (geometry_.n_q_heads % geometry_.n_kv_heads != 0)
      fail("{}: metadata: Hq {} is no multiple of Hkv {}", file.describe(), geometry_.n_q_heads,
           geometry_.n_kv_heads);
    context_.geometry = geometry_;
    context_.n_prompt = n_prompt_;
    context_.budget = metadata_int(file, group.budget);
    context_.rule = policy_->info().rule;
    context_.table = &table_;
    if (contains(policy_->info().signals, Signal::rope)) {
      const std::string theta(metadata(file, "rope_theta"));
      context_.rope_theta = std::strtod(theta.c_str(), nullptr);
      if (!(context_.rope_theta > 0))
        fail("{}: metadata 'rope_theta': expected a number, found '{}'", file.describe(), theta);
    }
    row_.file = file.describe();
    row_.policy = policy_->info().name;
    row_.reference = policy_->info().reference;
    row_.group = name_;
  }

  ConformanceRow compare() {
    if (name_ == "longflow") return compare_slots();
    const auto steps = read<int32_t>(file_, name("step"), 1);
    const auto kept = tensor_kept();
    const bool has_scores = group_.scores == ScoreKind::per_slot;
    const auto scores = has_scores ? read<float>(file_, name("score"), 3) : Array<float>{};
    if (has_scores) {
      expect_shape(file_, name("score"), scores.shape,
                   {steps.shape[0], geometry_.n_kv_heads, scores.shape[2]});
      row_.max_score_error = 0;
    }
    int64_t next = 0;
    for (int t = 0; t < n_tokens_ && next < steps.shape[0]; ++t) {
      append(t);
      if (t < n_prompt_) continue;
      const bool recorded = steps.values[next] == t;
      if (is_record_ && recorded) adopt_recorded_slots(t, next);
      if (is_record_ && !recorded) continue;
      const EvictionPlan* plan = evictor_.decide(*policy_, context_, memory_, state_, /*prompt_end=*/false);
      if (!recorded) {
        if (plan && !plan->drops.empty()) {  // an eviction that the reference did not make
          row_.kept_mismatches += static_cast<int64_t>(plan->drops.size());
        }
        continue;
      }
      std::vector<std::vector<Slot>> order(geometry_.n_kv_heads);
      const int64_t per_head = kept.values.size() / steps.shape[0] / n_kept_heads(kept);
      for (int h = 0; h < geometry_.n_kv_heads; ++h) {
        const int64_t row = next * n_kept_heads(kept) + (n_kept_heads(kept) == 1 ? 0 : h);
        order[h] =
            compare_head(h, plan, {kept.values.data() + row * per_head, static_cast<size_t>(per_head)});
        if (has_scores && plan && !plan->drops.empty()) {
          const int64_t length = scores.shape[2];
          compare_scores(h, {scores.values.data() + (next * geometry_.n_kv_heads + h) * length,
                             static_cast<size_t>(length)});
        }
      }
      for (int h = 0; h < geometry_.n_kv_heads; ++h) {
        table_.compact(h, order[h]);
        state_.compact(h, order[h]);
      }
      ++row_.steps;
      ++next;
    }
    return row_;
  }

 private:
  static std::string spec(const TensorFile& file, const Group& group, bool is_record) {
    std::string text = resolve_spec(group, file);
    if (is_record)
      text += ":cadence=1";  // its steps are counted from the first generated token
    else if (!group.every_step)
      text += fmt::format(":cadence={}", metadata_int(file, "divide"));
    return text;
  }

  std::string name(std::string_view field) const { return fmt::format("{}.{}", name_, field); }

  Array<float> rows(const TensorFile& source, std::string_view tensor, int heads) const {
    Array<float> out = read<float>(source, tensor, 3);
    expect_shape(source, tensor, out.shape, {n_tokens_, heads, geometry_.head_dim});
    return out;
  }

  // [n, H, L], or [n, L] when the layer shares.
  Array<int32_t> tensor_kept() const {
    const size_t rank = file_.get(name("kept")).shape.size();
    Array<int32_t> kept = read<int32_t>(file_, name("kept"), rank == 2 ? 2 : 3);
    const int64_t steps = file_.get(name("step")).elements();
    std::vector<int64_t> expected{steps};
    if (rank == 3) expected.push_back(geometry_.n_kv_heads);
    expected.push_back(kept.shape.back());
    expect_shape(file_, name("kept"), kept.shape, expected);
    return kept;
  }
  int64_t n_kept_heads(const Array<int32_t>& kept) const {
    return kept.shape.size() == 3 ? kept.shape[1] : 1;
  }

  // A record holds the position in every slot before the step, in the order of kvpress's cache.
  void adopt_recorded_slots(int t, int64_t step) {
    const auto slots = read<int32_t>(file_, name("slots"), 3);
    const int64_t length = slots.shape[2];
    expect_shape(file_, name("slots"), slots.shape, {slots.shape[0], geometry_.n_kv_heads, length});
    table_ = SlotTable(geometry_.n_kv_heads, n_tokens_);
    for (int pos = 0; pos <= t; ++pos) table_.append(Pos{pos});
    for (int h = 0; h < geometry_.n_kv_heads; ++h) {
      std::vector<Slot> order;  // in a fresh table slot and position agree
      for (int64_t s = 0; s < length; ++s) {
        const int pos = slots.values.at((step * geometry_.n_kv_heads + h) * length + s);
        if (pos > t)
          fail("{}: tensor '{}': step {}: position {} is not yet known", file_.describe(), name("slots"), t,
               pos);
        if (pos >= 0) order.push_back(Slot{pos});
      }
      table_.compact(h, order);
    }
    memory_.attend(table_, Pos{t});
  }

  void append(int t) {
    for (int h = 0; h < geometry_.n_kv_heads; ++h) state_.clear(h, table_.next_slot(h));
    table_.append(Pos{t});
    context_.step = Pos{t};
    memory_.attend(table_, Pos{t});
    if (policy_->info().state_columns == 0) return;
    CheckedInputs inputs(memory_, policy_->info());
    policy_->observe(context_, inputs, state_);
  }

  // Counts differences and returns the survivors of the reference, in our plan's order: a position that only
  // the reference kept takes the place of one that only we kept.
  std::vector<Slot> compare_head(int h, const EvictionPlan* plan, std::span<const int32_t> kept) {
    std::span<const Pos> positions = table_.positions(h);
    const int n = static_cast<int>(positions.size());
    std::vector<Slot> ours;
    std::vector<char> gone(n, 0);
    if (plan)
      for (const Drop& drop : plan->drops)
        if (drop.kv_head == kWholeLayer || drop.kv_head == h) gone[raw(drop.slot)] = 1;
    if (plan && plan->reclaim != Reclaim::fill) {
      ours = plan->keep[h];
    } else {
      for (int s = 0; s < n; ++s)
        if (!gone[s]) ours.push_back(Slot{s});
    }
    std::set<int32_t> theirs;
    for (int32_t pos : kept)
      if (pos >= 0) theirs.insert(pos);

    std::vector<int> only_ours, only_theirs;  // index into `ours`, slot
    for (size_t i = 0; i < ours.size(); ++i)
      if (theirs.count(raw(positions[raw(ours[i])])) == 0) only_ours.push_back(static_cast<int>(i));
    std::set<int32_t> mine;
    for (Slot slot : ours) mine.insert(raw(positions[raw(slot)]));
    for (int s = 0; s < n; ++s)
      if (theirs.count(raw(positions[s])) && !mine.count(raw(positions[s]))) only_theirs.push_back(s);
    size_t held = 0;
    for (int s = 0; s < n; ++s) held += theirs.count(raw(positions[s]));
    if (held != theirs.size())
      fail("{}: tensor '{}': step {}, kv head {}: keeps a position that was not held", file_.describe(),
           name("kept"), raw(context_.step), h);

    if (!only_ours.empty() || !only_theirs.empty()) {
      const bool ties =
          plan && only_ours.size() == only_theirs.size() && all_tied(h, ours, only_ours, only_theirs);
      (ties ? row_.ties : row_.kept_mismatches) +=
          static_cast<int64_t>(std::max(only_ours.size(), only_theirs.size()));
    }
    for (size_t i = 0; i < only_ours.size() && i < only_theirs.size(); ++i)
      ours[only_ours[i]] = Slot{only_theirs[i]};
    for (size_t i = only_ours.size(); i-- > only_theirs.size();) ours.erase(ours.begin() + only_ours[i]);
    for (size_t i = only_ours.size(); i < only_theirs.size(); ++i) ours.push_back(Slot{only_theirs[i]});
    return ours;
  }

  bool all_tied(int h, const std::vector<Slot>& ours, const std::vector<int>& only_ours,
                const std::vector<int>& only_theirs) const {
    std::span<const float> row = evictor_.scores().row(evictor_.scores().shared() ? 0 : h);
    double low = INFINITY, high = -INFINITY;
    auto add = [&](int slot) {
      low = std::min<double>(low, row[slot]);
      high = std::max<double>(high, row[slot]);
    };
    for (int i : only_ours) add(raw(ours[i]));
    for (int s : only_theirs) add(s);
    return high - low <= kTie * std::max(std::abs(low), std::abs(high));
  }

  // Scores are in position order: the reference's slots.
  void compare_scores(int h, std::span<const float> theirs) {
    std::span<const Pos> positions = table_.positions(h);
    std::span<const float> ours = evictor_.scores().row(evictor_.scores().shared() ? 0 : h);
    const Protection protection(context_, policy_->info().rule);
    for (size_t s = 0; s < ours.size(); ++s) {
      if (protection.holds(positions[s])) continue;
      if (s >= theirs.size() || std::isnan(theirs[s])) continue;
      row_.max_score_error =
          std::max(*row_.max_score_error, std::abs(static_cast<double>(ours[s]) - theirs[s]));
    }
  }

  // LongFlow records slots: where each token sits, which slot the next one takes, scores and attention
  // output.
  ConformanceRow compare_slots() {
    const int n_steps = n_tokens_ - n_prompt_, budget = context_.budget;
    const auto slots = read<int32_t>(file_, name("slot"), 1);
    const auto held = read<int32_t>(file_, name("cache_positions"), 2);
    const auto scores = read<float>(file_, name("score"), 2);
    const auto outputs = read<float>(file_, name("attn"), 3);
    expect_shape(file_, name("slot"), slots.shape, {n_steps});
    expect_shape(file_, name("cache_positions"), held.shape, {n_steps, budget});
    expect_shape(file_, name("score"), scores.shape, {n_steps, budget});
    expect_shape(file_, name("attn"), outputs.shape, {n_steps, geometry_.n_q_heads, geometry_.head_dim});
    row_.max_score_error = row_.max_output_error = 0;
    for (int t = 0; t < n_tokens_; ++t) {
      append(t);
      const int i = t - n_prompt_;
      if (i < 0) {
        if (t + 1 == n_prompt_)
          apply(evictor_.decide(*policy_, context_, memory_, state_, /*prompt_end=*/true));
        continue;
      }
      std::span<const Pos> positions = table_.positions(0);
      const int n = static_cast<int>(positions.size());
      for (int s = 0; s < budget; ++s) {
        const int pos = s < n ? raw(positions[s]) : -1;
        row_.kept_mismatches += pos != held.values[static_cast<size_t>(i) * budget + s];
      }
      for (int q = 0; q < geometry_.n_q_heads; ++q) {
        std::span<const float> output = memory_.output(q);
        for (int d = 0; d < geometry_.head_dim; ++d) {
          const size_t at = (static_cast<size_t>(i) * geometry_.n_q_heads + q) * geometry_.head_dim + d;
          *row_.max_output_error =
              std::max(*row_.max_output_error, std::abs(static_cast<double>(output[d]) - outputs.values[at]));
        }
      }
      const EvictionPlan* plan = evictor_.decide(*policy_, context_, memory_, state_, /*prompt_end=*/false);
      int chosen = plan ? raw(plan->drops.front().slot) : n;
      const int theirs = slots.values[i];
      if (plan) {
        std::span<const float> row = evictor_.scores().row(0);
        for (int s = 0; s < n; ++s)
          *row_.max_score_error = std::max(
              *row_.max_score_error,
              std::abs(static_cast<double>(row[s]) - scores.values[static_cast<size_t>(i) * budget + s]));
        if (chosen != theirs && theirs >= 0 && theirs < n) {
          const double a = row[chosen], b = row[theirs];
          const bool tie = std::abs(a - b) <= kTie * std::max(std::abs(a), std::abs(b));
          ++(tie ? row_.ties : row_.kept_mismatches);
          chosen = theirs;
        }
      }
      if (chosen != theirs) ++row_.kept_mismatches;
      if (plan)
        for (int h = 0; h < geometry_.n_kv_heads; ++h) table_.vacate(h, Slot{chosen});
      ++row_.steps;
    }
    return row_;
  }

  void apply(const EvictionPlan* plan) {
    if (!plan) return;
    memory_.apply(*plan);
    apply_plan(*plan, table_, state_);
  }

  const TensorFile& file_;
  const Group& group_;
  std::string name_;  // prefix of the group's tensors
  bool is_record_;
  std::unique_ptr<Policy> policy_;
  int n_tokens_, n_prompt_;
  CacheGeometry geometry_;
  Array<float> q_, k_, v_;
  TensorMemory memory_;
  SlotTable table_;
  SlotState state_;
  Evictor evictor_;
  LayerContext context_;
  ConformanceRow row_;
};

std::vector<std::string> groups_of(const TensorFile& file) {
  std::set<std::string> names;
  for (const TensorView& tensor : file.tensors()) {
    const size_t dot = tensor.name.rfind('.');
    const std::string_view field = dot == std::string_view::npos ? "" : tensor.name.substr(dot + 1);
    if (field == "kept" || field == "slot" || field == "slots")
      names.insert(std::string(tensor.name.substr(0, dot)));
  }
  return {names.begin(), names.end()};
}

}  // namespace

bool has_policy_vectors(const TensorFile& file) {
  return !groups_of(file).empty();
}

void check_policy_vectors(const TensorFile& file, const std::vector<const TensorFile*>& all, bool decoding,
                          ConformanceReport& report) {
  const TensorFile& source = source_of(file, all);
  for (const std::string& name : groups_of(file)) {
    const bool is_record = name.starts_with(kRecordPrefix);
    if (is_record && !decoding) {
      report.skipped.push_back(
          {file.describe(), name, "a record of DecodingPress's behaviour: asked for by --decoding"});
      continue;
    }
    auto group = std::find_if(std::begin(kGroups), std::end(kGroups), [&](const Group& g) {
      return g.name == std::string_view(name).substr(is_record ? kRecordPrefix.size() : 0);
    });
    if (group == std::end(kGroups))
      report.skipped.push_back({file.describe(), name, "no implementation here"});
    else if (is_record && !group->decoding)
      report.skipped.push_back(
          {file.describe(), name, "reads slots as positions or other inputs than the press"});
    else
      report.rows.push_back(Run(file, source, *group, is_record).compare());
  }
}

}  // namespace kvlapse
