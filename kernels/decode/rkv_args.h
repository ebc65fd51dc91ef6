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
//
// Blocks of rows work in two phases. The first finds what a head sums over all rows (unit keys, exponentials
// of the window's logits); the second projects on it, searches, and the block that ends last selects. In one
// launch the blocks of a head are a cluster that meets between the phases; where there are no clusters, a
// head has too many blocks for one, or heads fill the device more than twice, the phases are two launches and
// the second reads the keys again.
#pragma once

#include <cstdint>

#include "core/base/dtype.h"

namespace kvlapse {

inline constexpr int kRkvRows = 128;  // whose sums are kept apart: of four warps, a block has one to four
inline constexpr int kRkvWarpRows = 32;
inline constexpr int kRkvColumns = 64;   // keys of a tile of the search; most window x group
inline constexpr int kRkvThreads = 512;  // of a block, at most
inline constexpr int kRkvMaxCluster = 16;
inline constexpr int kRkvMaxSlots = 8192;
inline constexpr int kRkvBuckets = 2048;  // of the sort by score

enum class RkvPhase : int32_t { both, first, second };

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
  // Scratch; what is by rank has rows of `stride`.
  float* inverse_norm;  // [B, H, stride]
  float* importance;    // [B, H, stride] before the pool
  float* projection;    // [B, H, stride] on the sum of unit keys, without the key's own
  uint64_t* forgiven;   // [B, H, stride] by other rows, in steps of 2^-40
  float* softmax;       // [B, H, units, window, 2] max and sum of exp before the window
  float* logits;        // [B, H, stride, window rounded up to 8] in the order of lanes
  float* partial_sum;   // [B, H, units, D] of unit keys
  uint32_t* arrivals;   // [B, H] blocks that are done; zero between launches

  int32_t n_items;     // B * H
  int32_t n_kv_heads;  // H
  int32_t group;       // G
  int32_t n_slots;     // S
  int32_t stride;      // S rounded up to whole tiles
  int32_t budget;
  int32_t window;  // window * group <= kRkvColumns
  int32_t kernel;  // of the max pool, odd
  int32_t units;   // of kRkvRows rows
  RkvPhase phase;
  int32_t block_rows;     // a multiple of kRkvRows
  int32_t row_blocks;     // of a head
  int32_t block_threads;  // a multiple of kRkvRows; those without rows help to copy and to select
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
  int units() const { return (n_slots + kRkvRows - 1) / kRkvRows; }
  int stride() const { return (n_slots + kRkvColumns - 1) / kRkvColumns * kRkvColumns; }
};

// Two tiles of keys, the window's queries, the sum of unit keys in up to three parts, sums of each warp, and
// 2 KiB for what is small.
constexpr int rkv_rows_smem_bytes(const RkvArgs& args, int head_dim, int element_bytes) {
  return (2 * kRkvColumns + args.window * args.group + 3) * head_dim * element_bytes +
         args.block_rows / kRkvWarpRows * (head_dim * 4 + args.window * 8) + 2048;
}
constexpr int rkv_select_smem_bytes(const RkvArgs& args) {
  return args.stride * 16 + (args.n_slots - args.budget) * 16 + 2048 + kRkvBuckets * 4;
}
constexpr int rkv_smem_bytes(const RkvArgs& args, int head_dim, int element_bytes) {
  const int rows = rkv_rows_smem_bytes(args, head_dim, element_bytes), select = rkv_select_smem_bytes(args);
  return rows > select ? rows : select;
}

// Fills what follows from the shape. Throws Error when it is not supported.
void set_rkv_scalars(RkvArgs& args, const RkvShape& shape);
// The blocks of a launch: rows, threads (the most where heads are too few to fill the multiprocessors) and
// whether the blocks of a head meet in a cluster; phase `first` when they do not: `second` follows.
void set_rkv_blocks(RkvArgs& args, const RkvShape& shape, bool clusters, int n_multiprocessors);
// Bytes that a compaction should move through device memory when every head holds `held` tokens (modelled: K
// once, the moved rows).
uint64_t rkv_bytes(const RkvShape& shape, int held);

}  // namespace kvlapse
