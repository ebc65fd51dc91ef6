// What one R-KV compaction (Zefan-Cai/R-KV, policy rkv@zefan-cai) reads and writes, as one by-value argument;
// shared by host, kernels and the emulator. Every (sequence b, kv head h) that holds `budget` tokens or more
// falls to exactly `budget` (at `budget` it is only ranked anew, as the reference does), in place: the rows
// of survivors behind the budget fill the holes of the victims, nothing else moves. What the reference calls
// slot order lives in `order`: rank r of a head lies in slot order[r]; after a compaction ranks are in
// descending score, the window's tokens behind. Scores are fp32, the result is bitwise repeatable.
//
// The L x L matrix of cosines C is never made. Its column sums are (sum of unit keys) . unit key; what a row
// i forgives is C[i, j] of its last j with C > threshold (rank 0 when there is none), found by a scan from
// the end that stops once every row of a block has its j.
#pragma once

#include <cstdint>

#include "core/base/dtype.h"

namespace kvlapse {

inline constexpr int kRkvRows = 128;     // of a block
inline constexpr int kRkvColumns = 64;   // keys that are compared with them at once; most window x group
inline constexpr int kRkvThreads = 256;  // of a block of rows
inline constexpr int kRkvSelectThreads = 1024;  // of a block that selects, at most; a multiple of 128
inline constexpr int kRkvMaxSlots = 8192;

struct RkvArgs {
  const void* q;  // [B, window, Hq, D] the newest queries, oldest first
  void* k;        // [B, H, S, D]
  void* v;
  int32_t* order;      // [B, H, S] ranks [0, count)
  int32_t* count;      // [B, H]
  int32_t* positions;  // [B, H, S] moves with the rows; optional
  float* value_l1;     // the same
  int32_t* evicted;    // [B, H, S - budget] positions of the victims, lowest score last, -1 pads; optional
                       // (needs positions)
  float* scores;       // [B, H, S] Z by old rank; optional
  // Scratch, by rank.
  float* inverse_norm;  // [B, H, S]
  float* logits;        // [B, H, window, S] max over the group
  float* softmax;       // [B, H, row_blocks, window, 2] max and sum of exp before the window
  float* partial_sum;   // [B, H, row_blocks, D] of unit keys
  float* own;           // [B, H, S] square of the unit key: 1, rounded
  int32_t* similar;     // [B, H, S] rank that the row forgives
  float* cosine;        // [B, H, S] and how much

  int32_t n_items;     // B * H
  int32_t n_kv_heads;  // H
  int32_t group;       // G
  int32_t n_slots;     // S
  int32_t budget;
  int32_t window;  // window * group <= kRkvColumns
  int32_t kernel;  // of the max pool, odd
  int32_t row_blocks;
  int32_t select_threads;  // one block of all, or with half of them two to a multiprocessor
  float lambda;
  float threshold;
  float logit_scale;  // 1 / sqrt(D)
};

struct RkvShape {
  int batch = 0, n_q_heads = 0, n_kv_heads = 0, head_dim = 0, n_slots = 0;
  DType dtype = DType::f16;  // f32, f16 or bf16
  int budget = 0, window = 8, kernel = 7;
  float lambda = 0.07f, threshold = 0.5f;

  int n_items() const { return batch * n_kv_heads; }
  int row_blocks() const { return (n_slots + kRkvRows - 1) / kRkvRows; }
};

constexpr int rkv_row_bytes(int head_dim, int element_bytes) {
  return head_dim * element_bytes + 16;  // padded: 8 rows of one column lie in 8 different bank groups
}
// Two tiles of keys; before the search the window's queries, then their products with the rows.
constexpr int rkv_keys_bytes(int head_dim, int element_bytes) {
  const int keys = 2 * kRkvColumns * rkv_row_bytes(head_dim, element_bytes);
  const int products = kRkvRows * (kRkvColumns + 1) * 4;
  return keys > products ? keys : products;
}
constexpr int rkv_rows_smem_bytes(int head_dim, int element_bytes) {
  return kRkvRows * rkv_row_bytes(head_dim, element_bytes) + rkv_keys_bytes(head_dim, element_bytes) +
         kRkvRows * 4 + 2 * kRkvColumns * 4 + kRkvThreads * 8 + 64;
}
constexpr int rkv_power_of_two(int n) {
  int p = 64;
  while (p < n) p *= 2;
  return p;
}
constexpr int rkv_select_smem_bytes(int n_slots, int budget) {
  return rkv_power_of_two(n_slots) * 8 + n_slots * 8 + (n_slots - budget) * 16 + 2048;
}

// Fills what follows from the shape. Throws Error when it is not supported.
void set_rkv_scalars(RkvArgs& args, const RkvShape& shape);
// Bytes that a compaction should move through device memory when every head holds `held` tokens (modelled: K
// once, the moved rows).
uint64_t rkv_bytes(const RkvShape& shape, int held);

}  // namespace kvlapse
