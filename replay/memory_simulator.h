// What an eviction really gives back: the K/V pages that one generation holds, step by step, under a block
// table. Fed with the slot tables and plans of a run (live or replayed); all numbers are modelled from them,
// in bytes of the whole model. One thread at a time.
//
// The three ways in which engines deal with a dropped token:
//   holes    rows stay where they were appended; a page returns only when its last token is gone
//   compact  survivors move down after every eviction (R-KV); costs copies and a gather buffer
//   fill     the next token overwrites the victim's row (LongFlow); pages never grow past the budget
// and the two kinds of block table: per kv head, or one for the layer, whose pages hold a slot of all its
// heads, so that a page is free only when no head needs it (union over heads).
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "core/cache/slot_table.h"
#include "core/policy/plan.h"

namespace kvlapse {

enum class BlockTable : uint8_t { layer, kv_head };
enum class FreeMode : uint8_t { holes, compact, fill };

struct MemoryOptions {
  int block_tokens = 16;
  BlockTable table = BlockTable::layer;
  FreeMode mode = FreeMode::holes;
};

// Throw UsageError for an unknown name.
BlockTable parse_block_table(std::string_view name);
FreeMode parse_free_mode(std::string_view name);
std::string_view block_table_name(BlockTable table);
std::string_view free_mode_name(FreeMode mode);

// The mode that a policy's reference implementation uses.
FreeMode natural_mode(const Policy& policy);

// Bytes at one step, whole model.
struct MemoryPoint {
  int64_t logical = 0;      // K and V of the tokens held
  int64_t held = 0;         // pages that were ever allocated: what stays taken when nothing is returned
  int64_t reclaimable = 0;  // of these, pages without a live token: an engine may return them now
  int64_t compacted = 0;    // pages that the held tokens would need if moved together
  int64_t with_state = 0;   // held, plus the policy's state and workspace at this step
};

struct MemorySummary {
  MemoryPoint peak;  // each field's own maximum
  MemoryPoint last;
  double mean_logical = 0, mean_held = 0;  // over steps
  int64_t full_bytes = 0;                  // K and V of all tokens, no eviction, no pages
  int64_t copied_bytes = 0;                // K/V rows moved by compaction, read + written
  int64_t state_bytes = 0;                 // per-slot columns and query ring, for the whole run
  int64_t workspace_bytes = 0;     // largest temporary of one decision (scores, similarity, gather buffer)
  int peak_slots = 0;              // most tokens that one head held while attention ran
  double saved_peak_ratio = 0;     // 1 - peak held / full
  double saved_nominal_ratio = 0;  // 1 - budget / tokens: what papers print
};

// Bytes that a policy keeps beside K and V: state columns and query ring. And its largest temporary when it
// decides over `slots` tokens: scores, and for a rule with pairwise similarity its slots x slots matrix.
int64_t policy_state_bytes(const Policy& policy, const CacheGeometry& geometry, int capacity);
int64_t policy_workspace_bytes(const Policy& policy, const CacheGeometry& geometry, int slots);

class MemorySimulator {
 public:
  // capacity: most slots a head can hold (CacheSite::capacity).
  MemorySimulator(const CacheGeometry& geometry, const Policy& policy, int budget, int capacity,
                  MemoryOptions options);

  // A token was appended in every layer and kv head; attention runs now.
  void append(Pos pos);
  // The layer's eviction after that attention. Plans arrive before the next append, layers in any order.
  void evict(int layer, const EvictionPlan& plan);
  // The step is over: takes the point, returns it.
  MemoryPoint finish_step();

  MemorySummary summary() const;
  // Pages of one layer and head (head 0 for a layer table) at the current step: live tokens in each, for a
  // block map.
  std::vector<int> block_map(int layer, int kv_head) const;

 private:
  struct Head {
    std::vector<Pos> slots;  // as SlotTable, mirrored here so that plans suffice
    int vacant = -1;
    std::vector<int> live;  // [page] live tokens, by position page (holes) or slot page
  };
  Head& head(int layer, int kv_head) {
    return heads_[static_cast<size_t>(layer) * geometry_.n_kv_heads + kv_head];
  }
  const Head& head(int layer, int kv_head) const {
    return heads_[static_cast<size_t>(layer) * geometry_.n_kv_heads + kv_head];
  }
  int count(const Head& h) const { return static_cast<int>(h.slots.size()) - (h.vacant >= 0 ? 1 : 0); }
  int page_of(Pos pos, int slot) const;
  MemoryPoint measure() const;

  CacheGeometry geometry_;
  const Policy& policy_;
  int budget_, capacity_;
  MemoryOptions options_;
  std::vector<Head> heads_;
  std::vector<int>
      allocated_;  // [layer][head] pages allocated so far (high water), head 0 only for layer tables
  int64_t n_tokens_ = 0, steps_ = 0;
  bool decided_ = false;  // some layer evicted in this step
  MemorySummary summary_;
};

}  // namespace kvlapse
