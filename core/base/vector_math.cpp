#include "core/base/vector_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

namespace kvlapse {
namespace {

constexpr size_t kLanes = 16;

float tree(float (&lanes)[kLanes]) {
  for (size_t width = kLanes / 2; width > 0; width /= 2)
    for (size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

float exp_one(float x) {
  if (!(x > -87.3f)) return x != x ? x : 0.0f;
  if (x > 88.7f) return std::numeric_limits<float>::infinity();
  constexpr float kLog2e = 1.44269504088896341f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  float n = std::nearbyint(x * kLog2e);
  float r = std::fma(n, -kLn2High, x);
  r = std::fma(n, -kLn2Low, r);
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  float y = std::fma(p, r * r, r) + 1.0f;
  return y * std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

}  // namespace

float dot(const float* a, const float* b, size_t n) {
  float lanes[kLanes] = {};
  for (size_t i = 0; i < n; ++i) lanes[i % kLanes] = std::fma(a[i], b[i], lanes[i % kLanes]);
  return tree(lanes);
}

float sum(std::span<const float> values) {
  float lanes[kLanes] = {};
  for (size_t i = 0; i < values.size(); ++i) lanes[i % kLanes] += values[i];
  return tree(lanes);
}

float l1_norm(std::span<const float> values) {
  float lanes[kLanes] = {};
  for (size_t i = 0; i < values.size(); ++i) lanes[i % kLanes] += std::abs(values[i]);
  return tree(lanes);
}

float max_value(std::span<const float> values) {
  float most = -std::numeric_limits<float>::infinity();
  for (float v : values) most = std::max(most, v);
  return most;
}

void exp_minus(std::span<const float> values, float shift, std::span<float> out) {
  for (size_t i = 0; i < values.size(); ++i) out[i] = exp_one(values[i] - shift);
}

float softmax(std::span<const float> logits, std::span<float> out) {
  float most = max_value(logits);
  if (most == -std::numeric_limits<float>::infinity()) {
    std::fill(out.begin(), out.end(), 0.0f);
    return most;
  }
  exp_minus(logits, most, out);
  float total = sum(out);
  float scale = 1.0f / total;
  for (float& v : out) v *= scale;
  return most + std::log(total);
}

void multiply_add(std::span<const float> a, std::span<const float> b, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::fma(a[i], b[i], out[i]);
}

void add_scaled(float scale, std::span<const float> values, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::fma(scale, values[i], out[i]);
}

}  // namespace kvlapse
