// Attention's and matrix products' inner loops over rows in memory, in the summation order of vector_math.h:
// what is computed for a row does not depend on how many rows or vectors are processed together. Rows may be
// fp32, fp16 or bf16 and are widened exactly. Thread-safe, no allocation.
//
// A query head's attention over n slots, live and in replay alike:
//   logits = dot_rows(K, q, 1 / sqrt(D)), weights = softmax(logits), output = attention_output(V, weights).
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/base/dtype.h"

namespace kvlapse {

struct RowView {
  const void* data = nullptr;
  DType type = DType::f32;         // f32, f16 or bf16
  size_t stride = 0;               // elements from one row to the next
  const int32_t* index = nullptr;  // row i is the index[i]-th in memory; null: the i-th
};

// 1 / sqrt(head_dim) in fp32.
float attention_scale(int head_dim);

// out[j * out_stride + i] = dot(row i, x + j * x_stride) * factor, for n rows of `dim` and n_x vectors.
void dot_rows(const RowView& rows, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
              float factor, float* out, size_t out_stride);

// Rows that are laid out as columns together.
inline constexpr size_t kColumnRows = 64;

// columns[d * kColumnRows + i] = row i [d], widened, for n <= kColumnRows rows; zero from n to the next
// multiple of 32. `columns` has dim * kColumnRows elements.
void to_columns(const RowView& rows, size_t n, size_t dim, float* columns);

// dot_rows's numbers from columns: faster where several vectors share them. May write results up to the
// next multiple of 32 for each vector: those past n mean nothing.
void dot_columns(const float* columns, size_t n, size_t dim, const float* x, size_t x_stride, size_t n_x,
                 float factor, float* out, size_t out_stride);

// Slots whose values are summed into one partial sum.
inline constexpr size_t kValueChunk = 256;

// out[j * out_stride + d] = sum over rows of weights[j * weight_stride + i] * row i [d]: fused multiply-adds
// from zero in row order. One chunk of attention_output.
void weighted_rows(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                   size_t n_x, float* out, size_t out_stride);

// The same in chunks of kValueChunk rows, whose partial sums are added to zero in chunk order. dim <= 512.
void attention_output(const RowView& rows, size_t n, size_t dim, const float* weights, size_t weight_stride,
                      size_t n_x, float* out, size_t out_stride);

}  // namespace kvlapse
