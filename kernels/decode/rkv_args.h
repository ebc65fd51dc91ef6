// What one R-KV compaction (Zefan-Cai/R-KV, policy rkv@zefan-cai) reads and writes, as one by-value argument;
// shared by host, kernels and the emulator. Every (sequence b, kv head h) that holds `budget` tokens or more
// falls to exactly `budget` (at `budget` it is only ranked anew, as the reference does), in place: the rows
// of survivors behind the budget fill the holes of the victims, nothing else moves. What the reference calls
// slot order lives in `order`: rank r of a head lies in slot order[r]; after a compaction ranks are in
// descending score, the window's tokens behind. Scores are fp32, the result is bitwise repeatable.
//
// The L x L matrix of cosines C is never made. Its column sums are (sum of unit keys) . unit key; what a row
// i forgives is C[i, j] of its last j with C > threshold (rank 0 when there is none), found by a scan from
// the end: every row meets the last keys, only those that found none go on.
//
// Tokens of a head lie in its first `count` slots. Sums over rows are integers, or taken in an order that
// the shape alone decides: the result does not depend on how many blocks share a head.
#pragma once

#include <cstdint>

#include "core/base/dtype.h"

namespace kvlapse {

inline constexpr int kRkvThreads = 384;    // of a block
inline constexpr int kRkvTileRows = 16;    // of a warp
inline constexpr int kRkvFirstKeys = 16;   // that every row meets
inline constexpr int kRkvMaxColumns = 64;  // window x group
inline constexpr int kRkvMaxSlots = 8192;
inline constexpr int kRkvMaxBlocks = 8;     // of a head
inline constexpr int kRkvBuckets = 3072;    // of the sort
inline constexpr int kRkvMaxKeyRows = 240;  // that are searched at once: 8 bits

// A block's shared memory, in bytes from its start. By slot or rank: arrays of n_slots.
struct RkvLayout {
  int vector, keys, logits;  // behind the window's queries; the sort's buckets take the place of all
  int key_inverse;
  int inverse;  // float by slot; then two uint16 each: buckets and ranks while they are sorted
  int importance, projection, forgiven;  // by rank; the first two before that: slots that found no key
  int slot_of, rank_of;                  // uint16
  int sums, totals;                      // int32 [D] of unit keys
  int tops;                              // [window][2]
  int small;                             // 64 words
  int bytes;
};

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
  float* softmax;      // [B, H, tiles, window, 2] scratch: max and sum of 2^ of a tile's logits

  int32_t n_items;     // B * H
  int32_t n_kv_heads;  // H
  int32_t group;       // G
  int32_t n_slots;     // S
  int32_t budget;
  int32_t window;       // window * group <= kRkvMaxColumns
  int32_t kernel;       // of the max pool, odd
  int32_t blocks;       // of a head: a cluster, 1 where there are none
  int32_t key_rows;     // of keys, and of rows that are read again, in shared memory: a multiple of 16
  int32_t logit_tiles;  // of a block: the first, whose logits wait in shared memory for the second reading
  float lambda;
  float threshold;
  float logit_scale;  // log2(e) / sqrt(D)
  RkvLayout layout;
};

struct RkvShape {
  int batch = 0, n_q_heads = 0, n_kv_heads = 0, head_dim = 0, n_slots = 0;
  DType dtype = DType::f16;  // f32, f16 or bf16
  int budget = 0, window = 8, kernel = 7;
  float lambda = 0.07f, threshold = 0.5f;
  int blocks = 0;  // of a head; 0: what fills the device

  int n_items() const { return batch * n_kv_heads; }
  int tiles() const { return (n_slots + kRkvTileRows - 1) / kRkvTileRows; }
};

constexpr int rkv_padded(int n) {
  return (n + kRkvTileRows - 1) / kRkvTileRows * kRkvTileRows;
}
// Of the window's queries in shared memory: in groups of 16 up to eight queries by twice the heads that fill
// eight rows.
constexpr int rkv_query_rows(int window, int group) {
  const int heads = window > 4 ? 1 : window > 2 ? 2 : window > 1 ? 4 : 8;
  return (window + 7) / 8 * ((group + 2 * heads - 1) / (2 * heads)) * 16;
}
constexpr RkvLayout rkv_layout(const RkvArgs& a, int head_dim, int element_bytes) {
  RkvLayout at{};
  const int row = head_dim * element_bytes, n = rkv_padded(a.n_slots);
  at.vector = rkv_query_rows(a.window, a.group) * row;
  at.keys = at.vector + 4 * row;
  at.logits = at.keys + a.key_rows * row;
  const int logits_end = at.logits + a.logit_tiles * (a.window + 7) / 8 * kRkvTileRows * 32,
            counters = kRkvBuckets * 4;
  at.key_inverse = logits_end > counters ? logits_end : counters;
  at.inverse = at.key_inverse + a.key_rows * 4;
  at.importance = at.inverse + n * 4;
  at.projection = at.importance + n * 4;
  at.forgiven = at.projection + n * 4;
  at.slot_of = at.forgiven + n * 4;
  at.rank_of = at.slot_of + n * 2;
  at.sums = at.rank_of + n * 2;
  at.totals = at.sums + head_dim * 4;
  at.tops = at.totals + head_dim * 4;
  at.small = at.tops + (a.window + 1) / 2 * 16;
  at.bytes = at.small + 256;
  return at;
}
// Shares `bytes` of shared memory out: key_rows, at least `least`, and logit_tiles. False: they do not fit.
bool fit_rkv(RkvArgs& args, int head_dim, int element_bytes, int bytes, int least);
// The same for a block of two a multiprocessor: with as many keys as searches are fastest by, or with half of
// them, as the second block is worth more.
bool fit_rkv_pair(RkvArgs& args, int head_dim, int element_bytes, int bytes);

// Fills what follows from the shape. Throws Error when it is not supported.
void set_rkv_scalars(RkvArgs& args, const RkvShape& shape);
// Bytes that a compaction should move through device memory when every head holds `held` tokens (modelled: K
// once, the moved rows).
uint64_t rkv_bytes(const RkvShape& shape, int held);

}  // namespace kvlapse
