// What a policy may read about one layer of one sequence at one step. Implemented by whoever holds K and V
// (the live cache, or a trace under replay), so that a policy cannot tell the two apart. All values fp32, in
// slot order, n = SlotTable::count of the kv head. Spans stay valid until the next call on the same object.
#pragma once

#include <cstdint>
#include <span>

#include "core/base/position.h"
#include "core/base/victim.h"
#include "core/cache/geometry.h"
#include "core/cache/slot_table.h"

namespace kvlapse {

// Inputs that a policy declares; reading another one throws.
enum class Signal : uint32_t {
  logits = 1u << 0,        // q.k / sqrt(D) of the newest query
  attention = 1u << 1,     // softmax of these
  output = 1u << 2,        // attention output of the newest query
  value_l1 = 1u << 3,      // sum over D of |v|, per slot
  keys = 1u << 4,          // K rows
  values = 1u << 5,        // V rows
  query_window = 1u << 6,  // the last w queries and their logits
  rope = 1u << 7,          // LayerContext::rope_theta, to undo the rotation of queries or keys
  future = 1u << 8,        // LayerContext::future: only a replay of a finished trace has it
};

using SignalSet = uint32_t;
constexpr SignalSet operator|(Signal a, Signal b) {
  return static_cast<SignalSet>(a) | static_cast<SignalSet>(b);
}
constexpr SignalSet operator|(SignalSet a, Signal b) {
  return a | static_cast<SignalSet>(b);
}
constexpr bool contains(SignalSet set, Signal signal) {
  return (set & static_cast<SignalSet>(signal)) != 0;
}

class LayerInputs {
 public:
  virtual ~LayerInputs() = default;

  virtual std::span<const float> logits(int q_head) = 0;     // [n]
  virtual std::span<const float> attention(int q_head) = 0;  // [n]
  virtual std::span<const float> output(int q_head) = 0;     // [D]
  virtual std::span<const float> value_l1(int kv_head) = 0;  // [n]
  virtual std::span<const float> keys(int kv_head) = 0;      // [n, D]
  virtual std::span<const float> values(int kv_head) = 0;    // [n, D]
  // One V row [D]; cheaper than values() where V is not kept as fp32. Declared as Signal::values.
  virtual std::span<const float> value_row(int kv_head, Slot slot, int head_dim) {
    return values(kv_head).subspan(static_cast<size_t>(raw(slot)) * head_dim, head_dim);
  }

  // The newest min(w, tokens seen) queries, oldest first; the last row is the newest token's.
  virtual std::span<const float> window_queries(int w) = 0;  // [rows, Hq, D]
  // Their logits against the held keys; -inf where the key is newer than the query.
  virtual std::span<const float> window_logits(int q_head, int w) = 0;  // [rows, n]

  // For each slot the last other one whose key has a cosine above `threshold` with its own, -1: none. False:
  // whoever holds K has not compared them, and the caller does. Declared as Signal::keys.
  virtual bool last_alike(int /*kv_head*/, float /*threshold*/, std::span<int32_t> /*out*/) { return false; }
  // forgiving_redundancy (core/policy/scoring/redundancy.h) of a head's keys, where whoever holds K computes
  // it there, with the same bits; false: not here. Declared as Signal::keys.
  virtual bool redundancy(int /*kv_head*/, float /*threshold*/, std::span<float> /*out*/) { return false; }

  // The lowest scores of a decision's row, where whoever holds K and V has found them itself by the policy's
  // FusedScore; null: the policy's own scores decide.
  virtual const Lowest* fused_lowest(int /*score_row*/) { return nullptr; }
};

// What an oracle may read: full-cache attention of the steps (step, step + horizon] of a finished trace, mean
// over the query heads of a kv head, for the tokens at `positions`. Implemented by replay; horizon 0 means to
// the end.
class FutureInputs {
 public:
  virtual ~FutureInputs() = default;
  // Sum of the attention weights.
  virtual void mass(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
                    std::span<float> out) = 0;
  // Largest mean weight over blocks of `block` steps.
  virtual void peak(int kv_head, Pos step, int horizon, int block, std::span<const Pos> positions,
                    std::span<float> out) = 0;
  // Steps until the weight next exceeds `threshold`; +inf when it does not.
  virtual void next_use(int kv_head, Pos step, int horizon, float threshold, std::span<const Pos> positions,
                        std::span<float> out) = 0;
  // Sum of the exact leave-one-out output error, a / (1 - a) * |o - v|.
  virtual void error(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
                     std::span<float> out) = 0;
};

}  // namespace kvlapse
