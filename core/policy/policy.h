// Policy: a pure rule that scores the tokens of one layer; the Evictor turns scores into an EvictionPlan. A
// policy has no device, no I/O and no hidden state: what it remembers per slot lives in SlotState columns
// that move with the slot. The same object serves live decode and replay, from any number of threads at once.
#pragma once

#include <array>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "core/cache/slot_table.h"
#include "core/policy/layer_inputs.h"

namespace kvlapse {

enum class Granularity : uint8_t { layer, kv_head };  // who shares a victim
enum class GqaRule : uint8_t { mean, max, sum };      // how a group's query heads become one kv head
enum class ScoreCast : uint8_t { fp32, fp16, bf16 };  // precision in which scores are compared
// Which slot goes first among equal scores. `torch`: the survivors are those that torch.topk keeps on the
// CPU, in its order (libstdc++'s nth_element and sort over slot order); references whose scores tie need it.
enum class TieOrder : uint8_t { first, last, torch };

enum class Reclaim : uint8_t {
  fill,              // one victim; the next token overwrites its slot (LongFlow)
  compact,           // survivors move together, slot order kept
  compact_by_score,  // survivors in descending score, protected recent ones behind (torch.topk order: R-KV)
};

// How often, how much, for whom and under whose protection the evictor acts. A policy gives its reference's
// values; the keys `pin_prompt recent gqa cadence cast ties granularity` of a spec override them.
struct EvictionRule {
  int cadence = 1;   // evicts after token t when (t + 1) % cadence == 0
  int headroom = 1;  // slots left free by an eviction; 1: attention never sees more than `budget` tokens
  int slack = 0;     // tokens above the target (budget - headroom) that do not yet trigger an eviction
  Granularity granularity = Granularity::kv_head;
  GqaRule gqa = GqaRule::mean;
  Reclaim reclaim = Reclaim::fill;
  ScoreCast cast = ScoreCast::fp32;
  TieOrder ties = TieOrder::first;
  bool pin_prompt = false;
  int sinks = 0;            // first positions that are never evicted
  double recent = 0;        // newest tokens that are never evicted; below 1: that share of the budget
  bool ragged = false;      // one ranking over the layer's heads: counts may differ (Ada-KV)
  double ragged_floor = 0;  // share of the budget that every head keeps when ragged

  // Most tokens that attention sees at once, prompt aside.
  int peak_slots(int budget) const { return budget - headroom + slack + cadence; }
  int recent_slots(int budget) const {
    return recent < 1 ? static_cast<int>(recent * budget) : static_cast<int>(recent);
  }
};

struct ParameterInfo {
  std::string_view name;
  double value = 0;  // default in the catalogue, resolved value in an instance
  double min = 0, max = 0;
  std::string_view summary;
  std::vector<std::string_view> choices =
      {};  // when not empty the value is an index into it and written by name
};

// A parameter that is no number: the name of a file, say. No ':' or ',' in it.
struct TextParameter {
  std::string_view name;
  std::string value;  // "" in the catalogue
  std::string_view summary;
};

// PolicyInfo::query_window of a policy that may ask for the queries of every token.
inline constexpr int kAllQueries = 1 << 24;

struct PolicyInfo {
  std::string_view name;
  std::string_view reference;  // "" when the name has one meaning
  int version = 1;             // raised when victims change; part of every result's key
  std::string_view summary;
  std::string_view formula;
  std::string_view paper;
  std::string_view source;  // reference implementation and commit
  std::vector<std::string_view> deviations;
  std::vector<ParameterInfo> parameters;
  std::vector<TextParameter> texts = {};
  // Hashes of the recordings, and of their sequences' token ids, that a calibration was fitted on: to be
  // scored on one of them only when the spec allows it.
  std::vector<std::string> fitted_on = {};
  bool allows_fitted = false;
  EvictionRule rule;
  SignalSet signals = 0;
  int query_window = 0;                       // most rows that window_* will be asked for
  int state_columns = 0;                      // SlotState columns
  int workspace_floats_per_slot = 0;          // beyond state columns, for memory accounting
  bool pairwise_similarity = false;           // the reference builds a slots x slots matrix per kv head
  float alike_above = 0;                      // cosine that last_alike() is asked for; 0: not asked
  std::vector<std::string_view> score_parts;  // named parts of the score, at most 2
  FusedScore fused = FusedScore::none;        // what a device may compute in the policy's stead
  DeviceScore device = DeviceScore::none;     // what a device may replay in the policy's stead
  bool evicts = true;                         // false: full, and policies that select
  // Holds every token and attends, at each step, to the `budget` of highest score per kv head: memory is not
  // reduced. Replay only.
  bool selects = false;
  // Positions are counted inside the cache (StreamingLLM): keys in front of an evicted token are rotated
  // again.
  bool cache_positions = false;
};

// The score by which a device may choose a step's victim in the policy's stead: none unless the rule, too, is
// the device's: one victim each step, the first of the lowest fp32 scores, overwritten in place.
FusedScore fused_score(const PolicyInfo& info);

// Where and when a policy is asked.
struct LayerContext {
  CacheGeometry geometry;
  int layer = 0;
  Pos step{0};                     // position of the newest token
  int n_prompt = 0;                // tokens of the prompt
  int budget = 0;                  // slots per kv head in this layer
  double rope_theta = 0;           // base of the half-split rotation of q and k; 0: unknown
  FutureInputs* future = nullptr;  // null in a live decode
  EvictionRule rule;
  const SlotTable* table = nullptr;

  int count(int kv_head) const { return table->count(kv_head); }
  std::span<const Pos> positions(int kv_head) const { return table->positions(kv_head); }
};

// Per-slot numbers of a policy, [columns][H][capacity] fp32; zero for a new token.
class SlotState {
 public:
  SlotState(int columns, int n_kv_heads, int capacity);
  std::span<float> column(int column, int kv_head);
  std::span<const float> column(int column, int kv_head) const;
  void clear(int kv_head, Slot slot);
  void compact(int kv_head, std::span<const Slot> order);

 private:
  int columns_, n_kv_heads_, capacity_;
  std::vector<float> values_, scratch_;
};

// Scores of one decision: one row per kv head, or a single row when the layer shares its victims. Higher is
// kept.
class Scores {
 public:
  void reset(int n_rows, int n_parts, std::span<const int> counts);
  int n_rows() const { return static_cast<int>(offsets_.size()) - 1; }
  int n_parts() const { return static_cast<int>(parts_.size()); }
  bool shared() const { return n_rows() == 1; }
  std::span<float> row(int row) { return {values_.data() + offsets_[row], size(row)}; }
  std::span<const float> row(int row) const { return {values_.data() + offsets_[row], size(row)}; }
  std::span<float> part(int part, int row) { return {parts_[part].data() + offsets_[row], size(row)}; }
  std::span<const float> part(int part, int row) const {
    return {parts_[part].data() + offsets_[row], size(row)};
  }

 private:
  size_t size(int row) const { return offsets_[row + 1] - offsets_[row]; }
  std::vector<size_t> offsets_;
  std::vector<float> values_;
  std::vector<std::vector<float>> parts_;
};

class Policy {
 public:
  explicit Policy(PolicyInfo info) : info_(std::move(info)) {}
  virtual ~Policy() = default;
  const PolicyInfo& info() const { return info_; }
  double parameter(std::string_view name) const;

  // After every token's attention, prompt tokens included, before any eviction. Only called when
  // state_columns > 0.
  virtual void observe(const LayerContext&, LayerInputs&, SlotState&) const {}
  // Fills scores.row(r) for every slot, protected ones too (their values are ignored).
  virtual void score(const LayerContext&, LayerInputs&, const SlotState&, Scores&) const = 0;
  // The cut of a prompt longer than the budget; scored as any other unless the reference does otherwise.
  virtual void score_prompt(const LayerContext& at, LayerInputs& inputs, const SlotState& state,
                            Scores& out) const {
    score(at, inputs, state, out);
  }
  // Throws Error when the policy was made for another model.
  virtual void check_model(const CacheGeometry& /*geometry*/, double /*rope_theta*/) const {}
  // Rule of that cut.
  virtual EvictionRule prompt_rule(int budget) const;
  // Budget of a layer when layers differ.
  virtual int layer_budget(int /*layer*/, int /*n_layers*/, int budget) const { return budget; }

 private:
  PolicyInfo info_;
};

}  // namespace kvlapse
