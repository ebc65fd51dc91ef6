// How several heads vote for one score row: the query heads of a kv head, or, when the layer shares its
// victims, all heads of the layer. For the files of core/policy/policies. Sums run over heads in ascending
// order.
#pragma once

#include <algorithm>
#include <limits>
#include <span>

#include "core/policy/policy.h"

namespace kvlapse {

struct HeadRange {
  int begin = 0, end = 0;
  int size() const { return end - begin; }
};

inline HeadRange q_heads_of(const LayerContext& at, const Scores& out, int row) {
  const CacheGeometry& g = at.geometry;
  if (out.shared()) return {0, g.n_q_heads};
  return {row * g.group(), (row + 1) * g.group()};
}

inline HeadRange kv_heads_of(const LayerContext& at, const Scores& out, int row) {
  if (out.shared()) return {0, at.geometry.n_kv_heads};
  return {row, row + 1};
}

// out = mean, max or sum over the heads of values(head), each as long as `out`.
template <typename Values>
void reduce_heads(HeadRange heads, GqaRule rule, std::span<float> out, Values&& values) {
  std::fill(out.begin(), out.end(), rule == GqaRule::max ? -std::numeric_limits<float>::infinity() : 0.0f);
  for (int head = heads.begin; head < heads.end; ++head) {
    std::span<const float> from = values(head);
    if (rule == GqaRule::max)
      for (size_t i = 0; i < out.size(); ++i) out[i] = std::max(out[i], from[i]);
    else
      for (size_t i = 0; i < out.size(); ++i) out[i] += from[i];
  }
  if (rule == GqaRule::mean && heads.size() > 1) {
    const float scale = 1.0f / static_cast<float>(heads.size());
    for (float& v : out) v *= scale;
  }
}

// The state column of the row's kv heads, reduced to the row.
inline void reduce_state(const LayerContext& at, const SlotState& state, int column, Scores& out, int row) {
  reduce_heads(kv_heads_of(at, out, row), at.rule.gqa, out.row(row),
               [&](int h) { return state.column(column, h).first(out.row(row).size()); });
}

}  // namespace kvlapse
