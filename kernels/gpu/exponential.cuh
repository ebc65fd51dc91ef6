// The device's text of scalar::exp_one (core/base): the same polynomial and rounding, so the same bits.
// Include the device's operations (or the emulator) first.
#pragma once

#include <cstdint>

namespace kvlapse::device {

// e^(x - n log 2), n the integer nearest to x / log 2.
KVLAPSE_DEVICE float exp_of_rest(float x, float n) {
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  return fmaf(p, r * r, r) + 1.0f;
}

}  // namespace kvlapse::device
