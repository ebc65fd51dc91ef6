#include "core/policy/evictor.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/policy/checked_inputs.h"

namespace kvlapse {
namespace {

constexpr double kNearTie = 1e-6;  // relative

float cast_score(float score, ScoreCast cast) {
  switch (cast) {
    case ScoreCast::fp32:
      return score;
    case ScoreCast::fp16:
      return f16_to_f32(f32_to_f16(score));
    case ScoreCast::bf16:
      return bf16_to_f32(f32_to_bf16(score));
  }
  return score;
}

bool is_protected(Pos pos, const LayerContext& at, const EvictionRule& rule, int recent) {
  int p = raw(pos);
  return p < rule.sinks || (rule.pin_prompt && p < at.n_prompt) || p > raw(at.step) - recent;
}

bool near_tie(float a, float b) {
  return std::abs(static_cast<double>(a) - b) <= kNearTie * std::max(std::abs(a), std::abs(b));
}

struct Candidate {
  float score;
  int row;
  Slot slot;
};

}  // namespace

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

std::optional<EvictionPlan> Evictor::decide(const Policy& policy, const LayerContext& at, LayerInputs& inputs,
                                            const SlotState& state, bool prompt_end) {
  const PolicyInfo& info = policy.info();
  if (!info.evicts) return std::nullopt;
  const EvictionRule rule = prompt_end ? policy.prompt_rule(at.budget) : info.rule;
  if (!prompt_end && (raw(at.step) + 1) % rule.cadence != 0) return std::nullopt;

  const int target = at.budget - rule.headroom;
  const int n_heads = at.geometry.n_kv_heads;
  // A compaction in score order also runs when it drops nothing: it renumbers slots, as its reference does.
  const bool reorders = rule.reclaim == Reclaim::compact_by_score && !prompt_end;
  const int most = at.table->max_count();
  if (reorders ? most < target : most <= target) return std::nullopt;

  const bool shared = rule.granularity == Granularity::layer;
  const int n_rows = shared ? 1 : n_heads;
  std::vector<int> counts(n_rows);
  for (int r = 0; r < n_rows; ++r) counts[r] = at.count(r);
  scores_.reset(n_rows, static_cast<int>(info.score_parts.size()), counts);

  LayerContext context = at;
  context.rule = rule;
  CheckedInputs checked(inputs, info);
  if (prompt_end)
    policy.score_prompt(context, checked, state, scores_);
  else
    policy.score(context, checked, state, scores_);

  EvictionPlan plan;
  plan.step = at.step;
  plan.reason = prompt_end ? EvictionReason::prompt_over_budget : EvictionReason::over_budget;
  plan.reclaim = rule.reclaim;
  plan.threshold.assign(n_rows, std::numeric_limits<float>::infinity());
  if (rule.reclaim != Reclaim::fill) plan.keep.resize(n_heads);

  const int recent = std::min(rule.recent_slots(at.budget), target);
  std::vector<std::vector<Candidate>> candidates(n_rows);
  for (int r = 0; r < n_rows; ++r) {
    std::span<const Pos> positions = at.positions(r);
    std::span<const float> row = scores_.row(r);
    for (int s = 0; s < counts[r]; ++s) {
      if (is_protected(positions[s], at, rule, recent)) continue;
      if (std::isnan(row[s]))
        fail("policy {}: score is NaN at step {}, layer {}, kv head {}, slot {} (position {})", info.name,
             raw(at.step), at.layer, r, s, raw(positions[s]));
      candidates[r].push_back({cast_score(row[s], rule.cast), r, Slot{s}});
    }
  }
  // Dropped first: the lowest score; among equals the lowest slot (torch.argmin's first minimum), or the
  // highest.
  auto dropped_first = [&](const Candidate& a, const Candidate& b) {
    if (a.score != b.score) return a.score < b.score;
    if (a.row != b.row) return rule.ties == TieOrder::first ? a.row < b.row : a.row > b.row;
    return rule.ties == TieOrder::first ? a.slot < b.slot : a.slot > b.slot;
  };

  std::vector<int> n_drops(n_rows);
  if (rule.ragged) {
    // One ranking over all heads of the layer; each keeps at least its floor. Order of removal decides who
    // stops.
    const int floor_slots = static_cast<int>(rule.ragged_floor * at.budget);
    std::vector<Candidate> all;
    int held = 0;
    for (int r = 0; r < n_rows; ++r) {
      held += counts[r];
      all.insert(all.end(), candidates[r].begin(), candidates[r].end());
    }
    std::sort(all.begin(), all.end(), dropped_first);
    int excess = held - target * n_rows;
    for (const Candidate& c : all) {
      if (excess <= 0) break;
      if (counts[c.row] - n_drops[c.row] <= floor_slots) continue;
      ++n_drops[c.row];
      --excess;
    }
  } else {
    for (int r = 0; r < n_rows; ++r) n_drops[r] = std::max(0, counts[r] - target);
  }

  for (int r = 0; r < n_rows; ++r) {
    std::vector<Candidate>& row = candidates[r];
    const int drops = n_drops[r];
    if (drops > static_cast<int>(row.size()))
      fail("policy {}: step {}, layer {}: must drop {} tokens, only {} of {} are unprotected", info.name,
           raw(at.step), at.layer, drops, row.size(), counts[r]);
    if (rule.reclaim == Reclaim::fill && drops == 1)
      std::iter_swap(row.begin(), std::min_element(row.begin(), row.end(), dropped_first));
    else
      std::sort(row.begin(), row.end(), dropped_first);

    float kept_low = std::numeric_limits<float>::infinity();
    for (size_t i = drops; i < row.size(); ++i) kept_low = std::min(kept_low, row[i].score);
    plan.threshold[r] = kept_low;
    for (int i = 0; i < drops; ++i) {
      const Candidate& c = row[i];
      Drop drop{
          shared ? kWholeLayer : r, c.slot, at.positions(r)[raw(c.slot)], scores_.row(r)[raw(c.slot)], {}};
      for (int p = 0; p < scores_.n_parts(); ++p) drop.parts[p] = scores_.part(p, r)[raw(c.slot)];
      plan.near_ties += near_tie(c.score, kept_low);
      plan.drops.push_back(drop);
    }

    if (rule.reclaim == Reclaim::fill) {
      if (drops > 1)
        fail("policy {}: step {}: hole filling drops one token a step, found {}", info.name, raw(at.step),
             drops);
      continue;
    }
    std::vector<char> gone(counts[r], 0);
    for (int i = 0; i < drops; ++i) gone[raw(row[i].slot)] = 1;
    order_.clear();
    if (rule.reclaim == Reclaim::compact_by_score) {
      // Descending score; equal scores keep slot order. The protected ones follow in slot order.
      auto kept_first = [](const Candidate& a, const Candidate& b) {
        return a.score != b.score ? a.score > b.score : a.slot < b.slot;
      };
      std::sort(row.begin() + drops, row.end(), kept_first);
      for (size_t i = drops; i < row.size(); ++i) {
        order_.push_back(row[i].slot);
        gone[raw(row[i].slot)] = 1;
      }
    }
    for (int s = 0; s < counts[r]; ++s)
      if (!gone[s]) order_.push_back(Slot{s});
    for (int h = shared ? 0 : r; h < (shared ? n_heads : r + 1); ++h) plan.keep[h] = order_;
  }

  std::sort(plan.drops.begin(), plan.drops.end(), [](const Drop& a, const Drop& b) {
    return a.kv_head != b.kv_head ? a.kv_head < b.kv_head : a.slot < b.slot;
  });
  return plan;
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
