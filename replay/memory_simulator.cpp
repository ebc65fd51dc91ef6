#include "replay/memory_simulator.h"

#include <algorithm>

#include "core/base/error.h"

namespace kvlapse {
namespace {

constexpr std::string_view kTableNames[] = {"layer", "head"};
constexpr std::string_view kModeNames[] = {"holes", "compact", "fill"};

int pages(int tokens, int block) {
  return (tokens + block - 1) / block;
}

}  // namespace

BlockTable parse_block_table(std::string_view name) {
  for (int i = 0; i < 2; ++i)
    if (kTableNames[i] == name) return static_cast<BlockTable>(i);
  fail_usage("--table: expected layer or head, found '{}'", name);
}

FreeMode parse_free_mode(std::string_view name) {
  for (int i = 0; i < 3; ++i)
    if (kModeNames[i] == name) return static_cast<FreeMode>(i);
  fail_usage("--mode: expected holes, compact or fill, found '{}'", name);
}

std::string_view block_table_name(BlockTable table) {
  return kTableNames[static_cast<int>(table)];
}
std::string_view free_mode_name(FreeMode mode) {
  return kModeNames[static_cast<int>(mode)];
}

FreeMode natural_mode(const Policy& policy) {
  return policy.info().rule.reclaim == Reclaim::fill ? FreeMode::fill : FreeMode::compact;
}

int64_t policy_state_bytes(const Policy& policy, const CacheGeometry& g, int capacity) {
  const PolicyInfo& info = policy.info();
  int64_t columns = int64_t{4} * info.state_columns * g.n_layers * g.n_kv_heads * capacity;
  int64_t ring = static_cast<int64_t>(info.query_window) * g.n_q_heads * static_cast<int64_t>(g.row_bytes()) *
                 g.n_layers;
  return columns + ring;
}

int64_t policy_workspace_bytes(const Policy& policy, const CacheGeometry& g, int slots) {
  const PolicyInfo& info = policy.info();
  if (!info.evicts) return 0;
  int64_t rows = info.rule.granularity == Granularity::layer ? 1 : g.n_kv_heads;
  int64_t per_slot = rows * (1 + static_cast<int64_t>(info.score_parts.size())) +
                     int64_t{g.n_kv_heads} * info.workspace_floats_per_slot;
  int64_t scores = 4 * per_slot * slots;
  // Rules that compare keys pairwise, as their reference does it: one similarity matrix per kv head.
  int64_t pairs = info.pairwise_similarity
                      ? static_cast<int64_t>(dtype_bytes(g.dtype)) * g.n_kv_heads * slots * slots
                      : 0;
  return scores + pairs;
}

MemorySimulator::MemorySimulator(const CacheGeometry& geometry, const Policy& policy, int budget,
                                 int capacity, MemoryOptions options)
    : geometry_(geometry),
      policy_(policy),
      budget_(budget),
      capacity_(capacity),
      options_(options),
      heads_(static_cast<size_t>(geometry.n_layers) * geometry.n_kv_heads),
      allocated_(heads_.size(), 0) {
  if (options.block_tokens < 1)
    fail_usage("--block: expected at least 1 token, found {}", options.block_tokens);
  summary_.state_bytes = policy_state_bytes(policy, geometry, capacity);
}

int MemorySimulator::page_of(Pos pos, int slot) const {
  return (options_.mode == FreeMode::holes ? raw(pos) : slot) / options_.block_tokens;
}

void MemorySimulator::append(Pos pos) {
  for (Head& h : heads_) {
    int slot = h.vacant;
    if (slot >= 0) {
      h.slots[slot] = pos;
      h.vacant = -1;
    } else {
      slot = static_cast<int>(h.slots.size());
      h.slots.push_back(pos);
    }
    size_t page = page_of(pos, slot);
    if (h.live.size() <= page) h.live.resize(page + 1, 0);
    ++h.live[page];
    summary_.peak_slots = std::max(summary_.peak_slots, count(h));
  }
  ++n_tokens_;
  decided_ = false;
}

void MemorySimulator::evict(int layer, const EvictionPlan& plan) {
  decided_ = true;
  int slots_before = 0;
  for (int k = 0; k < geometry_.n_kv_heads; ++k) slots_before = std::max(slots_before, count(head(layer, k)));
  int64_t workspace = policy_workspace_bytes(policy_, geometry_, slots_before);

  if (plan.reclaim == Reclaim::fill) {
    for (const Drop& drop : plan.drops) {
      int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
      int last = drop.kv_head == kWholeLayer ? geometry_.n_kv_heads - 1 : drop.kv_head;
      for (int k = first; k <= last; ++k) {
        Head& h = head(layer, k);
        --h.live[page_of(h.slots[raw(drop.slot)], raw(drop.slot))];
        h.slots[raw(drop.slot)] = kNoPos;
        h.vacant = raw(drop.slot);
      }
    }
  } else {
    int64_t rows_kept = 0;
    for (int k = 0; k < geometry_.n_kv_heads; ++k) {
      Head& h = head(layer, k);
      std::vector<Pos> kept;
      for (size_t i = 0; i < plan.keep[k].size(); ++i) {
        Pos pos = h.slots[raw(plan.keep[k][i])];
        kept.push_back(pos);
        // Rows that change their slot are copied; in place only where nothing moves.
        if (options_.mode == FreeMode::compact && raw(plan.keep[k][i]) != static_cast<int>(i)) ++rows_kept;
      }
      h.slots = std::move(kept);
      h.vacant = -1;
      std::fill(h.live.begin(), h.live.end(), 0);
      for (size_t i = 0; i < h.slots.size(); ++i) ++h.live[page_of(h.slots[i], static_cast<int>(i))];
    }
    if (options_.mode == FreeMode::compact) {
      int64_t moved = rows_kept * static_cast<int64_t>(geometry_.head_token_bytes());
      summary_.copied_bytes += 2 * moved;
      workspace += moved;  // gathered aside, then written back: one layer at a time
    }
  }
  summary_.workspace_bytes = std::max(summary_.workspace_bytes, workspace);
}

MemoryPoint MemorySimulator::measure() const {
  MemoryPoint point;
  const bool shared = options_.table == BlockTable::layer;
  const int n_heads = geometry_.n_kv_heads;
  const auto head_page = static_cast<int64_t>(geometry_.head_token_bytes()) * options_.block_tokens;
  for (int l = 0; l < geometry_.n_layers; ++l) {
    int layer_needed = 0, layer_count = 0;
    size_t layer_pages = 0;
    for (int k = 0; k < n_heads; ++k) {
      const Head& h = head(l, k);
      point.logical += static_cast<int64_t>(count(h)) * static_cast<int64_t>(geometry_.head_token_bytes());
      layer_count = std::max(layer_count, count(h));
      layer_pages = std::max(layer_pages, h.live.size());
      if (shared) continue;
      int needed = static_cast<int>(std::count_if(h.live.begin(), h.live.end(), [](int n) { return n > 0; }));
      int held = allocated_[static_cast<size_t>(l) * n_heads + k];
      point.held += held * head_page;
      point.reclaimable += (held - needed) * head_page;
      point.compacted += pages(count(h), options_.block_tokens) * head_page;
    }
    if (!shared) continue;
    for (size_t p = 0; p < layer_pages; ++p) {
      bool live = false;
      for (int k = 0; k < n_heads && !live; ++k) live = p < head(l, k).live.size() && head(l, k).live[p] > 0;
      layer_needed += live;
    }
    int held = allocated_[static_cast<size_t>(l) * n_heads];
    point.held += held * head_page * n_heads;
    point.reclaimable += (held - layer_needed) * head_page * n_heads;
    point.compacted += pages(layer_count, options_.block_tokens) * head_page * n_heads;
  }
  point.with_state = point.held + summary_.state_bytes + (decided_ ? summary_.workspace_bytes : 0);
  return point;
}

MemoryPoint MemorySimulator::finish_step() {
  // Pages are counted as allocated for good; `reclaimable` says what could have been returned.
  const bool shared = options_.table == BlockTable::layer;
  for (int l = 0; l < geometry_.n_layers; ++l) {
    int layer_high = 0;
    for (int k = 0; k < geometry_.n_kv_heads; ++k) {
      const Head& h = head(l, k);
      int high = static_cast<int>(h.live.size());  // never shrinks: compaction leaves empty pages behind
      layer_high = std::max(layer_high, high);
      if (!shared) allocated_[static_cast<size_t>(l) * geometry_.n_kv_heads + k] = high;
    }
    if (shared) allocated_[static_cast<size_t>(l) * geometry_.n_kv_heads] = layer_high;
  }
  MemoryPoint point = measure();
  MemoryPoint& peak = summary_.peak;
  peak.logical = std::max(peak.logical, point.logical);
  peak.held = std::max(peak.held, point.held);
  peak.reclaimable = std::max(peak.reclaimable, point.reclaimable);
  peak.compacted = std::max(peak.compacted, point.compacted);
  peak.with_state = std::max(peak.with_state, point.with_state);
  ++steps_;
  summary_.mean_logical +=
      (static_cast<double>(point.logical) - summary_.mean_logical) / static_cast<double>(steps_);
  summary_.mean_held += (static_cast<double>(point.held) - summary_.mean_held) / static_cast<double>(steps_);
  summary_.last = point;
  return point;
}

MemorySummary MemorySimulator::summary() const {
  MemorySummary s = summary_;
  s.full_bytes = static_cast<int64_t>(geometry_.cache_bytes(n_tokens_));
  if (s.full_bytes > 0) {
    s.saved_peak_ratio = 1 - static_cast<double>(s.peak.held) / static_cast<double>(s.full_bytes);
    s.saved_nominal_ratio =
        policy_.info().evicts ? 1 - static_cast<double>(budget_) / static_cast<double>(n_tokens_) : 0;
  }
  return s;
}

std::vector<int> MemorySimulator::block_map(int layer, int kv_head) const {
  return head(layer, kv_head).live;
}

}  // namespace kvlapse
