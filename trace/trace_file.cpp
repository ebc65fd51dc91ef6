#include "trace/trace_file.h"

#include <charconv>

#include "core/base/error.h"
#include "core/policy/spec.h"

namespace kvlapse {

std::span<const Migration> trace_schema();  // generated from trace/schema

namespace {

constexpr int32_t kApplicationId = 0x4b564c54;  // "KVLT"

// Bounds that no real model nears; a damaged header must not become an allocation.
struct IntField {
  const char* key;
  int TraceHeader::*top = nullptr;
  int CacheGeometry::*shape = nullptr;
  int min = 0, max = 0;
};
constexpr IntField kIntFields[] = {
    {"n_layers", nullptr, &CacheGeometry::n_layers, 1, 4096},
    {"n_q_heads", nullptr, &CacheGeometry::n_q_heads, 1, 4096},
    {"n_kv_heads", nullptr, &CacheGeometry::n_kv_heads, 1, 4096},
    {"head_dim", nullptr, &CacheGeometry::head_dim, 1, 4096},
    {"n_slots", nullptr, &CacheGeometry::n_slots, 0, 1 << 28},
    {"layer_begin", &TraceHeader::layer_begin, nullptr, 0, 4096},
    {"layer_end", &TraceHeader::layer_end, nullptr, 0, 4096},
    {"budget_slots", &TraceHeader::budget_slots, nullptr, 0, 1 << 28},
    {"n_sequences", &TraceHeader::n_sequences, nullptr, 1, 1 << 16},
};
int& field_of(TraceHeader& header, const IntField& field) {
  return field.top ? header.*field.top : header.geometry.*field.shape;
}

constexpr std::string_view kReservedKeys[] = {
    "format",          "kvlapse_version", "kv_dtype",     "tier",       "budget_text", "rope_theta",
    "rope_convention", "gqa_map",         "chunk_steps",  "sketch_top", "complete",    "interrupted",
    "content_hash",    "n_layers",        "n_q_heads",    "n_kv_heads", "head_dim",    "n_slots",
    "layer_begin",     "layer_end",       "budget_slots", "n_sequences"};

std::string need(const MetaMap& meta, const std::string& file, const std::string& key) {
  auto found = meta.find(key);
  if (found == meta.end()) fail("{}: KV_META: expected the key '{}', found none", file, key);
  return found->second;
}

template <typename Number>
Number parse_number(const std::string& text, const std::string& file, std::string_view what) {
  Number value{};
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size())
    fail("{}: {}: expected a number, found '{}'", file, what, text.substr(0, 40));
  return value;
}

void check_shape(const TraceHeader& header, const std::string& file) {
  const CacheGeometry& g = header.geometry;
  if (g.n_q_heads % g.n_kv_heads != 0)
    fail("{}: n_q_heads: expected a multiple of n_kv_heads = {}, found {}", file, g.n_kv_heads, g.n_q_heads);
  if (header.layer_begin > header.layer_end || header.layer_end > g.n_layers)
    fail("{}: layers: expected a range within 0:{}, found {}:{}", file, g.n_layers, header.layer_begin,
         header.layer_end);
  if (!header.policy.layer_budgets.empty() &&
      static_cast<int>(header.policy.layer_budgets.size()) != g.n_layers)
    fail("{}: KV_LAYER: expected {} budgets, found {}", file, g.n_layers, header.policy.layer_budgets.size());
}

// KV_POLICY holds the rule by name so that it can be queried; enumerations are stored as their number with
// the meaning in the summary.
struct RuleField {
  std::string_view name, summary;
  double (*get)(const EvictionRule&);
  void (*set)(EvictionRule&, double);
};
#define KVLAPSE_RULE_FIELD(member, type, text)                                                              \
  {                                                                                                         \
#member, text,                                                                                          \
        [](const EvictionRule&                                                                              \
               r) { return static_cast<double>(r.member); },                                                \
                                                          [](EvictionRule & r,                              \
                                                             double v) { r.member = static_cast<type>(v); } \
  }
constexpr RuleField kRuleFields[] = {
    KVLAPSE_RULE_FIELD(cadence, int, "evicts after token t when (t + 1) % cadence == 0"),
    KVLAPSE_RULE_FIELD(headroom, int, "slots left free by an eviction"),
    KVLAPSE_RULE_FIELD(granularity, Granularity, "0: victims shared by the layer, 1: per kv head"),
    KVLAPSE_RULE_FIELD(gqa, GqaRule, "how query heads become one kv head: 0 mean, 1 max, 2 sum"),
    KVLAPSE_RULE_FIELD(reclaim, Reclaim,
                       "0: next token overwrites the victim, 1: compact, 2: compact in score order"),
    KVLAPSE_RULE_FIELD(cast, ScoreCast, "precision of comparison: 0 fp32, 1 fp16, 2 bf16"),
    KVLAPSE_RULE_FIELD(ties, TieOrder, "first to go among equals: 0 lowest slot, 1 highest slot"),
    KVLAPSE_RULE_FIELD(pin_prompt, bool, "1: prompt tokens are never evicted"),
    KVLAPSE_RULE_FIELD(sinks, int, "first positions that are never evicted"),
    KVLAPSE_RULE_FIELD(recent, double, "newest tokens that are never evicted; below 1: share of the budget"),
    KVLAPSE_RULE_FIELD(ragged, bool, "1: one ranking over the layer's heads, counts may differ"),
    KVLAPSE_RULE_FIELD(ragged_floor, double, "share of the budget that every head keeps when ragged"),
};
#undef KVLAPSE_RULE_FIELD

struct TextField {
  std::string_view name, summary;
  std::string TracePolicy::*member;
};
constexpr TextField kTextFields[] = {
    {"spec", "canonical spec: equal text means equal behaviour for one version", &TracePolicy::spec},
    {"name", "name in the catalogue", &TracePolicy::name},
    {"reference", "which published form", &TracePolicy::reference},
    {"summary", "in words", &TracePolicy::summary},
    {"formula", "score of a token; the lowest goes first", &TracePolicy::formula},
    {"paper", "", &TracePolicy::paper},
    {"source", "reference implementation and commit", &TracePolicy::source},
};

void store_policy(Database& database, const TraceHeader& header) {
  const TracePolicy& policy = header.policy;
  Statement insert(database, "INSERT INTO KV_POLICY(name, kind, value, summary) VALUES(?, ?, ?, ?)");
  using View = std::string_view;
  for (const TextField& field : kTextFields)
    insert.run(field.name, View("identity"), View(policy.*field.member), field.summary);
  insert.run(View("version"), View("identity"), policy.version, View("raised when victims change"));
  insert.run(View("evicts"), View("identity"), policy.evicts ? 1 : 0, View("0: keeps everything"));
  for (size_t i = 0; i < policy.score_parts.size(); ++i)
    insert.run(View(fmt::format("score_part{}", i)), View("identity"), View(policy.score_parts[i]),
               View("name of that part of an eviction's score"));
  for (const RuleField& field : kRuleFields)
    insert.run(field.name, View("rule"), field.get(policy.rule), field.summary);
  for (const auto& [name, value] : policy.parameters)
    insert.run(View("parameter." + name), View("parameter"), value, View("resolved"));

  Statement layer(database, "INSERT INTO KV_LAYER(layer, budget_slots, rows_recorded) VALUES(?, ?, ?)");
  for (int l = 0; l < header.geometry.n_layers; ++l) {
    layer.bind(1, l);
    if (policy.layer_budgets.empty())
      layer.bind_null(2);
    else
      layer.bind(2, policy.layer_budgets[l]);
    layer.bind(3, header.has_rows(l) || header.has_sketch(l) ? 1 : 0);
    layer.step();
    layer.reset();
  }
}

TracePolicy load_policy(Database& database, int n_layers) {
  TracePolicy policy;
  Statement select(database, "SELECT name, kind, value FROM KV_POLICY ORDER BY name");
  std::map<std::string, std::string> parts;
  while (select.step()) {
    const std::string name(select.text(0));
    if (select.text(1) == "parameter") {
      policy.parameters.emplace_back(name.starts_with("parameter.") ? name.substr(10) : name, select.real(2));
      continue;
    }
    for (const TextField& field : kTextFields)
      if (field.name == name) policy.*field.member = std::string(select.text(2));
    for (const RuleField& field : kRuleFields) {
      if (field.name != name) continue;
      const double value = select.real(2);
      if (!(value >= -1e9 && value <= 1e9))
        fail("{}: KV_POLICY: {}: expected a number, found {}", database.file(), name, value);
      field.set(policy.rule, value);
    }
    if (name == "version") policy.version = static_cast<int>(select.integer(2));
    if (name == "evicts") policy.evicts = select.integer(2) != 0;
    if (name.starts_with("score_part")) parts[name] = std::string(select.text(2));
  }
  for (auto& [name, value] : parts) policy.score_parts.push_back(value);
  if (policy.score_parts.size() > 2)
    fail("{}: KV_POLICY: expected at most 2 score parts, found {}", database.file(),
         policy.score_parts.size());
  if (policy.rule.cadence < 1)
    fail("{}: KV_POLICY: cadence: expected at least 1, found {}", database.file(), policy.rule.cadence);

  Statement layers(database, "SELECT layer, budget_slots FROM KV_LAYER ORDER BY layer");
  int expected = 0;
  while (layers.step()) {
    if (layers.integer(0) != expected || expected >= n_layers)
      fail("{}: KV_LAYER: expected layer {} of {}, found {}", database.file(), expected, n_layers,
           layers.integer(0));
    ++expected;
    if (!layers.is_null(1)) policy.layer_budgets.push_back(static_cast<int>(layers.integer(1)));
  }
  if (expected != n_layers)
    fail("{}: KV_LAYER: expected {} rows, found {}", database.file(), n_layers, expected);
  return policy;
}

}  // namespace

const FileKind& trace_file_kind() {
  static const FileKind kind{"a kvlapse trace", kApplicationId, trace_schema()};
  return kind;
}

std::string_view tier_name(TraceTier tier) {
  constexpr std::string_view kNames[] = {"events", "sketch", "qkv"};
  return kNames[static_cast<int>(tier)];
}

TraceTier parse_tier(std::string_view name) {
  for (TraceTier tier : {TraceTier::events, TraceTier::sketch, TraceTier::qkv})
    if (tier_name(tier) == name) return tier;
  fail_usage("tier: expected events, sketch or qkv, found '{}'", name);
}

TracePolicy describe_policy(const Policy& policy, int budget_slots, int n_layers) {
  const PolicyInfo& info = policy.info();
  TracePolicy out;
  out.spec = canonical_spec(policy);
  out.name = info.name;
  out.reference = info.reference;
  out.summary = info.summary;
  out.formula = info.formula;
  out.paper = info.paper;
  out.source = info.source;
  out.version = info.version;
  out.evicts = info.evicts;
  out.rule = info.rule;
  out.score_parts.assign(info.score_parts.begin(), info.score_parts.end());
  for (const ParameterInfo& parameter : info.parameters)
    out.parameters.emplace_back(parameter.name, parameter.value);
  if (info.evicts)
    for (int l = 0; l < n_layers; ++l)
      out.layer_budgets.push_back(policy.layer_budget(l, n_layers, budget_slots));
  return out;
}

void store_header(Database& database, const TraceHeader& header) {
  const CacheGeometry& g = header.geometry;
  TraceHeader copy = header;
  for (const IntField& field : kIntFields)
    if (int value = field_of(copy, field); value < field.min || value > field.max)
      fail("{}: {}: expected {} to {}, found {}", database.file(), field.key, field.min, field.max, value);
  check_shape(header, database.file());
  MetaMap meta = header.meta;
  for (std::string_view key : kReservedKeys)
    if (meta.count(std::string(key)))
      fail("{}: meta: the key '{}' belongs to the format", database.file(), key);
  for (const IntField& field : kIntFields) meta[field.key] = std::to_string(field_of(copy, field));
  meta["format"] = "kvlapse trace";
  meta["kvlapse_version"] = KVLAPSE_VERSION;
  meta["kv_dtype"] = dtype_name(g.dtype);
  meta["tier"] = tier_name(header.tier);
  meta["budget_text"] = header.budget_text;
  meta["rope_theta"] = fmt::format("{}", header.rope_theta);
  meta["rope_convention"] = "half-split; q and k are stored after rotation";
  meta["gqa_map"] = fmt::format("kv_head = q_head / {}", g.group());
  meta["chunk_steps"] = std::to_string(kChunkSteps);
  meta["sketch_top"] = std::to_string(kSketchTop);
  meta["complete"] = "0";
  meta["interrupted"] = "0";
  store_meta(database, meta);
  store_policy(database, header);
}

TraceHeader load_header(Database& database) {
  const std::string& file = database.file();
  TraceHeader header;
  header.meta = load_meta(database);
  for (const IntField& field : kIntFields) {
    const int value = parse_number<int>(need(header.meta, file, field.key), file, field.key);
    if (value < field.min || value > field.max)
      fail("{}: KV_META: {}: expected {} to {}, found {}", file, field.key, field.min, field.max, value);
    field_of(header, field) = value;
  }
  try {
    header.geometry.dtype = parse_dtype(need(header.meta, file, "kv_dtype"));
    header.tier = parse_tier(need(header.meta, file, "tier"));
  } catch (const UsageError& error) {
    fail("{}: KV_META: {}", file, error.what());
  }
  header.budget_text = need(header.meta, file, "budget_text");
  header.rope_theta = parse_number<double>(need(header.meta, file, "rope_theta"), file, "rope_theta");
  for (auto [key, expected] : {std::pair{"chunk_steps", kChunkSteps}, std::pair{"sketch_top", kSketchTop}})
    if (int found = parse_number<int>(need(header.meta, file, key), file, key); found != expected)
      fail("{}: KV_META: {}: expected {}, found {}", file, key, expected, found);
  header.policy = load_policy(database, header.geometry.n_layers);
  check_shape(header, file);
  return header;
}

MetaMap load_meta(Database& database) {
  MetaMap meta;
  Statement select(database, "SELECT key, value FROM KV_META");
  while (select.step()) meta[std::string(select.text(0))] = std::string(select.text(1));
  return meta;
}

void store_meta(Database& database, const MetaMap& meta) {
  Statement insert(database, "INSERT OR REPLACE INTO KV_META(key, value) VALUES(?, ?)");
  for (const auto& [key, value] : meta) insert.run(std::string_view(key), std::string_view(value));
}

std::string compute_content_hash(Database& database, const TraceHeader& header) {
  const CacheGeometry& g = header.geometry;
  ContentHash hash;
  hash.add("kvlapse trace 1").add(dtype_name(g.dtype)).add(tier_name(header.tier));
  for (int value : {g.n_layers, g.n_q_heads, g.n_kv_heads, g.head_dim}) hash.add(value);
  Statement sequences(database, "SELECT sequence, n_prompt FROM KV_SEQUENCE ORDER BY sequence");
  while (sequences.step()) hash.add(sequences.integer(0)).add(sequences.integer(1));
  Statement chunks(database,
                   "SELECT kind, sequence, layer, step_begin, step_end, raw_bytes, checksum FROM KV_CHUNK"
                   " ORDER BY kind, sequence, layer, step_begin, step_end");
  while (chunks.step()) {
    hash.add(chunks.text(0));
    for (int column = 1; column <= 6; ++column) hash.add(chunks.integer(column));
  }
  return hash.hex();
}

}  // namespace kvlapse
