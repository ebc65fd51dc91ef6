// CacheGeometry: the shape of a K/V cache, and the only place that turns (layer, head, slot) into an offset
// or a token count into bytes. Layout of each plane (K and V apart), per sequence: [L][H][S][D], D
// contiguous.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/base/dtype.h"
#include "core/base/position.h"

namespace kvlapse {

struct CacheGeometry {
  int n_layers = 0;
  int n_q_heads = 0;   // Hq
  int n_kv_heads = 0;  // H
  int head_dim = 0;    // D
  int n_slots = 0;     // S, capacity of one (layer, kv head)
  DType dtype = DType::f32;

  constexpr int group() const { return n_q_heads / n_kv_heads; }  // G: query heads per kv head
  constexpr int kv_head_of(int q_head) const { return q_head / group(); }

  constexpr size_t row_bytes() const { return static_cast<size_t>(head_dim) * dtype_bytes(dtype); }
  constexpr size_t layer_plane_bytes() const {
    return static_cast<size_t>(n_kv_heads) * n_slots * row_bytes();
  }
  // Byte offset of a row inside one layer's K (or V) plane.
  constexpr size_t row_offset_bytes(int kv_head, Slot slot) const {
    return (static_cast<size_t>(kv_head) * n_slots + static_cast<size_t>(raw(slot))) * row_bytes();
  }
  // K and V of one token in one layer and kv head, and in the whole model.
  constexpr size_t head_token_bytes() const { return 2 * row_bytes(); }
  constexpr size_t token_bytes() const { return head_token_bytes() * n_kv_heads * n_layers; }
  // Bytes that `tokens` take in the whole model: 32 layers x 8 heads x 128 x 2 x fp16 x 30,000 =
  // 3,932,160,000.
  constexpr uint64_t cache_bytes(uint64_t tokens) const { return tokens * token_bytes(); }
};

}  // namespace kvlapse
