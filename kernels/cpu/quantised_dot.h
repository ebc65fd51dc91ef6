// Dots of quantised matrix rows with fp32 activations: blocks are widened in registers to exactly the values
// of dequantize() and summed in the order of vector_math.h, so the result is the bits of dequantising first.
// Thread-safe.
#pragma once

#include <cstddef>

#include "core/base/tensor_type.h"

namespace kvlapse {

// Types that have a kernel here; others are widened panel by panel.
bool has_quantised_dot(TensorType type);

// y[j * y_stride + r] = row r . x[j * x_stride ...], for n_rows rows of `columns` (a multiple of 32) and n_x
// vectors.
void quantised_rows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows, size_t columns,
                    const float* x, size_t x_stride, size_t n_x, float* y, size_t y_stride);

// The same values as dequantize(), for one of these types.
void widen_quantised(TensorType type, const std::byte* data, size_t n, float* out);

}  // namespace kvlapse
