#include "core/policy/evictor.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/policy/checked_inputs.h"
#include "core/policy/lowest.h"

namespace kvlapse {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNearTie = 1e-6;  // relative

bool near_tie(float a, float b) {
  return std::abs(static_cast<double>(a) - b) <= kNearTie * std::max(std::abs(a), std::abs(b));
}

bool by_head_and_slot(const Drop& a, const Drop& b) {
  return a.kv_head != b.kv_head ? a.kv_head < b.kv_head : a.slot < b.slot;
}

int target_slots(const LayerContext& at, const EvictionRule& rule) {
  return at.budget - rule.headroom;
}

}  // namespace

Protection::Protection(const LayerContext& at, const EvictionRule& rule)
    : first_free(std::max(rule.sinks, rule.pin_prompt ? at.n_prompt : 0)),
      last_free(raw(at.step) - std::min(rule.recent_slots(at.budget), target_slots(at, rule))) {}

void check_budget(const Policy& policy, int budget, int n_prompt) {
  const PolicyInfo& info = policy.info();
  if (!info.evicts) return;
  const EvictionRule& rule = info.rule;
  int target = budget - rule.headroom;
  int recent = rule.recent_slots(budget);
  int pinned = std::max(rule.sinks, rule.pin_prompt ? n_prompt : 0);
  if (target < 1 || pinned + recent > target)
    fail(
        "policy {}: budget {} cannot hold its protected set: expected at least {} slots ({} {}, {} recent, "
        "{} for the "
        "next token)",
        info.name, budget, std::max(1, pinned + recent) + rule.headroom, pinned,
        rule.pin_prompt ? "pinned prompt" : "sinks", recent, rule.headroom);
}

float Evictor::ranked(float score, const EvictionRule& rule, Pos pos) const {
  if (perturb_) {
    const uint64_t draw = mix64(static_cast<uint64_t>(raw(pos))) % 3;
    if (draw != 1) score = std::nextafter(score, draw == 0 ? -kInfinity : kInfinity);
  }
  switch (rule.cast) {
    case ScoreCast::fp32: return score;
    case ScoreCast::fp16: return f16_to_f32(f32_to_f16(score));
    case ScoreCast::bf16: return bf16_to_f32(f32_to_bf16(score));
  }
  return score;
}

void Evictor::fail_nan(const LayerContext& at, int row, int slot) const {
  fail("policy {}: score is NaN at step {}, layer {}, kv head {}, slot {} (position {})", policy_,
       raw(at.step), at.layer, row, slot, raw(at.positions(row)[slot]));
}

const EvictionPlan* Evictor::decide(const Policy& policy, const LayerContext& at, LayerInputs& inputs,
                                    const SlotState& state, bool prompt_end) {
  const PolicyInfo& info = policy.info();
  if (!info.evicts) return nullptr;
  if (!prompt_end && (raw(at.step) + 1) % info.rule.cadence != 0) return nullptr;
  const EvictionRule rule = prompt_end ? policy.prompt_rule(at.budget) : info.rule;

  const int target = target_slots(at, rule);
  const int n_heads = at.geometry.n_kv_heads;
  const bool shared = rule.granularity == Granularity::layer && !rule.ragged;
  const int n_rows = shared ? 1 : n_heads;
  counts_.resize(n_rows);
  int most = 0, held = 0;
  for (int r = 0; r < n_rows; ++r) {
    counts_[r] = at.count(r);
    most = std::max(most, counts_[r]);
    held += counts_[r];
  }
  // A compaction in score order also runs when it drops nothing: it renumbers slots, as its reference does.
  const bool reorders = rule.reclaim == Reclaim::compact_by_score && !prompt_end;
  const int trigger = prompt_end ? target : target + rule.slack;
  if (rule.ragged ? held <= trigger * n_rows : reorders && rule.slack == 0 ? most < target : most <= trigger)
    return nullptr;

  policy_ = info.name;
  const bool fused = !prompt_end && rule.reclaim == Reclaim::fill && inputs.fused_lowest(0) != nullptr;
  scores_.reset(n_rows, static_cast<int>(info.score_parts.size()), counts_);
  LayerContext context = at;
  context.rule = rule;
  CheckedInputs checked(inputs, info);
  if (prompt_end)
    policy.score_prompt(context, checked, state, scores_);
  else if (!fused)
    policy.score(context, checked, state, scores_);

  plan_.step = at.step;
  plan_.reason = prompt_end ? EvictionReason::prompt_over_budget : EvictionReason::over_budget;
  plan_.reclaim = rule.reclaim;
  plan_.near_ties = 0;
  plan_.drops.clear();
  plan_.threshold.assign(n_rows, kInfinity);
  if (rule.reclaim == Reclaim::fill) {
    plan_.keep.clear();
    for (int r = 0; r < n_rows; ++r) {
      if (counts_[r] <= target) continue;
      const int kv_head = shared ? kWholeLayer : r;
      if (!fused) {
        choose_lowest(context, rule, r, kv_head);
      } else {
        const Lowest& lowest = *inputs.fused_lowest(r);
        if (lowest.has_nan) fail_nan(context, r, std::max(lowest.slot, 0));
        take_lowest(context, r, kv_head, lowest, lowest.score);
      }
    }
  } else {
    plan_.keep.resize(n_heads);
    choose_many(context, rule);
  }
  if (counts_sensitivity_) measure_sensitivity(context, rule);
  validate_plan(plan_, context, rule);
  return &plan_;
}

const std::vector<std::vector<Slot>>& Evictor::select(const Policy& policy, const LayerContext& at,
                                                      LayerInputs& inputs, const SlotState& state) {
  const PolicyInfo& info = policy.info();
  const int n_heads = at.geometry.n_kv_heads;
  const bool shared = info.rule.granularity == Granularity::layer;
  const int n_rows = shared ? 1 : n_heads;
  counts_.resize(n_rows);
  for (int r = 0; r < n_rows; ++r) counts_[r] = at.count(r);
  policy_ = info.name;
  scores_.reset(n_rows, static_cast<int>(info.score_parts.size()), counts_);
  CheckedInputs checked(inputs, info);
  policy.score(at, checked, state, scores_);
  collect(at, info.rule);
  selected_.resize(n_heads);
  for (int r = 0; r < n_rows; ++r) {
    std::span<Candidate> row(candidates_.data() + row_begin_[r], row_begin_[r + 1] - row_begin_[r]);
    const int drops = std::clamp(counts_[r] - at.budget, 0, static_cast<int>(row.size()));
    arrange(row, drops, info.rule);
    gone_.assign(counts_[r], 0);
    for (int i = 0; i < drops; ++i) gone_[raw(row[i].slot)] = 1;
    std::vector<Slot>& slots = selected_[r];
    slots.clear();
    for (int s = 0; s < counts_[r]; ++s)
      if (!gone_[s]) slots.push_back(Slot{s});
  }
  for (int h = n_rows; h < n_heads; ++h) selected_[h] = selected_[0];
  return selected_;
}

// Hole filling: one victim a row.
void Evictor::choose_lowest(const LayerContext& at, const EvictionRule& rule, int row, int kv_head) {
  std::span<const Pos> positions = at.positions(row);
  std::span<const float> scores = scores_.row(row);
  if (rule.cast != ScoreCast::fp32) {
    cast_.resize(scores.size());
    for (size_t s = 0; s < scores.size(); ++s) cast_[s] = ranked(scores[s], rule, positions[s]);
    scores = cast_;
  }
  const Protection protection(at, rule);
  const Lowest lowest = find_lowest(scores, positions, protection.first_free, protection.last_free,
                                    rule.ties == TieOrder::last);
  if (lowest.has_nan)
    for (size_t s = 0; s < scores.size(); ++s)
      if (std::isnan(scores[s]) && !protection.holds(positions[s])) fail_nan(at, row, static_cast<int>(s));
  take_lowest(at, row, kv_head, lowest, lowest.slot < 0 ? 0 : scores_.row(row)[lowest.slot]);
}

// `score`: the victim's, before any cast.
void Evictor::take_lowest(const LayerContext& at, int row, int kv_head, const Lowest& lowest, float score) {
  if (lowest.slot < 0)
    fail("policy {}: step {}, layer {}: all {} held tokens are protected", policy_, raw(at.step), at.layer,
         counts_[row]);
  Drop drop{kv_head, Slot{lowest.slot}, at.positions(row)[lowest.slot], score, {}};
  for (int p = 0; p < scores_.n_parts(); ++p) drop.parts[p] = scores_.part(p, row)[lowest.slot];
  plan_.threshold[row] = lowest.next;
  plan_.near_ties += near_tie(lowest.score, lowest.next);
  plan_.drops.push_back(drop);
}

// All unprotected slots, row by row, in slot order.
void Evictor::collect(const LayerContext& at, const EvictionRule& rule) {
  const int n_rows = scores_.n_rows();
  const Protection protection(at, rule);
  candidates_.clear();
  row_begin_.assign(1, 0);
  for (int r = 0; r < n_rows; ++r) {
    std::span<const Pos> positions = at.positions(r);
    std::span<const float> row = scores_.row(r);
    for (int s = 0; s < counts_[r]; ++s) {
      if (protection.holds(positions[s])) continue;
      if (std::isnan(row[s])) fail_nan(at, r, s);
      candidates_.push_back({ranked(row[s], rule, positions[s]), r, Slot{s}});
    }
    row_begin_.push_back(static_cast<int>(candidates_.size()));
  }
}

// How many tokens each row drops.
void Evictor::split_drops(const LayerContext& at, const EvictionRule& rule) {
  const int n_rows = scores_.n_rows(), target = target_slots(at, rule);
  drops_.assign(n_rows, 0);
  if (!rule.ragged) {
    for (int r = 0; r < n_rows; ++r) drops_[r] = std::max(0, counts_[r] - target);
    return;
  }
  // One ranking over all heads of the layer; each keeps at least its floor. Order of removal decides who
  // stops.
  const int floor_slots = static_cast<int>(rule.ragged_floor * at.budget);
  all_ = candidates_;
  const bool last = rule.ties == TieOrder::last;
  std::sort(all_.begin(), all_.end(), [last](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score < b.score;
    if (a.row != b.row) return last ? a.row > b.row : a.row < b.row;
    return last ? a.slot > b.slot : a.slot < b.slot;
  });
  int excess = -target * n_rows;
  for (int r = 0; r < n_rows; ++r) excess += counts_[r];
  for (const Candidate& c : all_) {
    if (excess <= 0) break;
    if (counts_[c.row] - drops_[c.row] <= floor_slots) continue;
    ++drops_[c.row];
    --excess;
  }
  if (excess > 0)
    fail("policy {}: step {}, layer {}: {} tokens above the budget are protected or below a head's floor",
         policy_, raw(at.step), at.layer, excess);
}

// Dropped candidates first, then the survivors; in descending score when the cache will be ordered so.
void Evictor::arrange(std::span<Candidate> row, int drops, const EvictionRule& rule) {
  const int n = static_cast<int>(row.size()), keep = n - drops;
  const bool by_score = rule.reclaim == Reclaim::compact_by_score;
  if (rule.ties == TieOrder::torch) {
    queue_.clear();
    for (int i = 0; i < n; ++i) queue_.emplace_back(row[i].score, i);
    auto higher = [](const auto& a, const auto& b) { return a.first > b.first; };
    if (keep > 0 && keep * 64 <= n) {
      std::partial_sort(queue_.begin(), queue_.begin() + keep, queue_.end(), higher);
    } else if (keep > 0) {
      std::nth_element(queue_.begin(), queue_.begin() + keep - 1, queue_.end(), higher);
      std::sort(queue_.begin(), queue_.begin() + keep - 1, higher);
    }
    all_.assign(row.begin(), row.end());
    for (int i = 0; i < n; ++i) row[i < keep ? drops + i : i - keep] = all_[queue_[i].second];
    return;
  }
  const bool last = rule.ties == TieOrder::last;
  auto dropped_first = [last](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score < b.score;
    return last ? a.slot > b.slot : a.slot < b.slot;
  };
  if (drops > 0 && drops < n) std::nth_element(row.begin(), row.begin() + drops, row.end(), dropped_first);
  if (by_score)  // equal scores keep slot order
    std::sort(row.begin() + drops, row.end(), [](const Candidate& a, const Candidate& b) {
      return a.score != b.score ? a.score > b.score : a.slot < b.slot;
    });
}

void Evictor::choose_many(const LayerContext& at, const EvictionRule& rule) {
  const int n_rows = scores_.n_rows(), n_heads = at.geometry.n_kv_heads;
  const bool shared = rule.granularity == Granularity::layer && !rule.ragged;
  collect(at, rule);
  split_drops(at, rule);
  for (int r = 0; r < n_rows; ++r) {
    std::span<Candidate> row(candidates_.data() + row_begin_[r], row_begin_[r + 1] - row_begin_[r]);
    const int drops = drops_[r];
    if (drops > static_cast<int>(row.size()))
      fail("policy {}: step {}, layer {}: must drop {} tokens, only {} of {} are unprotected", policy_,
           raw(at.step), at.layer, drops, row.size(), counts_[r]);
    arrange(row, drops, rule);

    float kept_low = kInfinity;
    for (size_t i = drops; i < row.size(); ++i) kept_low = std::min(kept_low, row[i].score);
    plan_.threshold[r] = kept_low;
    gone_.assign(counts_[r], 0);
    for (int i = 0; i < drops; ++i) {
      const int slot = raw(row[i].slot);
      Drop drop{shared ? kWholeLayer : r, row[i].slot, at.positions(r)[slot], scores_.row(r)[slot], {}};
      for (int p = 0; p < scores_.n_parts(); ++p) drop.parts[p] = scores_.part(p, r)[slot];
      plan_.near_ties += near_tie(row[i].score, kept_low);
      plan_.drops.push_back(drop);
      gone_[slot] = 1;
    }
    order_.clear();
    if (rule.reclaim == Reclaim::compact_by_score) {
      for (size_t i = drops; i < row.size(); ++i) {
        order_.push_back(row[i].slot);
        gone_[raw(row[i].slot)] = 1;
      }
    }
    // The rest in slot order; behind a score order these are the protected ones.
    for (int s = 0; s < counts_[r]; ++s)
      if (!gone_[s]) order_.push_back(Slot{s});
    for (int h = shared ? 0 : r; h < (shared ? n_heads : r + 1); ++h) plan_.keep[h] = order_;
  }
  std::sort(plan_.drops.begin(), plan_.drops.end(), by_head_and_slot);
}

void Evictor::measure_sensitivity(const LayerContext& at, const EvictionRule& rule) {
  sensitivity_.victims += static_cast<int64_t>(plan_.drops.size());
  auto changed = [&](const EvictionRule& other, bool perturb) {
    perturb_ = perturb;
    collect(at, other);
    split_drops(at, other);
    int64_t count = 0;
    for (int r = 0; r < scores_.n_rows(); ++r) {
      std::span<Candidate> row(candidates_.data() + row_begin_[r], row_begin_[r + 1] - row_begin_[r]);
      arrange(row, drops_[r], other);
      for (int i = 0; i < drops_[r]; ++i) {
        Drop key{};
        key.kv_head = scores_.shared() ? plan_.drops.front().kv_head : r;
        key.slot = row[i].slot;
        count += !std::binary_search(plan_.drops.begin(), plan_.drops.end(), key, by_head_and_slot);
      }
    }
    perturb_ = false;
    return count;
  };
  EvictionRule other = rule;
  other.cast = ScoreCast::fp16;
  sensitivity_.fp16 += changed(other, false);
  sensitivity_.ulp += changed(rule, true);
  other = rule;
  other.ties = rule.ties == TieOrder::last ? TieOrder::first : TieOrder::last;
  sensitivity_.ties += changed(other, false);
}

void validate_plan(const EvictionPlan& plan, const LayerContext& at, const EvictionRule& rule) {
  const int n_heads = at.geometry.n_kv_heads, target = target_slots(at, rule);
  const Protection protection(at, rule);
  auto reject = [&](const Drop& drop, std::string_view why) {
    fail("eviction plan: step {}, layer {}, kv head {}, slot {} (position {}): {}", raw(at.step), at.layer,
         drop.kv_head, raw(drop.slot), raw(drop.pos), why);
  };
  for (size_t i = 0; i < plan.drops.size(); ++i) {
    const Drop& drop = plan.drops[i];
    if (drop.kv_head < kWholeLayer || drop.kv_head >= n_heads) reject(drop, "expected a head of this layer");
    const int head = std::max(drop.kv_head, 0);
    if (raw(drop.slot) < 0 || raw(drop.slot) >= at.count(head)) reject(drop, "expected an occupied slot");
    for (int h = head; h < (drop.kv_head == kWholeLayer ? n_heads : head + 1); ++h)
      if (at.positions(h)[raw(drop.slot)] != drop.pos)
        reject(drop, "expected the position that the slot holds");
    if (protection.holds(drop.pos)) reject(drop, "expected an unprotected token");
    if (i > 0 && !by_head_and_slot(plan.drops[i - 1], drop))
      reject(drop, "expected drops sorted and distinct");
    if (i > 0 && (plan.drops[i - 1].kv_head == kWholeLayer) != (drop.kv_head == kWholeLayer))
      reject(drop, "expected victims of the layer or of heads, not both");
    if (plan.reclaim == Reclaim::fill && i > 0 && plan.drops[i - 1].kv_head == drop.kv_head)
      reject(drop, "expected one victim a head when holes are filled");
  }
  if (plan.reclaim == Reclaim::fill) return;

  if (static_cast<int>(plan.keep.size()) != n_heads)
    fail("eviction plan: step {}, layer {}: expected survivors of {} heads, found {}", raw(at.step), at.layer,
         n_heads, plan.keep.size());
  std::vector<char> seen;
  int held = 0;
  for (int h = 0; h < n_heads; ++h) {
    seen.assign(at.count(h), 0);
    auto mark = [&](Slot slot) {
      if (raw(slot) < 0 || raw(slot) >= at.count(h) || seen[raw(slot)])
        fail("eviction plan: step {}, layer {}, kv head {}: slot {} is not held or named twice", raw(at.step),
             at.layer, h, raw(slot));
      seen[raw(slot)] = 1;
    };
    for (const Drop& drop : plan.drops)
      if (drop.kv_head == kWholeLayer || drop.kv_head == h) mark(drop.slot);
    for (Slot slot : plan.keep[h]) mark(slot);
    if (std::find(seen.begin(), seen.end(), 0) != seen.end())
      fail("eviction plan: step {}, layer {}, kv head {}: a slot is neither dropped nor kept", raw(at.step),
           at.layer, h);
    held += static_cast<int>(plan.keep[h].size());
    if (!rule.ragged && static_cast<int>(plan.keep[h].size()) > target)
      fail("eviction plan: step {}, layer {}, kv head {}: expected at most {} survivors, found {}",
           raw(at.step), at.layer, h, target, plan.keep[h].size());
  }
  if (rule.ragged && held > target * n_heads)
    fail("eviction plan: step {}, layer {}: expected at most {} survivors over all heads, found {}",
         raw(at.step), at.layer, target * n_heads, held);
}

void apply_plan(const EvictionPlan& plan, SlotTable& table, SlotState& state) {
  if (plan.reclaim == Reclaim::fill) {
    for (const Drop& drop : plan.drops) {
      int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
      int last = drop.kv_head == kWholeLayer ? table.n_kv_heads() - 1 : drop.kv_head;
      for (int h = first; h <= last; ++h) table.vacate(h, drop.slot);
    }
    return;
  }
  for (int h = 0; h < table.n_kv_heads(); ++h) {
    table.compact(h, plan.keep[h]);
    state.compact(h, plan.keep[h]);
  }
}

}  // namespace kvlapse
