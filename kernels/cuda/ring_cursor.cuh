// A place in a ring of stages: which stage, and the parity of its turn. Include device_ops.cuh (or the
// emulator) first.
#pragma once

#include <cstdint>

namespace kvlapse::device {

struct RingCursor {
  int stage = 0;
  uint32_t phase = 0;
  // By at most the whole ring.
  KVLAPSE_DEVICE void step(int n, int n_stages) {
    stage += n;
    if (stage >= n_stages) stage -= n_stages, phase ^= 1;
  }
  KVLAPSE_DEVICE void advance(int n, int n_stages) {
    stage += n;
    if (stage >= n_stages) {
      const int turns = stage / n_stages;
      stage -= turns * n_stages;
      phase ^= static_cast<uint32_t>(turns & 1);
    }
  }
};

}  // namespace kvlapse::device
