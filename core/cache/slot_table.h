// SlotTable: which token sits in which slot, for one sequence and one layer, ragged per kv head. The only
// mutable occupancy in the program; K/V rows and per-slot state follow it. Owned by a CacheSite; not
// thread-safe.
//
// Between steps a head may have one vacated slot (the victim of a hole-filling policy); the next append takes
// it. While attention runs there is none: the slots [0, count) of a head all hold a token.
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "core/base/position.h"

namespace kvlapse {

class SlotTable {
 public:
  SlotTable(int n_kv_heads, int capacity);

  int n_kv_heads() const { return static_cast<int>(heads_.size()); }
  int capacity() const { return capacity_; }
  // Tokens held by a head, without the vacated slot.
  int count(int kv_head) const;
  int max_count() const;
  // [count] token position by slot, only valid while no slot of the head is vacant.
  std::span<const Pos> positions(int kv_head) const;
  std::optional<Slot> vacant(int kv_head) const { return heads_[kv_head].vacant; }
  // Slot that the next append will take in this head: the vacant one, otherwise the first free one.
  Slot next_slot(int kv_head) const;
  // Slot that the last append took; only valid until the head is compacted.
  Slot newest(int kv_head) const { return heads_[kv_head].newest; }

  // Places a token in every head. Throws Error when a head is full: the budget was not enforced.
  void append(Pos pos);
  // Makes one slot vacant, to be overwritten by the next append.
  void vacate(int kv_head, Slot slot);
  // Keeps exactly `order` (distinct occupied slots), renumbered 0.. in that order.
  void compact(int kv_head, std::span<const Slot> order);

 private:
  struct Head {
    std::vector<Pos> positions;
    std::optional<Slot> vacant;
    Slot newest{0};
  };
  int capacity_;
  std::vector<Head> heads_;
  std::vector<Pos> scratch_;
};

}  // namespace kvlapse
