// The definition of vector_math.h and row_math.h in plain C++: what every SIMD path must equal bit for bit,
// and what runs on CPUs without AVX2. Thread-safe.
#pragma once

#include <cstddef>
#include <span>

#include "core/base/row_math.h"

namespace kvlapse::scalar {

float dot(const float* a, const float* b, size_t n);
float sum(std::span<const float> values);
float l1_norm(std::span<const float> values);
float max_value(std::span<const float> values);
float exp_one(float x);
float exp_over_one(float x, float base);
void exp_minus(std::span<const float> values, float shift, std::span<float> out);
void exp_over(std::span<const float> values, float base, std::span<float> out);
float softmax(std::span<const float> logits, std::span<float> out);
void multiply_add(std::span<const float> a, std::span<const float> b, std::span<float> out);
void add_scaled(float scale, std::span<const float> values, std::span<float> out);
void scale(float factor, std::span<float> values);
float element(const RowView& rows, size_t row, size_t d);  // widened
void dot_rows(const RowView& rows, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
              float factor, float* out, size_t out_stride);
void dot_columns(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
                 float factor, float* out, size_t out_stride);
void weighted_rows(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                   size_t n_x, float* out, size_t out_stride);

}  // namespace kvlapse::scalar
