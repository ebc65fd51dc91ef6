// GpuKvStore: K/V of one (sequence, layer) in device memory, one allocation, with what attention leaves
// there; host views are downloaded when asked for. Owned by the session; the backend that made it must
// outlive it. One thread.
#pragma once

#include <vector>

#include "core/ops/backend.h"
#include "kernels/gpu/device_api.h"

namespace kvlapse {

class GpuBackend;

class GpuKvStore final : public KvStore {
 public:
  GpuKvStore(GpuBackend& backend, DeviceApi& api, const CacheGeometry& geometry, int query_window);

  const CacheGeometry& geometry() const override { return geometry_; }
  void store(const SlotTable& table, const float* q, const float* k, const float* v) override;
  void compact(int kv_head, std::span<const Slot> order) override;
  void replace_key(int kv_head, Slot slot, const float* row) override;
  std::span<const float> logits(int q_head, int n) override;
  std::span<const float> attention(int q_head, int n) override;
  std::span<const float> output(int q_head) override;
  std::span<const float> value_l1(int kv_head, int n) override;
  std::span<const float> keys(int kv_head, int n) override {
    return plane_rows(view_.k, keys_, kv_head, 0, n);
  }
  std::span<const float> values(int kv_head, int n) override {
    return plane_rows(view_.v, values_, kv_head, 0, n);
  }
  std::span<const float> value_row(int kv_head, Slot slot) override {
    return plane_rows(view_.v, value_row_, kv_head, raw(slot), 1);
  }
  std::span<const float> window_queries(int w) override;
  std::span<const float> window_logits(const SlotTable& table, int q_head, int w) override;
  bool redundancy(const SlotTable& table, int kv_head, float threshold, std::span<float> out) override;
  const Lowest* fused_lowest(int score_row) override {
    return lowest_.empty() ? nullptr : &lowest_[static_cast<size_t>(score_row)];
  }

  // For the backend.
  const exact::SiteView& view() const { return view_; }
  int query_window() const { return query_window_; }
  int64_t n_stored() const { return n_stored_; }
  // What attention left is about to change; the victims that the device chose with it, if any.
  void attended(std::vector<Lowest> lowest = {});
  // Stored rows of this store that the backend has seen in the batch at hand.
  int in_batch = 0;

 private:
  struct Mirror {
    std::vector<float> values;
    bool fresh = false;
  };
  std::span<const float> mirror(Mirror& mirror, const float* device, size_t n);
  std::span<const float> plane_rows(const void* plane, std::vector<float>& out, int kv_head, int first,
                                    int n);
  std::span<const float> ring_rows(int w);
  exact::Heads heads() const {
    return {geometry_.n_q_heads, geometry_.n_kv_heads, geometry_.head_dim, geometry_.dtype};
  }
  // K, or how many of its rows count, is about to change.
  void keys_change() { window_block_.fresh = redundancy_.fresh = false; }

  GpuBackend& backend_;
  DeviceApi& api_;
  CacheGeometry geometry_;
  int query_window_;
  DeviceArray<std::byte> memory_;
  exact::SiteView view_;
  int64_t n_stored_ = 0;
  Mirror logits_, weights_, output_, value_l1_;
  Mirror window_block_;  // [window_rows_, Hq, stride] logits of the window's queries
  Mirror redundancy_;    // [4, H, redundancy_most_] what SimilarKeyArgs leaves, and each key's own product
  int window_rows_ = 0, redundancy_most_ = 0;
  float redundancy_threshold_ = 0;
  std::vector<float> keys_, values_, value_row_, window_, ring_;
  std::vector<std::byte> raw_;
  std::vector<Lowest> lowest_;
};

}  // namespace kvlapse
