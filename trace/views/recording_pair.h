// Two recordings of one prompt beside each other: the tokens they share, the first one that differs, and what
// each held on the way. Positions are comparable up to the divergence; behind it each goes its own way. Pure
// functions.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trace/views/layer_life.h"

namespace kvlapse {

struct TokenAlignment {
  int n_a = 0, n_b = 0;
  int n_common = 0;           // positions [0, n_common) hold the same tokens
  int first_divergence = -1;  // position; -1: one is the other's beginning, or both are equal
};
TokenAlignment align_tokens(std::span<const int32_t> a, std::span<const int32_t> b);

// Keep sets of one kv head after `step`, over the common positions.
struct KeepDifference {
  int both = 0, only_a = 0, only_b = 0, neither = 0;
  double jaccard() const {
    return both + only_a + only_b == 0 ? 1 : static_cast<double>(both) / (both + only_a + only_b);
  }
};
// evicted_at as in LayerLife::evicted.
KeepDifference compare_kept(std::span<const int32_t> a, std::span<const int32_t> b, int n_common, int step);

}  // namespace kvlapse
