// The device's text of exponentials in core/base: the same polynomial and rounding, so the same bits.
// Include the device's operations (or the emulator) first.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/base/vector_math.h"

namespace kvlapse::device {

// x - n log 2, n the integer nearest to x / log 2.
KVLAPSE_DEVICE float exp_rest(float x, float n) {
  return fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));
}
KVLAPSE_DEVICE float exp_of_rest(float r) {
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  return fmaf(p, r * r, r) + 1.0f;
}

// vector_math.h: softmax_base and, for values up to the base's, exp_over.
KVLAPSE_DEVICE float softmax_base(float most) {
  return rintf(most * kLog2e) - static_cast<float>(kHeadBits);
}
KVLAPSE_DEVICE float exp_over(float x, float base) {
  const float n = rintf(x * kLog2e), power = n - base;
  if (!(power >= -126.0f)) return x < __builtin_huge_valf() ? 0.0f : x - x;
  return exp_of_rest(fminf(fmaxf(exp_rest(x, n), -1.0f), 1.0f)) *
         bits_float(static_cast<uint32_t>(static_cast<int32_t>(power) + 127) << 23);
}

}  // namespace kvlapse::device
