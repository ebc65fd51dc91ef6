#include "core/base/scalar_math.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "core/base/vector_math.h"

namespace kvlapse::scalar {
namespace {

constexpr size_t kLanes = 16;

float tree(float (&lanes)[kLanes]) {
  for (size_t width = kLanes / 2; width > 0; width /= 2)
    for (size_t l = 0; l < width; ++l) lanes[l] += lanes[l + width];
  return lanes[0];
}

}  // namespace

float element(const RowView& rows, size_t row, size_t d) {
  size_t at = (rows.index ? static_cast<size_t>(rows.index[row]) : row) * rows.stride + d;
  switch (rows.type) {
    case DType::f16: return f16_to_f32(static_cast<const uint16_t*>(rows.data)[at]);
    case DType::bf16: return bf16_to_f32(static_cast<const uint16_t*>(rows.data)[at]);
    default: return static_cast<const float*>(rows.data)[at];
  }
}

namespace {
// x - n log 2.
float exp_rest(float x, float n) {
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  return std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
}
float exp_of_rest(float r) {
  float p = 1.9875691500e-4f;
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  return std::fma(p, r * r, r) + 1.0f;
}
float power_of_two(float n) {  // n an integer in [-126, 127]
  return std::bit_cast<float>(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}
}  // namespace

float exp_one(float x) {
  if (!(x > -87.3f)) return x != x ? x : 0.0f;
  if (x > 88.37f) return std::numeric_limits<float>::infinity();
  const float n = std::nearbyint(x * kLog2e);
  return exp_of_rest(exp_rest(x, n)) * power_of_two(n);
}

float exp_over_one(float x, float base) {
  const float n = std::nearbyint(x * kLog2e), power = n - base;
  if (!(power >= -126.0f))
    return x < std::numeric_limits<float>::infinity() ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  return exp_of_rest(std::clamp(exp_rest(x, n), -1.0f, 1.0f)) * power_of_two(power);
}

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
  return most + 0.0f;  // one zero, so that the order of comparison cannot show
}

void exp_minus(std::span<const float> values, float shift, std::span<float> out) {
  for (size_t i = 0; i < values.size(); ++i) out[i] = exp_one(values[i] - shift);
}

void exp_over(std::span<const float> values, float base, std::span<float> out) {
  for (size_t i = 0; i < values.size(); ++i) out[i] = exp_over_one(values[i], base);
}

float softmax(std::span<const float> logits, std::span<float> out) {
  float most = max_value(logits);
  if (most == -std::numeric_limits<float>::infinity()) {
    std::fill(out.begin(), out.end(), 0.0f);
    return most;
  }
  const float base = softmax_base(most);
  exp_over(logits, base, out);
  float total = sum(out);
  scale(1.0f / total, out);
  return log_over(total, base);
}

void multiply_add(std::span<const float> a, std::span<const float> b, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::fma(a[i], b[i], out[i]);
}

void add_scaled(float scale, std::span<const float> values, std::span<float> out) {
  for (size_t i = 0; i < out.size(); ++i) out[i] = std::fma(scale, values[i], out[i]);
}

void scale(float factor, std::span<float> values) {
  for (float& v : values) v *= factor;
}

void dot_rows(const RowView& rows, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
              float factor, float* out, size_t out_stride) {
  for (size_t j = 0; j < n_x; ++j)
    for (size_t i = 0; i < n; ++i) {
      float lanes[kLanes] = {};
      for (size_t d = 0; d < dim; ++d)
        lanes[d % kLanes] = std::fma(element(rows, i, d), x[j * x_stride + d], lanes[d % kLanes]);
      out[j * out_stride + i] = tree(lanes) * factor;
    }
}

void dot_columns(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
                 float factor, float* out, size_t out_stride) {
  for (size_t j = 0; j < n_x; ++j)
    for (size_t i = 0; i < n; ++i) {
      float lanes[kLanes] = {};
      for (size_t d = 0; d < dim; ++d)
        lanes[d % kLanes] = std::fma(columns[d * kColumnRows + i], x[j * x_stride + d], lanes[d % kLanes]);
      out[j * out_stride + i] = tree(lanes) * factor;
    }
}

void weighted_rows(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                   size_t n_x, float* out, size_t out_stride) {
  for (size_t j = 0; j < n_x; ++j)
    for (size_t d = 0; d < dim; ++d) {
      float total = 0;
      for (size_t i = 0; i < n; ++i)
        total = std::fma(weights[j * weight_stride + i], element(rows, i, d), total);
      out[j * out_stride + d] = total;
    }
}

}  // namespace kvlapse::scalar
