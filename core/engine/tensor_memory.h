// TensorMemory: a LayerMemory over q, k, v of a whole sequence held in memory by position (a golden file, a
// layer of a trace). Nothing is moved: rows are read by position through the slot table. The attention
// arithmetic is that of core/base/row_math.h, so it agrees with a live cache bit for bit. One thread at a
// time.
#pragma once

#include <vector>

#include "core/base/row_math.h"
#include "core/engine/cache_site.h"

namespace kvlapse {

class TensorMemory final : public LayerMemory {
 public:
  // q [T, Hq, D], k and v [T, H, D], fp32; they outlive the object. `geometry` gives Hq, H and D.
  TensorMemory(const CacheGeometry& geometry, std::span<const float> q, std::span<const float> k,
               std::span<const float> v);

  TokenRows rows(Pos pos) const;

  void store(const SlotTable&, Pos, const TokenRows&) override {}
  void attend(const SlotTable& table, Pos pos) override;
  void apply(const EvictionPlan&) override {}
  void turn_keys(int kv_head, std::span<const MovedKey> moved) override;

  std::span<const float> logits(int q_head) override;
  std::span<const float> attention(int q_head) override;
  std::span<const float> output(int q_head) override;
  std::span<const float> value_l1(int kv_head) override;
  std::span<const float> keys(int kv_head) override;
  std::span<const float> values(int kv_head) override;
  std::span<const float> value_row(int kv_head, Slot slot, int head_dim) override;
  std::span<const float> window_queries(int w) override;
  std::span<const float> window_logits(int q_head, int w) override;

 private:
  // What was computed for the newest token; stamped with the count of attend() calls.
  struct Cached {
    std::vector<float> values;
    int stamp = 0, window = 0;
    bool renew(int now, int w = 0) {
      if (stamp == now && window == w) return false;
      stamp = now;
      window = w;
      return true;
    }
  };
  const float* q_row(int pos, int head) const;
  const float* kv_row(std::span<const float> plane, int pos, int head) const;
  // The rows of a kv head's held tokens in slot order.
  RowView held(std::span<const float> plane, int kv_head) const;
  std::span<const float> gather(Cached& cached, std::span<const float> plane, int kv_head);

  CacheGeometry geometry_;
  size_t d_;
  std::span<const float> q_, k_, v_;
  std::vector<float> value_l1_by_pos_;  // [T, H]
  std::vector<float> turned_keys_;      // what k_ views once a key has moved
  const SlotTable* table_ = nullptr;
  int step_ = -1;
  int attended_ = 0;
  std::vector<Cached> logits_, attention_, output_, value_l1_, keys_, values_, window_;
};

}  // namespace kvlapse
