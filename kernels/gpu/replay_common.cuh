// What the kernels of a replay on a device have in common (replay_kernels.cuh says how they are written).
#pragma once

#include <cmath>

#include "core/base/rng.h"
#include "kernels/gpu/exponential.cuh"
#include "kernels/gpu/replay_args.h"

namespace kvlapse::gpu_replay {

using device::block_sync;
using device::Float4;
using device::shuffle_from;
using device::shuffle_xor;
using device::SmemAddress;
using device::thread_index;
using device::warp_ballot;
using device::warp_largest;

KVLAPSE_DEVICE float infinity() {
  return __builtin_huge_valf();
}
KVLAPSE_DEVICE int least(int a, int b) {
  return a < b ? a : b;
}
KVLAPSE_DEVICE int most(int a, int b) {
  return a > b ? a : b;
}
// Unsigned numbers in the order of the floats (of one zero).
KVLAPSE_DEVICE uint32_t ordered(float v) {
  const uint32_t bits = device::float_bits(v);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
KVLAPSE_DEVICE float unordered(uint32_t key) {
  return device::bits_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// Of a row with that largest logit.
KVLAPSE_DEVICE float row_base(float highest) {
  return device::softmax_base(highest) + static_cast<float>(kHeadBits) - kRowHeadBits;
}

template <int kLanes>
struct Weights {
  float v[kLanes];
  KVLAPSE_DEVICE static Weights load(const float* from) {
    Weights w;
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i) {
      const Float4 x = *reinterpret_cast<const Float4*>(from + 4 * i);
      w.v[4 * i] = x.x, w.v[4 * i + 1] = x.y, w.v[4 * i + 2] = x.z, w.v[4 * i + 3] = x.w;
    }
    return w;
  }
  KVLAPSE_DEVICE void store(float* to) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i)
      *reinterpret_cast<Float4*>(to + 4 * i) = Float4{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
  }
};

}  // namespace kvlapse::gpu_replay
