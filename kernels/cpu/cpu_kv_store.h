// CpuKvStore: K/V planes of one (sequence, layer) in host memory, [H][S][D] in the cache's dtype, and the
// fp32 numbers that attention leaves: logits and weights [Hq][S], outputs [Hq][D]. The backend's attention
// writes these; everything else reads. Owned by the session; one thread at a time, except that attention
// works on disjoint parts of it.
#pragma once

#include <vector>

#include "core/base/row_math.h"
#include "core/ops/backend.h"
#include "kernels/cpu/host_array.h"

namespace kvlapse {

class CpuKvStore final : public KvStore {
 public:
  CpuKvStore(const CacheGeometry& geometry, int query_window);

  const CacheGeometry& geometry() const override { return geometry_; }
  void store(const SlotTable& table, const float* q, const float* k, const float* v) override;
  void compact(int kv_head, std::span<const Slot> order) override;
  void replace_key(int kv_head, Slot slot, const float* row) override;
  std::span<const float> logits(int q_head, int n) override {
    return {logits_row(q_head), static_cast<size_t>(n)};
  }
  std::span<const float> attention(int q_head, int n) override {
    return {weights_row(q_head), static_cast<size_t>(n)};
  }
  std::span<const float> output(int q_head) override;
  std::span<const float> value_l1(int kv_head, int n) override;
  std::span<const float> keys(int kv_head, int n) override {
    return plane_rows(keys_, key_scratch_, kv_head, n);
  }
  std::span<const float> values(int kv_head, int n) override {
    return plane_rows(values_, value_scratch_, kv_head, n);
  }
  std::span<const float> value_row(int kv_head, Slot slot) override;
  std::span<const float> window_queries(int w) override;
  std::span<const float> window_logits(const SlotTable& table, int q_head, int w) override;

  // For the backend's attention.
  const float* query() const { return query_.data(); }  // [Hq][D] of the newest stored token
  float* logits_row(int q_head) { return logits_.data() + stride_ * q_head; }
  float* weights_row(int q_head) { return weights_.data() + stride_ * q_head; }
  float* output_row(int q_head) { return output_.data() + static_cast<size_t>(q_head) * geometry_.head_dim; }
  // Partial value sums of a chunk of slots, [G][D].
  float* partial(int kv_head, int chunk);
  size_t stride() const { return stride_; }
  // Rows from `first_slot` on.
  RowView key_rows(int kv_head, int first_slot = 0) const { return rows(keys_, kv_head, first_slot); }
  RowView value_rows(int kv_head, int first_slot = 0) const { return rows(values_, kv_head, first_slot); }

 private:
  RowView rows(const HostArray<std::byte>& plane, int kv_head, int first_slot) const;
  std::span<const float> plane_rows(const HostArray<std::byte>& plane, std::vector<float>& scratch,
                                    int kv_head, int n);
  int window_rows(int w) const;

  CacheGeometry geometry_;
  size_t stride_;  // floats from one q head's logits to the next
  HostArray<std::byte> keys_, values_;
  HostArray<float> logits_, weights_, partials_;
  std::vector<float> value_l1_;  // [H][S]
  std::vector<float> output_, query_;
  std::vector<float> ring_;  // [query_window][Hq][D], the token stored n-th in row n % query_window
  int query_window_;
  int64_t n_stored_ = 0;
  std::vector<float> key_scratch_, value_scratch_, window_scratch_, query_scratch_,
      row_scratch_;  // grown by the policies that read them
};

}  // namespace kvlapse
