// The sketch of one attention row: its largest weights and its entropy. Runs on the decoding thread at the
// sketch tier, so it sorts nothing (the reader does) and looks only at what can be among the largest. SIMD,
// chosen at run time.
#pragma once

#include <span>
#include <vector>

#include "core/base/position.h"
#include "trace/trace_types.h"

namespace kvlapse {

class Sketcher {
 public:
  // `weights`, `logits`: one span [n] per query head of the group, weights = softmax(logits) over the n held
  // slots; `positions` [n]. Fills all of `out` but recall; the weights in no order.
  void sketch(std::span<const std::span<const float>> weights, std::span<const std::span<const float>> logits,
              std::span<const Pos> positions, SketchRow& out);

 private:
  std::vector<float> mean_, block_max_, dots_;
  std::vector<float> weights_;  // of the candidates
  std::vector<int32_t> slots_;
};

}  // namespace kvlapse
