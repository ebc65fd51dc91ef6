#include "kernels/cpu/activations.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/base/scalar_math.h"
#include "core/base/vector_math.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/activations.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

// The loops below are element-wise: the compiler vectorises them for each target, the bits cannot differ.

void ScaleByWeight(const float* x, float factor, const float* weight, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = x[i] * factor * weight[i];
}

void RotateHalf(float* x, size_t head_dim, const float* cos, const float* sin) {
  const size_t half = head_dim / 2;
  for (size_t d = 0; d < half; ++d) {
    const float a = x[d], b = x[d + half];
    x[d] = a * cos[d] - b * sin[d];
    x[d + half] = b * cos[d] + a * sin[d];
  }
}

void Add(const float* x, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] += x[i];
}

void SiluMultiply(float* gate, const float* up, size_t n) {
  size_t i = 0;
#if KVLAPSE_SIMD
  const Tag d;
  for (; i + kLanes <= n; i += kLanes) {
    const Vec g = load(gate + i);
    const Vec silu = hn::Div(g, hn::Add(hn::Set(d, 1.0f), exp(hn::Neg(g))));
    hn::StoreU(hn::Mul(silu, load(up + i)), d, gate + i);
  }
#endif
  for (; i < n; ++i) gate[i] = gate[i] / (1.0f + scalar::exp_one(-gate[i])) * up[i];
}

void Narrow(DType type, const float* values, size_t n, uint16_t* out) {
  size_t i = 0;
  if (type == DType::f16) {
#if KVLAPSE_SIMD
    const hn::Rebind<hwy::float16_t, Tag> d16;
    for (; i + kLanes <= n; i += kLanes)
      hn::StoreU(hn::DemoteTo(d16, load(values + i)), d16, reinterpret_cast<hwy::float16_t*>(out + i));
#endif
    for (; i < n; ++i) out[i] = f32_to_f16(values[i]);
  } else {
    for (; i < n; ++i) out[i] = f32_to_bf16(values[i]);
  }
}

void Widen(DType type, const uint16_t* values, size_t n, float* out) {
  size_t i = 0;
  if (type == DType::f16) {
#if KVLAPSE_SIMD
    for (; i + kLanes <= n; i += kLanes)
      hn::StoreU(load(reinterpret_cast<const hwy::float16_t*>(values + i)), Tag(), out + i);
#endif
    for (; i < n; ++i) out[i] = f16_to_f32(values[i]);
  } else {
    for (; i < n; ++i) out[i] = bf16_to_f32(values[i]);
  }
}

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(ScaleByWeight);
HWY_EXPORT(RotateHalf);
HWY_EXPORT(Add);
HWY_EXPORT(SiluMultiply);
HWY_EXPORT(Narrow);
HWY_EXPORT(Widen);

void rms_norm(std::span<const float> x, std::span<const float> weight, float eps, float* out) {
  const float mean = dot(x.data(), x.data(), x.size()) / static_cast<float>(x.size());
  HWY_DYNAMIC_DISPATCH(ScaleByWeight)(x.data(), 1.0f / std::sqrt(mean + eps), weight.data(), x.size(), out);
}

void rotate_half(float* x, size_t head_dim, const float* cos, const float* sin) {
  HWY_DYNAMIC_DISPATCH(RotateHalf)(x, head_dim, cos, sin);
}

void silu_multiply(std::span<float> gate, std::span<const float> up) {
  HWY_DYNAMIC_DISPATCH(SiluMultiply)(gate.data(), up.data(), gate.size());
}

void add(std::span<const float> x, float* out) {
  HWY_DYNAMIC_DISPATCH(Add)(x.data(), x.size(), out);
}

void narrow(DType type, const float* values, size_t n, void* out) {
  if (type == DType::f32)
    std::memcpy(out, values, n * sizeof(float));
  else
    HWY_DYNAMIC_DISPATCH(Narrow)(type, values, n, static_cast<uint16_t*>(out));
}

void widen(DType type, const void* values, size_t n, float* out) {
  if (type == DType::f32)
    std::memcpy(out, values, n * sizeof(float));
  else
    HWY_DYNAMIC_DISPATCH(Widen)(type, static_cast<const uint16_t*>(values), n, out);
}

void round_to(DType type, std::span<float> values) {
  if (type == DType::f32) return;
  constexpr size_t kBlock = 256;
  uint16_t half[kBlock];
  for (size_t begin = 0; begin < values.size(); begin += kBlock) {
    const size_t n = std::min(kBlock, values.size() - begin);
    narrow(type, values.data() + begin, n, half);
    widen(type, half, n, values.data() + begin);
  }
}

}  // namespace kvlapse
#endif  // HWY_ONCE
