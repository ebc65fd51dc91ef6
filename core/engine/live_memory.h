// LiveMemory: the LayerMemory of a live decode: a thin view of a backend's KvStore. Owned by the session; one
// thread at a time.
#pragma once

#include "core/engine/cache_site.h"
#include "core/ops/backend.h"

namespace kvlapse {

class LiveMemory final : public LayerMemory {
 public:
  LiveMemory(Backend& backend, const CacheGeometry& geometry, int query_window)
      : backend_(backend), store_(backend.make_kv_store(geometry, query_window)) {}

  KvStore& kv() { return *store_; }
  // Row of the step whose attention output attend() fills; -1: none.
  void set_row(int row) { row_ = row; }
  // The table that LayerInputs answers for, when the session attended for many sites at once.
  void attended(const SlotTable& table) { table_ = &table; }

  void store(const SlotTable& table, Pos, const TokenRows& rows) override {
    store_->store(table, rows.q, rows.k, rows.v);
  }
  void attend(const SlotTable& table, Pos) override {
    const AttendRow row{store_.get(), &table, row_};
    backend_.attend({&row, 1});
    table_ = &table;
  }
  void apply(const EvictionPlan& plan) override {
    if (plan.reclaim == Reclaim::fill) return;  // the next token overwrites the victim's row
    for (int h = 0; h < store_->geometry().n_kv_heads; ++h) store_->compact(h, plan.keep[h]);
  }
  void turn_keys(int kv_head, std::span<const MovedKey> moved) override {
    for (const MovedKey& key : moved) store_->replace_key(kv_head, key.slot, key.turned.data());
  }

  std::span<const float> logits(int q_head) override { return store_->logits(q_head, count_of(q_head)); }
  std::span<const float> attention(int q_head) override {
    return store_->attention(q_head, count_of(q_head));
  }
  std::span<const float> output(int q_head) override { return store_->output(q_head); }
  std::span<const float> value_l1(int kv_head) override {
    return store_->value_l1(kv_head, table_->count(kv_head));
  }
  std::span<const float> keys(int kv_head) override { return store_->keys(kv_head, table_->count(kv_head)); }
  std::span<const float> values(int kv_head) override {
    return store_->values(kv_head, table_->count(kv_head));
  }
  std::span<const float> value_row(int kv_head, Slot slot, int /*head_dim*/) override {
    return store_->value_row(kv_head, slot);
  }
  bool redundancy(int kv_head, float threshold, std::span<float> out) override {
    return store_->redundancy(*table_, kv_head, threshold, out);
  }
  std::span<const float> window_queries(int w) override { return store_->window_queries(w); }
  std::span<const float> window_logits(int q_head, int w) override {
    return store_->window_logits(*table_, q_head, w);
  }

  const Lowest* fused_lowest(int score_row) override { return store_->fused_lowest(score_row); }

 private:
  int count_of(int q_head) const { return table_->count(store_->geometry().kv_head_of(q_head)); }

  Backend& backend_;
  std::unique_ptr<KvStore> store_;
  const SlotTable* table_ = nullptr;
  int row_ = -1;
};

}  // namespace kvlapse
