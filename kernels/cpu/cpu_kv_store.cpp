#include "kernels/cpu/cpu_kv_store.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "core/base/vector_math.h"
#include "kernels/cpu/activations.h"

namespace kvlapse {

CpuKvStore::CpuKvStore(const CacheGeometry& geometry, int query_window)
    : geometry_(geometry),
      stride_((static_cast<size_t>(geometry.n_slots) + 15) / 16 * 16),
      keys_(geometry.layer_plane_bytes()),
      values_(geometry.layer_plane_bytes()),
      logits_(stride_ * geometry.n_q_heads),
      weights_(stride_ * geometry.n_q_heads),
      partials_((static_cast<size_t>(geometry.n_slots) + kValueChunk - 1) / kValueChunk * geometry.n_q_heads *
                geometry.head_dim),
      value_l1_(static_cast<size_t>(geometry.n_kv_heads) * geometry.n_slots),
      output_(static_cast<size_t>(geometry.n_q_heads) * geometry.head_dim),
      query_(output_.size()),
      ring_(static_cast<size_t>(query_window) * query_.size()),
      query_window_(query_window) {}

void CpuKvStore::store(const SlotTable& table, const float* q, const float* k, const float* v) {
  const auto dim = static_cast<size_t>(geometry_.head_dim);
  for (int h = 0; h < geometry_.n_kv_heads; ++h) {
    const Slot slot = table.next_slot(h);
    assert(raw(slot) < geometry_.n_slots);
    const size_t offset = geometry_.row_offset_bytes(h, slot);
    narrow(geometry_.dtype, k + h * dim, dim, keys_.data() + offset);
    narrow(geometry_.dtype, v + h * dim, dim, values_.data() + offset);
    value_l1_[static_cast<size_t>(h) * geometry_.n_slots + raw(slot)] = l1_norm({v + h * dim, dim});
  }
  std::copy_n(q, query_.size(), query_.begin());
  if (query_window_ > 0)
    std::copy_n(q, query_.size(), ring_.begin() + n_stored_ % query_window_ * query_.size());
  ++n_stored_;
}

void CpuKvStore::compact(int kv_head, std::span<const Slot> order) {
  const size_t row_bytes = geometry_.row_bytes();
  thread_local std::vector<std::byte> moved;
  moved.resize(order.size() * row_bytes);
  for (HostArray<std::byte>* plane : {&keys_, &values_}) {
    std::byte* rows = plane->data() + geometry_.row_offset_bytes(kv_head, Slot{0});
    for (size_t i = 0; i < order.size(); ++i)
      std::memcpy(moved.data() + i * row_bytes, rows + raw(order[i]) * row_bytes, row_bytes);
    std::memcpy(rows, moved.data(), moved.size());
  }
  float* l1 = value_l1_.data() + static_cast<size_t>(kv_head) * geometry_.n_slots;
  thread_local std::vector<float> moved_l1;
  moved_l1.resize(order.size());
  for (size_t i = 0; i < order.size(); ++i) moved_l1[i] = l1[raw(order[i])];
  std::copy(moved_l1.begin(), moved_l1.end(), l1);
}

void CpuKvStore::replace_key(int kv_head, Slot slot, const float* row) {
  narrow(geometry_.dtype, row, static_cast<size_t>(geometry_.head_dim),
         keys_.data() + geometry_.row_offset_bytes(kv_head, slot));
}

std::span<const float> CpuKvStore::output(int q_head) {
  return {output_row(q_head), static_cast<size_t>(geometry_.head_dim)};
}

std::span<const float> CpuKvStore::value_l1(int kv_head, int n) {
  return {value_l1_.data() + static_cast<size_t>(kv_head) * geometry_.n_slots, static_cast<size_t>(n)};
}

float* CpuKvStore::partial(int kv_head, int chunk) {
  const size_t head_floats = static_cast<size_t>(geometry_.group()) * geometry_.head_dim;
  return partials_.data() + (static_cast<size_t>(chunk) * geometry_.n_kv_heads + kv_head) * head_floats;
}

RowView CpuKvStore::rows(const HostArray<std::byte>& plane, int kv_head, int first_slot) const {
  return {plane.data() + geometry_.row_offset_bytes(kv_head, Slot{first_slot}), geometry_.dtype,
          static_cast<size_t>(geometry_.head_dim), nullptr};
}

std::span<const float> CpuKvStore::plane_rows(const HostArray<std::byte>& plane, std::vector<float>& scratch,
                                              int kv_head, int n) {
  const size_t count = static_cast<size_t>(n) * geometry_.head_dim;
  const std::byte* data = plane.data() + geometry_.row_offset_bytes(kv_head, Slot{0});
  if (geometry_.dtype == DType::f32) return {reinterpret_cast<const float*>(data), count};
  scratch.resize(std::max(scratch.size(), count));
  widen(geometry_.dtype, data, count, scratch.data());
  return {scratch.data(), count};
}

std::span<const float> CpuKvStore::value_row(int kv_head, Slot slot) {
  const auto dim = static_cast<size_t>(geometry_.head_dim);
  const std::byte* data = values_.data() + geometry_.row_offset_bytes(kv_head, slot);
  if (geometry_.dtype == DType::f32) return {reinterpret_cast<const float*>(data), dim};
  row_scratch_.resize(dim);
  widen(geometry_.dtype, data, dim, row_scratch_.data());
  return row_scratch_;
}

int CpuKvStore::window_rows(int w) const {
  assert(w <= query_window_);
  return static_cast<int>(std::min<int64_t>(w, n_stored_));
}

std::span<const float> CpuKvStore::window_queries(int w) {
  const int rows = window_rows(w);
  window_scratch_.resize(std::max(window_scratch_.size(), rows * query_.size()));
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (n_stored_ - rows + r) % query_window_;
    std::copy_n(ring_.begin() + at * query_.size(), query_.size(),
                window_scratch_.begin() + r * query_.size());
  }
  return {window_scratch_.data(), rows * query_.size()};
}

std::span<const float> CpuKvStore::window_logits(const SlotTable& table, int q_head, int w) {
  const int rows = window_rows(w), h = geometry_.kv_head_of(q_head);
  const auto dim = static_cast<size_t>(geometry_.head_dim), n = static_cast<size_t>(table.count(h));
  const std::span<const Pos> positions = table.positions(h);
  query_scratch_.resize(rows * dim);
  for (int r = 0; r < rows; ++r) {
    const int64_t at = (n_stored_ - rows + r) % query_window_;
    std::copy_n(ring_.begin() + at * query_.size() + q_head * dim, dim, query_scratch_.begin() + r * dim);
  }
  window_scratch_.resize(std::max(window_scratch_.size(), rows * n));
  dot_rows(key_rows(h), n, dim, query_scratch_.data(), dim, rows, attention_scale(geometry_.head_dim),
           window_scratch_.data(), n);
  // Tokens are stored in order of position, so the r-th query's position is known.
  for (int r = 0; r < rows; ++r)
    for (size_t s = 0; s < n; ++s)
      if (raw(positions[s]) > n_stored_ - rows + r)
        window_scratch_[r * n + s] = -std::numeric_limits<float>::infinity();
  return {window_scratch_.data(), rows * n};
}

}  // namespace kvlapse
