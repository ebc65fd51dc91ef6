// The arithmetic that configurations of a replay share or spend most time in, blocked for the cache and
// written with Highway (runtime dispatch). Every output element is one fixed sequence of operations, whatever
// the vector width or the blocking. Thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kvlapse::dense {

// out[m][i] = scale * dot(queries[m], key i) for keys [0, n_keys): the same bits as vector_math's dot.
// keys_t [D][key_stride], transposed; n_keys a multiple of 16. queries [m][query_stride], out
// [m][out_stride].
void logits_block(const float* keys_t, size_t key_stride, size_t head_dim, const float* queries,
                  size_t query_stride, size_t n_queries, size_t n_keys, float scale, float* out,
                  size_t out_stride);

// out[m][d] += sum over u of weights[w(u)][m] * rows[w(u)][d], fused multiply-add in ascending u from out's
// value; w(u) = index[u], or u without an index. weights [.][weight_stride] with m columns, rows [.][D], out
// [m][D].
void weighted_rows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
                   const float* rows, size_t head_dim, float* out);

// out[m] += sum over u of weights[w(u)][m], in partial sums of 64 consecutive u.
void sum_rows(const float* weights, size_t weight_stride, size_t m, const int32_t* index, size_t n,
              float* out);

// out[i] += parts[0][i] + parts[1][i] + ..., added one after the other.
void add_parts(const float* const* parts, size_t n_parts, size_t n, float* out);

// out[c][i] = values[index[i] * stride + c]; out [n_columns][out_stride].
void gather_columns(const float* values, size_t stride, size_t n_columns, const int32_t* index, size_t n,
                    float* out, size_t out_stride);

// out[i][m] = rows[m][i] for i < n; rows [n_rows][row_stride], out [n][out_stride].
void transpose(const float* rows, size_t row_stride, size_t n_rows, size_t n, float* out, size_t out_stride);

// Indices of the values above `threshold`, ascending; `out` has room for n. Returns how many.
size_t find_above(const float* values, size_t n, float threshold, int32_t* out);

// Bit (i % 32) of out[r][i / 32] says whether rows[r][i] > threshold, for i < n, a multiple of 32; rows
// [n_rows][row_stride], out [n_rows][out_stride].
void above_bits(const float* rows, size_t row_stride, size_t n_rows, size_t n, float threshold, uint32_t* out,
                size_t out_stride);

// With x = a_scale * a + b_scale * b: |x|^2 and a.x, summed like vector_math's dot.
struct Products {
  float xx, ax;
};
Products combine_products(const float* a, float a_scale, const float* b, float b_scale, size_t n);

}  // namespace kvlapse::dense
