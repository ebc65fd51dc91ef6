// Lives of the tokens of one (sequence, layer): when each kv head lost each position, why, and in which slot
// it sat. Built from the eviction records alone; plain data afterwards, to be shared between threads.
#pragma once

#include <limits>
#include <span>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

inline constexpr int32_t kHeldToEnd = std::numeric_limits<int32_t>::max();

struct LayerLife {
  int sequence = 0, layer = 0, n_kv_heads = 0;
  int n_prompt = 0, n_steps = 0;
  // [H][n_steps]: the token takes part in the attention of this step and is gone behind it; kHeldToEnd: never
  // lost.
  std::vector<int32_t> evicted_at;
  // [H][n_steps] index into `drops`, -1: none.
  std::vector<int32_t> drop_index;
  std::vector<TraceEviction> drops;  // in order of step

  std::span<const int32_t> evicted(int kv_head) const {
    return {evicted_at.data() + static_cast<size_t>(kv_head) * n_steps, static_cast<size_t>(n_steps)};
  }
  const TraceEviction* drop(int kv_head, int pos) const {
    const int32_t index = drop_index[static_cast<size_t>(kv_head) * n_steps + pos];
    return index < 0 ? nullptr : &drops[index];
  }
};
// Enters one record; records come in order of step.
void add_drop(LayerLife& life, const TraceEviction& drop);
LayerLife read_layer_life(const TraceReader& reader, int sequence, int layer);
// LayerLife::evicted_at alone, for views over many layers.
std::vector<int32_t> read_evicted_at(const TraceReader& reader, int sequence, int layer);

// A token's stay in one slot during steps [begin, end); a compaction ends a stay and begins another.
struct SlotStay {
  int32_t pos = 0, slot = 0, begin = 0, end = 0;
};
// Stays of one kv head. With Reclaim::compact_by_score the order of the survivors is not in the file: they
// are placed in order of position, and `exact_order` says so.
struct SlotHistory {
  std::vector<SlotStay> stays;
  int n_slots = 0;  // highest slot used, plus one
  bool exact_order = true;
};
SlotHistory slot_history(const LayerLife& life, int kv_head, Reclaim reclaim);

// Facts about a step range of one layer, for tables.
struct LifetimeSummary {
  int64_t evictions = 0;
  double mean_lifetime_steps = 0;  // age at eviction; 0 when nothing was evicted
  int median_lifetime_steps = 0;
};
LifetimeSummary summarize_lifetimes(const LayerLife& life, int kv_head, int step_begin, int step_end);

}  // namespace kvlapse
