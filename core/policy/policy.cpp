#include "core/policy/policy.h"

#include <algorithm>
#include <cassert>

namespace kvlapse {

SlotState::SlotState(int columns, int n_kv_heads, int capacity)
    : columns_(columns),
      n_kv_heads_(n_kv_heads),
      capacity_(capacity),
      values_(static_cast<size_t>(columns) * n_kv_heads * capacity, 0.0f),
      scratch_(columns > 0 ? capacity : 0) {}

std::span<float> SlotState::column(int column, int kv_head) {
  assert(column < columns_ && kv_head < n_kv_heads_);
  return {values_.data() + (static_cast<size_t>(column) * n_kv_heads_ + kv_head) * capacity_,
          static_cast<size_t>(capacity_)};
}

std::span<const float> SlotState::column(int column, int kv_head) const {
  return const_cast<SlotState*>(this)->column(column, kv_head);
}

void SlotState::clear(int kv_head, Slot slot) {
  for (int c = 0; c < columns_; ++c) column(c, kv_head)[raw(slot)] = 0.0f;
}

void SlotState::compact(int kv_head, std::span<const Slot> order) {
  for (int c = 0; c < columns_; ++c) {
    std::span<float> values = column(c, kv_head);
    for (size_t i = 0; i < order.size(); ++i) scratch_[i] = values[raw(order[i])];
    std::copy_n(scratch_.begin(), order.size(), values.begin());
  }
}

void Scores::reset(int n_rows, int n_parts, std::span<const int> counts) {
  offsets_.assign(1, 0);
  for (int r = 0; r < n_rows; ++r) offsets_.push_back(offsets_.back() + counts[r]);
  values_.assign(offsets_.back(), 0.0f);
  parts_.resize(n_parts);
  for (auto& part : parts_) part.assign(offsets_.back(), 0.0f);
}

double Policy::parameter(std::string_view name) const {
  for (const ParameterInfo& p : info_.parameters)
    if (p.name == name) return p.value;
  assert(false && "policy asks for a parameter that it does not declare");
  return 0;
}

FusedScore fused_score(const PolicyInfo& info) {
  const EvictionRule& rule = info.rule;
  const bool fits = rule.cadence == 1 && rule.reclaim == Reclaim::fill && !rule.ragged &&
                    rule.cast == ScoreCast::fp32 && rule.ties == TieOrder::first && info.score_parts.empty();
  return info.evicts && fits ? info.fused : FusedScore::none;
}

EvictionRule Policy::prompt_rule(int /*budget*/) const {
  EvictionRule rule = info_.rule;
  if (rule.reclaim == Reclaim::fill) rule.reclaim = Reclaim::compact;
  return rule;
}

}  // namespace kvlapse
