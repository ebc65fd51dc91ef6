#include "core/engine/moved_keys.h"

#include <algorithm>
#include <cmath>

#include "core/base/dtype.h"

namespace kvlapse {

MovedKeys::MovedKeys(const CacheGeometry& geometry, double rope_theta)
    : dim_(static_cast<size_t>(geometry.head_dim)),
      dtype_(geometry.dtype),
      frequencies_(dim_ / 2),
      heads_(geometry.n_kv_heads),
      cos_(dim_ / 2, 1.0),
      sin_(dim_ / 2, 0.0) {
  for (size_t j = 0; j < frequencies_.size(); ++j)
    frequencies_[j] = std::pow(rope_theta, -2.0 * static_cast<double>(j) / static_cast<double>(dim_));
}

void MovedKeys::apply(const EvictionPlan& plan, const SlotTable& table, LayerInputs& inputs) {
  for (int h = 0; h < static_cast<int>(heads_.size()); ++h) {
    Head& head = heads_[static_cast<size_t>(h)];
    std::span<const float> keys;
    bool changed = false;
    for (const Drop& dropped : plan.drops) {
      if (dropped.kv_head != kWholeLayer && dropped.kv_head != h) continue;
      if (!changed) keys = inputs.keys(h);
      changed = true;
      drop(head, raw(dropped.pos), table.positions(h), keys);
    }
    if (changed)
      for (MovedKey& key : head.moved) turn(key);
    if (plan.reclaim == Reclaim::fill) continue;
    std::vector<Slot> now(static_cast<size_t>(table.count(h)));
    for (size_t i = 0; i < plan.keep[h].size(); ++i)
      now[static_cast<size_t>(raw(plan.keep[h][i]))] = Slot{static_cast<int32_t>(i)};
    for (MovedKey& key : head.moved) key.slot = now[static_cast<size_t>(raw(key.slot))];
  }
}

void MovedKeys::drop(Head& head, int pos, std::span<const Pos> positions, std::span<const float> keys) {
  std::erase_if(head.moved, [pos](const MovedKey& key) { return raw(key.pos) == pos; });
  // Held tokens between the last evicted one and this one move for the first time.
  if (pos > head.last_evicted) {
    const size_t known = head.moved.size();
    for (size_t s = 0; s < positions.size(); ++s) {
      if (raw(positions[s]) <= head.last_evicted || raw(positions[s]) >= pos) continue;
      const float* row = keys.data() + s * dim_;
      head.moved.push_back({positions[s], Slot{static_cast<int32_t>(s)}, 0, {row, row + dim_}, {}});
    }
    std::sort(head.moved.begin() + static_cast<ptrdiff_t>(known), head.moved.end(),
              [](const MovedKey& a, const MovedKey& b) { return raw(a.pos) < raw(b.pos); });
    head.last_evicted = pos;
  }
  for (MovedKey& key : head.moved)
    if (raw(key.pos) < pos) ++key.shift;
}

void MovedKeys::turn(MovedKey& key) {
  const size_t half = frequencies_.size();
  if (angles_of_ != key.shift) {
    angles_of_ = key.shift;
    for (size_t j = 0; j < half; ++j) {
      cos_[j] = std::cos(frequencies_[j] * key.shift);
      sin_[j] = std::sin(frequencies_[j] * key.shift);
    }
  }
  key.turned = key.own;
  for (size_t j = 0; j < half; ++j) {
    const double a = key.own[j], b = key.own[j + half];
    key.turned[j] = static_cast<float>(cos_[j] * a - sin_[j] * b);
    key.turned[j + half] = static_cast<float>(cos_[j] * b + sin_[j] * a);
  }
  if (dtype_ == DType::f16)
    for (float& x : key.turned) x = f16_to_f32(f32_to_f16(x));
  if (dtype_ == DType::bf16)
    for (float& x : key.turned) x = bf16_to_f32(f32_to_bf16(x));
}

}  // namespace kvlapse
