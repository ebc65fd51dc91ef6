// The sketch of one attention row: its largest weights and its entropy. Runs on the decoding thread at the sketch
// tier, so it reads the weights once and sorts only what can be among the largest. SIMD, chosen at run time.
#pragma once

#include <span>
#include <vector>

#include "core/base/position.h"
#include "trace/trace_types.h"

namespace kvlapse {

class Sketcher {
 public:
  // `weights`: one span [n] per query head of the group, softmax over the n held slots; `positions` [n].
  // Fills all of `out` but recall.
  void sketch(std::span<const std::span<const float>> weights, std::span<const Pos> positions, SketchRow& out);

 private:
  std::vector<float> mean_, block_max_, ranking_;
  std::vector<uint64_t> candidates_;
};

}  // namespace kvlapse
