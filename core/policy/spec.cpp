#include "core/policy/spec.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "core/base/error.h"
#include "core/policy/plugin.h"
#include "core/policy/registry.h"

namespace kvlapse {
namespace {

constexpr std::string_view kRuleKeys[] = {"pin_prompt", "recent", "gqa",        "cadence",
                                          "cast",       "ties",   "granularity"};

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (size_t start = 0;;) {
    size_t end = text.find(separator, start);
    parts.push_back(text.substr(start, end - start));
    if (end == std::string_view::npos) return parts;
    start = end + 1;
  }
}

double number(std::string_view policy, std::string_view key, std::string_view text, double min, double max) {
  double value = 0;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc{} || end != text.data() + text.size() || !(value >= min && value <= max))
    fail_usage("policy {}: {}: expected a number in [{:g}, {:g}], found '{}'", policy, key, min, max, text);
  return value;
}

size_t choice_index(std::string_view policy, std::string_view key, std::string_view text,
                    std::span<const std::string_view> names) {
  for (size_t i = 0; i < names.size(); ++i)
    if (names[i] == text) return i;
  std::string all;
  for (std::string_view name : names) all += (all.empty() ? "" : ", ") + std::string(name);
  fail_usage("policy {}: {}: expected one of {}, found '{}'", policy, key, all, text);
}

template <typename Enum, size_t N>
Enum choice(std::string_view policy, std::string_view key, std::string_view text,
            const std::string_view (&names)[N]) {
  return static_cast<Enum>(choice_index(policy, key, text, names));
}

constexpr std::string_view kGqaNames[] = {"mean", "max", "sum"};
constexpr std::string_view kCastNames[] = {"fp32", "fp16", "bf16"};
constexpr std::string_view kTieNames[] = {"first", "last", "torch"};
constexpr std::string_view kGranularityNames[] = {"layer", "kv_head"};

// True when the key is one that every policy has.
bool set_rule(PolicyInfo& info, std::string_view key, std::string_view value) {
  EvictionRule& rule = info.rule;
  if (key == "pin_prompt")
    rule.pin_prompt = number(info.name, key, value, 0, 1) != 0;
  else if (key == "recent")
    rule.recent = number(info.name, key, value, 0, 1e6);
  else if (key == "cadence")
    rule.cadence = static_cast<int>(number(info.name, key, value, 1, 65536));
  else if (key == "gqa")
    rule.gqa = choice<GqaRule>(info.name, key, value, kGqaNames);
  else if (key == "cast")
    rule.cast = choice<ScoreCast>(info.name, key, value, kCastNames);
  else if (key == "ties")
    rule.ties = choice<TieOrder>(info.name, key, value, kTieNames);
  else if (key == "granularity")
    rule.granularity = choice<Granularity>(info.name, key, value, kGranularityNames);
  else
    return false;
  return true;
}

size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<size_t> row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) row[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    size_t diagonal = row[0];
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      size_t above = row[j];
      row[j] = std::min({row[j] + 1, row[j - 1] + 1, diagonal + (a[i - 1] != b[j - 1])});
      diagonal = above;
    }
  }
  return row[b.size()];
}

const PolicyEntry& find_entry(const PolicySpec& spec, PolicyInfo& info) {
  if (is_plugin_name(spec.name)) {
    static constexpr PolicyEntry kPlugin{nullptr, make_plugin};
    if (!spec.reference.empty())
      fail_usage("policy {}: a plug-in has no references, found '@{}'", spec.name, spec.reference);
    info = plugin_info(spec.name);
    return kPlugin;
  }
  std::vector<std::string_view> names, references;
  for (const PolicyEntry& entry : policy_registry()) {
    info = entry.info();
    names.push_back(info.name);
    if (info.name != spec.name) continue;
    references.push_back(info.reference);
    if (!spec.reference.empty() && spec.reference != info.reference) continue;
    if (entry.specialise) info = entry.specialise(spec);
    return entry;
  }
  if (references.empty()) fail_usage("policy: unknown name '{}'{}", spec.name, suggest(spec.name, names));
  std::string known;
  for (std::string_view r : references)
    known += (known.empty() ? "" : ", ") + std::string(r.empty() ? "none" : r);
  fail_usage("policy {}: unknown reference '@{}'; known: {}", spec.name, spec.reference, known);
}

}  // namespace

std::string suggest(std::string_view word, const std::vector<std::string_view>& known) {
  std::vector<std::pair<size_t, std::string_view>> near;
  for (std::string_view k : known) {
    size_t d = k.starts_with(word) ? 1 : edit_distance(word, k);
    if (d <= std::max<size_t>(2, word.size() / 3)) near.emplace_back(d, k);
  }
  std::sort(near.begin(), near.end());
  near.erase(std::unique(near.begin(), near.end()), near.end());
  if (near.empty()) return "";
  std::string text = fmt::format(" (did you mean '{}'", near[0].second);
  if (near.size() > 1) text += fmt::format(" or '{}'", near[1].second);
  return text + "?)";
}

PolicySpec parse_policy_spec(std::string_view text) {
  PolicySpec spec;
  std::vector<std::string_view> parts = split(text, ':');
  std::string_view head = parts[0];
  if (size_t at = head.find('@'); at != std::string_view::npos && !is_plugin_name(head)) {
    spec.reference = head.substr(at + 1);
    head = head.substr(0, at);
    if (spec.reference.empty()) fail_usage("policy '{}': expected a reference after '@'", text);
  }
  spec.name = head;
  if (spec.name.empty()) fail_usage("policy '{}': expected name[@reference][:key=value...]", text);
  for (size_t i = 1; i < parts.size(); ++i) {
    size_t equals = parts[i].find('=');
    if (equals == 0 || equals == std::string_view::npos)
      fail_usage("policy '{}': expected key=value after ':', found '{}'", text, parts[i]);
    spec.options.emplace_back(parts[i].substr(0, equals), parts[i].substr(equals + 1));
  }
  return spec;
}

std::vector<PolicySpec> parse_policy_list(std::string_view text) {
  std::vector<PolicySpec> specs;
  for (std::string_view part : split(text, ',')) specs.push_back(parse_policy_spec(part));
  return specs;
}

std::unique_ptr<Policy> make_policy(const PolicySpec& spec) {
  PolicyInfo info;
  const PolicyEntry& entry = find_entry(spec, info);
  for (const auto& [key, value] : spec.options) {
    auto parameter = std::find_if(info.parameters.begin(), info.parameters.end(),
                                  [&key = key](const ParameterInfo& p) { return p.name == key; });
    if (parameter != info.parameters.end()) {
      if (parameter->choices.empty())
        parameter->value = number(info.name, key, value, parameter->min, parameter->max);
      else
        parameter->value = static_cast<double>(choice_index(info.name, key, value, parameter->choices));
    } else if (auto text = std::find_if(info.texts.begin(), info.texts.end(),
                                        [&key = key](const TextParameter& p) { return p.name == key; });
               text != info.texts.end()) {
      text->value = value;
    } else if (!set_rule(info, key, value)) {
      std::vector<std::string_view> known(std::begin(kRuleKeys), std::end(kRuleKeys));
      for (const ParameterInfo& p : info.parameters) known.push_back(p.name);
      for (const TextParameter& p : info.texts) known.push_back(p.name);
      fail_usage("policy {}: unknown key '{}'{}", info.name, key, suggest(key, known));
    }
  }
  // Holes can only be filled one at a time, as the tokens come.
  if (info.rule.cadence > 1 && info.rule.reclaim == Reclaim::fill) info.rule.reclaim = Reclaim::compact;
  return entry.make(std::move(info));
}

std::unique_ptr<Policy> make_policy(std::string_view spec) {
  return make_policy(parse_policy_spec(spec));
}

std::string canonical_spec(const Policy& policy) {
  const PolicyInfo& info = policy.info();
  PolicyInfo plain;
  PolicySpec bare{std::string(info.name), std::string(info.reference), {}};
  for (const ParameterInfo& p : info.parameters)  // what an entry specialises on is named by a choice
    if (!p.choices.empty()) bare.options.emplace_back(p.name, p.choices[static_cast<size_t>(p.value)]);
  const PolicyEntry& entry = find_entry(bare, plain);
  // An instance, not the catalogue entry: a factory derives parts of the rule from the parameters.
  PolicyInfo same_parameters = plain;
  same_parameters.parameters = info.parameters;
  std::unique_ptr<Policy> base = entry.make(std::move(same_parameters));
  const EvictionRule &a = info.rule, &b = base->info().rule;
  std::string text(info.name);
  if (!info.reference.empty()) text += fmt::format("@{}", info.reference);
  for (size_t i = 0; i < info.parameters.size(); ++i)
    if (const ParameterInfo& p = info.parameters[i]; p.value != plain.parameters[i].value)
      text += p.choices.empty() ? fmt::format(":{}={}", p.name, p.value)
                                : fmt::format(":{}={}", p.name, p.choices[static_cast<size_t>(p.value)]);
  for (const TextParameter& p : info.texts)
    if (!p.value.empty()) text += fmt::format(":{}={}", p.name, p.value);
  if (a.cadence != b.cadence) text += fmt::format(":cadence={}", a.cadence);
  if (a.cast != b.cast) text += fmt::format(":cast={}", kCastNames[static_cast<int>(a.cast)]);
  if (a.gqa != b.gqa) text += fmt::format(":gqa={}", kGqaNames[static_cast<int>(a.gqa)]);
  if (a.granularity != b.granularity)
    text += fmt::format(":granularity={}", kGranularityNames[static_cast<int>(a.granularity)]);
  if (a.pin_prompt != b.pin_prompt) text += fmt::format(":pin_prompt={}", a.pin_prompt ? 1 : 0);
  if (a.recent != b.recent) text += fmt::format(":recent={:g}", a.recent);
  if (a.ties != b.ties) text += fmt::format(":ties={}", kTieNames[static_cast<int>(a.ties)]);
  return text;
}

int Budget::slots(int total_tokens) const {
  if (!is_share) return static_cast<int>(value);
  return std::max(1, static_cast<int>(std::lround(value / 100 * total_tokens)));
}

std::string Budget::text() const {
  return is_share ? fmt::format("{:g}%", value) : fmt::format("{:g}", value);
}

Budget parse_budget(std::string_view text) {
  Budget budget;
  std::string_view digits = text;
  if (digits.ends_with('%')) {
    budget.is_share = true;
    digits.remove_suffix(1);
  }
  auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), budget.value);
  bool parsed = error == std::errc{} && end == digits.data() + digits.size() && !digits.empty();
  bool valid = budget.is_share
                   ? budget.value > 0 && budget.value <= 100
                   : budget.value >= 1 && budget.value <= 1 << 24 && budget.value == std::floor(budget.value);
  if (!parsed || !valid)
    fail_usage("budget: expected slots per kv head (512) or a share of the sequence (25%), found '{}'", text);
  return budget;
}

std::vector<Budget> parse_budget_list(std::string_view text) {
  std::vector<Budget> budgets;
  for (std::string_view part : split(text, ',')) budgets.push_back(parse_budget(part));
  return budgets;
}

}  // namespace kvlapse
