#include "trace/views/layer_life.h"

#include <algorithm>
#include <numeric>

namespace kvlapse {
namespace {

constexpr int kBlockSteps = 64 * kChunkSteps;  // records in memory at once

}  // namespace

void add_drop(LayerLife& life, const TraceEviction& drop) {
  if (drop.pos < 0 || drop.pos >= life.n_steps) return;
  const int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
  const int last = drop.kv_head == kWholeLayer ? life.n_kv_heads : drop.kv_head + 1;
  for (int head = first; head < last && head < life.n_kv_heads; ++head) {
    const size_t cell = static_cast<size_t>(head) * life.n_steps + drop.pos;
    life.evicted_at[cell] = drop.step;
    life.drop_index[cell] = static_cast<int32_t>(life.drops.size());
  }
  life.drops.push_back(drop);
}

LayerLife read_layer_life(const TraceReader& reader, int sequence, int layer) {
  LayerLife life;
  life.sequence = sequence, life.layer = layer;
  life.n_kv_heads = reader.header().geometry.n_kv_heads;
  life.n_steps = reader.n_steps(sequence);
  life.n_prompt = reader.sequence(sequence).n_prompt;
  const size_t cells = static_cast<size_t>(life.n_kv_heads) * life.n_steps;
  life.evicted_at.assign(cells, kHeldToEnd);
  life.drop_index.assign(cells, -1);
  for (const TraceEviction& drop : reader.evictions(sequence, layer, 0, life.n_steps)) add_drop(life, drop);
  return life;
}

std::vector<int32_t> read_evicted_at(const TraceReader& reader, int sequence, int layer) {
  const int n_heads = reader.header().geometry.n_kv_heads, n = reader.n_steps(sequence);
  std::vector<int32_t> evicted_at(static_cast<size_t>(n_heads) * n, kHeldToEnd);
  for (int begin = 0; begin < n; begin += kBlockSteps) {
    for (const TraceEviction& drop :
         reader.evictions(sequence, layer, begin, std::min(begin + kBlockSteps, n))) {
      if (drop.pos < 0 || drop.pos >= n) continue;
      const int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
      const int last = drop.kv_head == kWholeLayer ? n_heads : std::min(drop.kv_head + 1, n_heads);
      for (int head = first; head < last; ++head)
        evicted_at[static_cast<size_t>(head) * n + drop.pos] = drop.step;
    }
  }
  return evicted_at;
}

SlotHistory slot_history(const LayerLife& life, int kv_head, Reclaim reclaim) {
  SlotHistory history;
  history.exact_order = reclaim != Reclaim::compact_by_score;
  struct Held {
    int32_t pos, begin;
  };
  std::vector<Held> slots;  // by slot; pos -1: vacant
  std::vector<int32_t> vacant;
  const auto end_stay = [&](int32_t slot, int32_t end) {
    history.stays.push_back({slots[slot].pos, slot, slots[slot].begin, end});
  };
  size_t next = 0;
  for (int32_t step = 0; step < life.n_steps; ++step) {
    int32_t slot;
    if (vacant.empty()) {
      slot = static_cast<int32_t>(slots.size());
      slots.push_back({step, step});
    } else {
      slot = vacant.back();
      vacant.pop_back();
      slots[slot] = {step, step};
    }
    history.n_slots = std::max(history.n_slots, slot + 1);
    bool lost = false;
    for (; next < life.drops.size() && life.drops[next].step <= step; ++next) {
      const TraceEviction& drop = life.drops[next];
      if (drop.kv_head != kWholeLayer && drop.kv_head != kv_head) continue;
      // Slots of the file are exact; with an unknown order the token is looked up instead.
      int32_t at = drop.slot;
      if (at < 0 || at >= static_cast<int32_t>(slots.size()) || slots[at].pos != drop.pos) {
        const auto found =
            std::find_if(slots.begin(), slots.end(), [&](const Held& held) { return held.pos == drop.pos; });
        if (found == slots.end()) continue;
        at = static_cast<int32_t>(found - slots.begin());
      }
      end_stay(at, step + 1);
      slots[at].pos = -1;
      vacant.push_back(at);
      lost = true;
    }
    const bool compacts = lost && (reclaim != Reclaim::fill || vacant.size() > 1);
    if (compacts) {
      int32_t to = 0;
      for (int32_t from = 0; from < static_cast<int32_t>(slots.size()); ++from) {
        if (slots[from].pos < 0) continue;
        if (to != from) {
          end_stay(from, step + 1);
          slots[to] = {slots[from].pos, step + 1};
        }
        ++to;
      }
      slots.resize(to);
      vacant.clear();
    }
  }
  for (int32_t slot = 0; slot < static_cast<int32_t>(slots.size()); ++slot) {
    if (slots[slot].pos >= 0) end_stay(slot, life.n_steps);
  }
  std::erase_if(history.stays, [](const SlotStay& stay) { return stay.begin >= stay.end; });
  return history;
}

LifetimeSummary summarize_lifetimes(const LayerLife& life, int kv_head, int step_begin, int step_end) {
  LifetimeSummary summary;
  std::vector<int32_t> ages;
  const auto evicted = life.evicted(kv_head);
  for (int pos = 0; pos < life.n_steps; ++pos) {
    if (evicted[pos] >= step_begin && evicted[pos] < step_end) ages.push_back(evicted[pos] - pos);
  }
  summary.evictions = static_cast<int64_t>(ages.size());
  if (ages.empty()) return summary;
  summary.mean_lifetime_steps =
      std::accumulate(ages.begin(), ages.end(), 0.0) / static_cast<double>(ages.size());
  std::nth_element(ages.begin(), ages.begin() + static_cast<std::ptrdiff_t>(ages.size() / 2), ages.end());
  summary.median_lifetime_steps = ages[ages.size() / 2];
  return summary;
}

}  // namespace kvlapse
