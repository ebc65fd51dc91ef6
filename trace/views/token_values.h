// One number per token, for colouring a text. Pure functions.
#pragma once

#include <span>
#include <vector>

#include "trace/views/layer_life.h"

namespace kvlapse {

// Adds to holders[pos] how many of a layer's kv heads hold the position after `step`. evicted_at [H][n], as
// in LayerLife.
void count_holders(std::span<const int32_t> evicted_at, int n_kv_heads, int step, std::span<int32_t> holders);
// Steps from birth to eviction in one kv head; to the end of the recording for tokens that were never lost.
std::vector<float> token_lifetimes(const LayerLife& life, int kv_head);

}  // namespace kvlapse
