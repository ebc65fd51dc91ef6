// AheadDevice: a decoder on a device whose steps feed themselves: the tokens that a step chooses are the
// next step's, the slot of its victim takes the next token. So steps are queued before the results of those
// in front of them are known, and results come later, in order. One thread.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/base/position.h"

namespace kvlapse {

// What a step chose for a sequence.
struct AheadChoice {
  int32_t token = 0;
  float logprob = 0;   // of token, at temperature 1
  float margin = 0;    // its logit minus the best other
  uint32_t flags = 0;  // DecodeFlag bits of this step or an earlier one
};

class AheadDevice {
 public:
  virtual ~AheadDevice() = default;
  virtual std::string describe() const = 0;
  virtual int n_sequences() const = 0;
  // Victims of a layer: one, one a kv head, or 0 where every token is kept.
  virtual int victims_a_layer() const = 0;

  // What a kv head of a sequence holds in a layer when decode begins, slot by slot; the next token takes the
  // slot behind.
  struct Held {
    int sequence = 0, layer = 0, kv_head = 0;
    Pos next{0};                          // position of the next token
    std::span<const Pos> positions;       // [n]
    std::span<const float> keys, values;  // [n, D]
    std::span<const float> value_l1;      // [n]
    int first_free = 0;                   // positions below it are never victims
  };
  virtual void hold(const Held& held) = 0;
  // The first step's tokens and their positions, [B].
  virtual void begin(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions) = 0;

  // Queues one step; at most max_ahead() of them are not taken.
  virtual void queue() = 0;
  virtual int max_ahead() const = 0;
  // What the oldest step not yet taken left, once it is there. A victim is its score's bits << 32 | its slot,
  // all ones: none. Valid until the next queue().
  struct Step {
    std::span<const AheadChoice> choices;  // [B]
    std::span<const uint64_t> victims;     // [B, L, victims_a_layer()]
  };
  virtual Step take() = 0;
};

}  // namespace kvlapse
