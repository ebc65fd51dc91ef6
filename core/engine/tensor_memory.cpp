#include "core/engine/tensor_memory.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/vector_math.h"

namespace kvlapse {

TensorMemory::TensorMemory(const CacheGeometry& geometry, std::span<const float> q, std::span<const float> k,
                           std::span<const float> v)
    : geometry_(geometry),
      d_(geometry.head_dim),
      q_(q),
      k_(k),
      v_(v),
      value_l1_by_pos_(v.size() / geometry.head_dim),
      logits_(geometry.n_q_heads),
      attention_(geometry.n_q_heads),
      output_(geometry.n_q_heads),
      value_l1_(geometry.n_kv_heads),
      keys_(geometry.n_kv_heads),
      values_(geometry.n_kv_heads),
      window_(geometry.n_q_heads) {
  for (size_t i = 0; i < value_l1_by_pos_.size(); ++i) value_l1_by_pos_[i] = l1_norm(v.subspan(i * d_, d_));
}

const float* TensorMemory::q_row(int pos, int head) const {
  return q_.data() + (static_cast<size_t>(pos) * geometry_.n_q_heads + head) * d_;
}

const float* TensorMemory::kv_row(std::span<const float> plane, int pos, int head) const {
  return plane.data() + (static_cast<size_t>(pos) * geometry_.n_kv_heads + head) * d_;
}

RowView TensorMemory::held(std::span<const float> plane, int kv_head) const {
  const size_t stride = geometry_.n_kv_heads * d_;
  return {kv_row(plane, 0, kv_head), DType::f32, stride,
          reinterpret_cast<const int32_t*>(table_->positions(kv_head).data())};
}

TokenRows TensorMemory::rows(Pos pos) const {
  return {q_row(raw(pos), 0), kv_row(k_, raw(pos), 0), kv_row(v_, raw(pos), 0)};
}

void TensorMemory::attend(const SlotTable& table, Pos pos) {
  table_ = &table;
  step_ = raw(pos);
  ++attended_;
}

void TensorMemory::turn_keys(int kv_head, std::span<const MovedKey> moved) {
  if (moved.empty()) return;
  if (turned_keys_.empty()) {
    turned_keys_.assign(k_.begin(), k_.end());
    k_ = turned_keys_;
  }
  for (const MovedKey& key : moved)
    std::copy_n(
        key.turned.data(), d_,
        turned_keys_.data() + (static_cast<size_t>(raw(key.pos)) * geometry_.n_kv_heads + kv_head) * d_);
}

std::span<const float> TensorMemory::logits(int q_head) {
  Cached& cached = logits_[q_head];
  if (cached.renew(attended_)) {
    const int h = geometry_.kv_head_of(q_head);
    cached.values.resize(table_->positions(h).size());
    dot_rows(held(k_, h), cached.values.size(), d_, q_row(step_, q_head), 0, 1,
             attention_scale(geometry_.head_dim), cached.values.data(), 0);
  }
  return cached.values;
}

std::span<const float> TensorMemory::attention(int q_head) {
  Cached& cached = attention_[q_head];
  if (cached.renew(attended_)) {
    std::span<const float> from = logits(q_head);
    cached.values.resize(from.size());
    softmax(from, cached.values);
  }
  return cached.values;
}

std::span<const float> TensorMemory::output(int q_head) {
  Cached& cached = output_[q_head];
  if (cached.renew(attended_)) {
    std::span<const float> weights = attention(q_head);
    cached.values.resize(d_);
    attention_output(held(v_, geometry_.kv_head_of(q_head)), weights.size(), d_, weights.data(), 0, 1,
                     cached.values.data(), 0);
  }
  return cached.values;
}

std::span<const float> TensorMemory::value_l1(int kv_head) {
  Cached& cached = value_l1_[kv_head];
  if (cached.renew(attended_)) {
    std::span<const Pos> positions = table_->positions(kv_head);
    cached.values.resize(positions.size());
    for (size_t s = 0; s < positions.size(); ++s)
      cached.values[s] =
          value_l1_by_pos_[static_cast<size_t>(raw(positions[s])) * geometry_.n_kv_heads + kv_head];
  }
  return cached.values;
}

std::span<const float> TensorMemory::gather(Cached& cached, std::span<const float> plane, int kv_head) {
  if (cached.renew(attended_)) {
    std::span<const Pos> positions = table_->positions(kv_head);
    cached.values.resize(positions.size() * d_);
    for (size_t s = 0; s < positions.size(); ++s)
      std::copy_n(kv_row(plane, raw(positions[s]), kv_head), d_, cached.values.data() + s * d_);
  }
  return cached.values;
}

std::span<const float> TensorMemory::keys(int kv_head) {
  return gather(keys_[kv_head], k_, kv_head);
}
std::span<const float> TensorMemory::values(int kv_head) {
  return gather(values_[kv_head], v_, kv_head);
}

std::span<const float> TensorMemory::value_row(int kv_head, Slot slot, int) {
  return {kv_row(v_, raw(table_->positions(kv_head)[raw(slot)]), kv_head), d_};
}

std::span<const float> TensorMemory::window_queries(int w) {
  const int rows = std::min(w, step_ + 1);
  return {q_row(step_ + 1 - rows, 0), static_cast<size_t>(rows) * geometry_.n_q_heads * d_};
}

std::span<const float> TensorMemory::window_logits(int q_head, int w) {
  Cached& cached = window_[q_head];
  const int rows = std::min(w, step_ + 1);
  if (cached.renew(attended_, rows)) {
    const int h = geometry_.kv_head_of(q_head);
    std::span<const Pos> positions = table_->positions(h);
    const size_t n = positions.size();
    cached.values.resize(rows * n);
    dot_rows(held(k_, h), n, d_, q_row(step_ + 1 - rows, q_head), geometry_.n_q_heads * d_, rows,
             attention_scale(geometry_.head_dim), cached.values.data(), n);
    for (int r = 0; r < rows; ++r)
      for (size_t s = 0; s < n; ++s)
        if (raw(positions[s]) > step_ + 1 - rows + r)
          cached.values[r * n + s] = -std::numeric_limits<float>::infinity();
  }
  return cached.values;
}

}  // namespace kvlapse
