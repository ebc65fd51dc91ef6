// ReplayMemory: the LayerMemory of a replay. It stores nothing: a slot's rows are those of its token in
// SharedLayer, gathered in slot order when the policy asks. Weights are gathered for a few steps ahead, since
// a cache that fills holes changes one slot a step. One per configuration; not thread-safe.
#pragma once

#include <span>
#include <vector>

#include "core/engine/cache_site.h"
#include "replay/shared_layer.h"

namespace kvlapse {

// [H][T] step after which a token is no longer held: it takes part in the attention of that step and vanishes
// behind it. kHeld while it is held.
class Retention {
 public:
  static constexpr int32_t kHeld = INT32_MAX;
  Retention(int n_kv_heads, int n_tokens)
      : n_tokens_(n_tokens), last_(static_cast<size_t>(n_kv_heads) * n_tokens, kHeld) {}
  int32_t* last(int kv_head) { return last_.data() + static_cast<size_t>(kv_head) * n_tokens_; }
  const int32_t* last(int kv_head) const { return last_.data() + static_cast<size_t>(kv_head) * n_tokens_; }
  void apply(const EvictionPlan& plan, int n_kv_heads) {
    for (const Drop& drop : plan.drops) {
      const int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
      const int end = drop.kv_head == kWholeLayer ? n_kv_heads : drop.kv_head + 1;
      for (int h = first; h < end; ++h) last(h)[raw(drop.pos)] = raw(plan.step);
    }
  }

 private:
  int n_tokens_;
  std::vector<int32_t> last_;
};

class ReplayMemory final : public LayerMemory {
 public:
  ReplayMemory(const SharedLayer& shared, int capacity);

  void store(const SlotTable& table, Pos pos, const TokenRows&) override;
  void attend(const SlotTable& table, Pos pos) override;
  void apply(const EvictionPlan& plan) override;
  void turn_keys(int kv_head, std::span<const MovedKey> moved) override { moved_[kv_head] = moved; }
  // Keys that do not stand where they were recorded, as long as the site that said so lives.
  std::span<const MovedKey> moved(int kv_head) const { return moved_[kv_head]; }

  std::span<const float> logits(int q_head) override;
  std::span<const float> attention(int q_head) override;
  std::span<const float> output(int q_head) override;
  std::span<const float> value_l1(int kv_head) override;
  std::span<const float> keys(int kv_head) override;
  std::span<const float> values(int kv_head) override;
  std::span<const float> value_row(int kv_head, Slot slot, int head_dim) override {
    return {shared_.value(kv_head, index(kv_head)[raw(slot)]), static_cast<size_t>(head_dim)};
  }
  bool last_alike(int kv_head, float threshold, std::span<int32_t> out) override;
  std::span<const float> window_queries(int w) override;
  std::span<const float> window_logits(int q_head, int w) override;

 private:
  const int32_t* index(int kv_head) const {
    static_assert(sizeof(Pos) == sizeof(int32_t));
    return reinterpret_cast<const int32_t*>(table_->positions(kv_head).data());
  }
  size_t count(int kv_head) const { return static_cast<size_t>(table_->count(kv_head)); }

  // Exponentials by slot for the steps [begin, end) of one kv head.
  struct Ahead {
    int begin = 0, end = 0;
    int asked = -1;              // step of the last request
    std::vector<float> weights;  // [kAheadSteps][G][capacity]
  };
  static constexpr int kAheadSteps = 8;
  float* ahead_row(int q_head, int step);
  void gather_ahead(int kv_head);

  const SharedLayer& shared_;
  size_t capacity_;
  const SlotTable* table_ = nullptr;
  int step_ = 0;
  std::vector<float> logits_, keys_, values_, window_;
  std::vector<float> output_;                     // [Hq, D]
  std::vector<std::vector<float>> norms_;         // per kv head that was asked for: by slot
  std::vector<Ahead> ahead_;                      // [H]
  std::vector<std::span<const MovedKey>> moved_;  // [H]
  std::vector<char> has_attention_, has_output_;  // [Hq]
};

}  // namespace kvlapse
