// Number conversions that the exact kernels use beside device_ops.cuh.
#pragma once

#include "kernels/cuda/device_ops.cuh"

// Sums run in a fixed order, but their loads need not wait for one another.
#define KVLAPSE_UNROLL_16 _Pragma("unroll 16")

namespace kvlapse::device {

KVLAPSE_DEVICE float half_to_float(uint16_t bits) {
  return __half2float(__ushort_as_half(bits));
}
KVLAPSE_DEVICE uint16_t float_to_half(float value) {
  return __half_as_ushort(__float2half_rn(value));
}
KVLAPSE_DEVICE int lowest_bit(uint32_t bits) {
  return __ffs(static_cast<int>(bits)) - 1;
}
// The count before this one.
KVLAPSE_DEVICE uint32_t global_append(uint32_t* count) {
  return atomicAdd(count, 1u);
}

}  // namespace kvlapse::device
