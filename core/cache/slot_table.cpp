#include "core/cache/slot_table.h"

#include <algorithm>
#include <cassert>

#include "core/base/error.h"

namespace kvlapse {

SlotTable::SlotTable(int n_kv_heads, int capacity) : capacity_(capacity), heads_(n_kv_heads) {
  for (Head& head : heads_) head.positions.reserve(capacity);
  scratch_.reserve(capacity);
}

int SlotTable::count(int kv_head) const {
  const Head& head = heads_[kv_head];
  return static_cast<int>(head.positions.size()) - (head.vacant ? 1 : 0);
}

int SlotTable::max_count() const {
  int most = 0;
  for (int h = 0; h < n_kv_heads(); ++h) most = std::max(most, count(h));
  return most;
}

std::span<const Pos> SlotTable::positions(int kv_head) const {
  assert(!heads_[kv_head].vacant);
  return heads_[kv_head].positions;
}

Slot SlotTable::next_slot(int kv_head) const {
  const Head& head = heads_[kv_head];
  return head.vacant ? *head.vacant : Slot{static_cast<int32_t>(head.positions.size())};
}

void SlotTable::append(Pos pos) {
  for (int h = 0; h < n_kv_heads(); ++h) {
    Head& head = heads_[h];
    head.newest = next_slot(h);
    if (head.vacant) {
      head.positions[raw(*head.vacant)] = pos;
      head.vacant.reset();
    } else {
      if (static_cast<int>(head.positions.size()) >= capacity_)
        fail("slot table: kv head {} holds {} tokens, no slot is left for position {}", h, capacity_,
             raw(pos));
      head.positions.push_back(pos);
    }
  }
}

void SlotTable::vacate(int kv_head, Slot slot) {
  Head& head = heads_[kv_head];
  assert(!head.vacant && raw(slot) >= 0 && raw(slot) < static_cast<int>(head.positions.size()));
  head.positions[raw(slot)] = kNoPos;
  head.vacant = slot;
}

void SlotTable::compact(int kv_head, std::span<const Slot> order) {
  Head& head = heads_[kv_head];
  scratch_.clear();
  for (Slot slot : order) {
    assert(head.positions[raw(slot)] != kNoPos);
    scratch_.push_back(head.positions[raw(slot)]);
    head.positions[raw(slot)] = kNoPos;  // catches a slot named twice
  }
  head.positions.assign(scratch_.begin(), scratch_.end());
  head.vacant.reset();
}

}  // namespace kvlapse
