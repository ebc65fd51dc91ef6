// What a policy may read about one layer of one sequence at one step. Implemented by whoever holds K and V
// (the live cache, or a trace under replay), so that a policy cannot tell the two apart. All values fp32, in
// slot order, n = SlotTable::count of the kv head. Spans stay valid until the next call on the same object.
#pragma once

#include <cstdint>
#include <span>

#include "core/base/position.h"
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

  // The newest min(w, tokens seen) queries, oldest first; the last row is the newest token's.
  virtual std::span<const float> window_queries(int w) = 0;  // [rows, Hq, D]
  // Their logits against the held keys; -inf where the key is newer than the query.
  virtual std::span<const float> window_logits(int q_head, int w) = 0;  // [rows, n]
};

}  // namespace kvlapse
