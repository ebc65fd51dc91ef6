// Element-wise parts of a layer on one row, fp32. No allocation; thread-safe.
#pragma once

#include <cstddef>
#include <span>

#include "core/base/dtype.h"

namespace kvlapse {

// out = x / sqrt(mean(x^2) + eps) * weight; out may be x.
void rms_norm(std::span<const float> x, std::span<const float> weight, float eps, float* out);
// Half-split rotation in place: (x[d], x[d + D/2]) by the angle whose cos and sin are given, [D/2] each.
void rotate_half(float* x, size_t head_dim, const float* cos, const float* sin);
// gate = silu(gate) * up.
void silu_multiply(std::span<float> gate, std::span<const float> up);
// out += x.
void add(std::span<const float> x, float* out);

// Round to nearest even into 16-bit storage and back; f32 copies.
void narrow(DType type, const float* values, size_t n, void* out);
void widen(DType type, const void* values, size_t n, float* out);
// values = widen(narrow(values)), in place.
void round_to(DType type, std::span<float> values);

}  // namespace kvlapse
