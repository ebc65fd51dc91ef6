// What the last queries say about the held tokens: the importance of SnapKV and its relatives. For the files
// of core/policy/policies.
#pragma once

#include <span>

#include "core/policy/scoring/reduce.h"

namespace kvlapse {

// The window's own tokens are protected and its queries are kept: what a policy with a window declares.
inline void adopt_window(PolicyInfo& info, double window) {
  info.rule.recent = std::max(info.rule.recent, window);
  info.query_window = static_cast<int>(window);
}

// Logits of the last `window` queries, one row of n per query, reduced over `heads` before any softmax
// (R-KV). Returns the number of rows.
int window_logits_of(HeadRange heads, GqaRule rule, LayerInputs& inputs, int window, int n,
                     std::vector<float>& rows);

// importance[i] = mean (or sum) over rows of softmax(row[0, width))[i], for i < importance.size() <= width <=
// n.
void vote(std::span<const float> rows, int n_rows, int n, int width, bool mean, std::span<float> importance);

// Pools of odd `kernel`, stride 1, over neighbouring slots. Max ignores what lies outside; the average counts
// it as zero (torch's padding).
void max_pool(std::span<const float> in, int kernel, std::span<float> out);
void average_pool(std::span<const float> in, int kernel, std::span<float> out);

}  // namespace kvlapse
