// What the fused decode step reads and writes, as one by-value argument; shared by host, kernels and the
// emulator.
//
// One launch, for every (sequence b, kv head h): the token's k, v are stored in the slot that the device
// chose in the step before; attention over the valid slots; every slot's exact score; the next victim. State
// lives on the device, so a step needs no host.
//
// Which slot a token takes: n0 tokens are held (count[b,h], or min(step_pos[b], budget) when there is no
// count). n0 < budget: slot n0. Otherwise the slot in the low half of min(victim_keys[b,h,0..n_splits)). A
// victim key is (bits of the score << 32) | slot, all ones: no candidate. Ties go to the lowest slot; NaN
// sorts last.
//
// Sequences with step_pos[b] < 0 are skipped and their output is zero.
#pragma once

#include <cstdint>

#include "core/base/victim.h"

namespace kvlapse {

inline constexpr int kMaxDecodeSplits = 16;
inline constexpr int kMaxDecodeGroup = 8;  // query heads per kv head: the columns of one matrix instruction
inline constexpr int kDecodeTileSlots = 64;
inline constexpr int kDecodeTileWarps = 2;  // that share a tile
inline constexpr int kMaxDecodeWarps = 10;  // that consume tiles
// Of each of two blocks a multiprocessor. fp8 keeps more warps busy, as it widens, and fits 128 registers
// where heads are not wide; bf16 loses by both (5 %, H200).
constexpr int paired_decode_warps(int head_dim, bool fp8) {
  return fp8 && head_dim <= 128 ? 6 : 4;
}
// Registers are dealt to four warps at a time: from eight to eleven consumers cost the same, and seven leave
// wide heads as many as they need.
constexpr int max_decode_warps(int head_dim) {
  return head_dim > 128 ? 7 : kMaxDecodeWarps;
}
inline constexpr int kMaxDecodeStages = 24;
// Barriers and exchange buffers behind the ring.
inline constexpr int kDecodeSmallBytes = 16 * kMaxDecodeStages + 16 * kMaxDecodeWarps + 176;
inline constexpr int kDecodeSoftmaxBytes = kMaxDecodeGroup * 2 * 4;  // a row: maxima and sums of a warp
inline constexpr int kDecodeSoftmaxBatch = 40;                       // rows that are merged at once
inline constexpr int kDecodeOutputPad =
    4;  // floats between heads of the output reduction, against bank conflicts
// Leave one out: others that weigh less than this of the largest together count as nothing.
inline constexpr float kLeastRest = 0x1p-100f;

constexpr bool score_uses_norm(FusedScore s) {
  return s == FusedScore::contribution || s == FusedScore::accumulated_contribution;
}
constexpr bool score_accumulates(FusedScore s) {
  return s == FusedScore::accumulated || s == FusedScore::accumulated_contribution;
}

// Leave one out: the error of the output when a slot is left out, w / (1 - w) |o - v|_2, is |o' - o| with o'
// the mean of the others by their weights. Computed as w |o' - v|_2 where w is above one half, because 1 - w
// and o - v are no numbers of fp32 any more when w comes near 1; without others o' is zero.
//
// Its kernel is planned with DecodeShape::leave_one_out, reads V twice and serves no other score.

enum DecodeFlag : uint32_t {
  kFlagNoCandidate =
      1u,  // a token needed a slot and every slot was protected: slot 0 or the oldest recent one taken
};

// Which split sums a chunk of four of an item's outputs. Each owns one at least, so that no block runs ahead
// of those of its item by more than one.
struct OutputOwners {
  int32_t scale = 0;                          // the owner of chunk c is c * scale >> kScaleBits
  int32_t most = 0;                           // chunks that a split owns
  uint16_t first[kMaxDecodeSplits + 1] = {};  // of each split's chunks, and their end
  static constexpr int kScaleBits = 20;
};

// A divisor that the host knows: quotients of numbers from 0 to 2^31 - 1 as products, exact.
struct Divisor {
  int32_t divisor = 1;
  uint32_t inverse = 0;  // 2^32 / divisor, rounded up; 0: the divisor is one (or none)
};
constexpr Divisor divisor_of(int divisor) {
  if (divisor <= 1) return {divisor, 0};
  return {divisor, static_cast<uint32_t>((uint64_t{1} << 32) / static_cast<uint32_t>(divisor)) + 1};
}
constexpr int quotient(int x, Divisor by) {
  if (by.inverse == 0) return x;
  const auto above = static_cast<int>(static_cast<uint64_t>(x) * by.inverse >> 32);  // or one more
  return static_cast<uint32_t>(above) * static_cast<uint32_t>(by.divisor) > static_cast<uint32_t>(x)
             ? above - 1
             : above;
}
constexpr int remainder(int x, Divisor by) {
  return x - quotient(x, by) * by.divisor;
}

// The grid has a row for every cluster of n_splits blocks.
template <class TensorMap>
struct DecodeArgs {
  // Tensor maps over k and v: dims {d, S, D / d, B*H} with d of at most 128 bytes, box {d, 64, D / d, 1},
  // swizzle of d. Unused by the cp.async path.
  TensorMap k_map;
  TensorMap v_map;

  // Elements of q, the new rows and out are those of K and V, or 16 bits wide where K and V are fp8
  // (io_bf16).
  const void* q;       // [B, Hq, D]
  const void* k_new;   // [B, H, D]; null: nothing is appended
  const void* v_new;   // [B, H, D]
  void* k;             // [B, H, S, D]
  void* v;             // [B, H, S, D]
  void* out;           // [B, Hq, D]
  float* k_scale;      // [B, H, ceil(S/64)*64] value = byte x scale; fp8 only. The new row is quantised here
  float* v_scale;      // the same (core/base/fp8.h)
  float* value_l1;     // [B, H, S] sum over D of |v|; null when the score has no norm
  float* accumulated;  // [B, H, S]; null unless the score accumulates
  float* importance;   // [B, H, S] scores of this step; optional, needed when the layer shares its victim
  uint16_t* protect;   // [B, H, ceil(S/64)*4] one bit a slot: never a victim. Bits of pinned slots stay set
  int32_t* recent_slots;    // [B, H, recent] slot of the token at position p, at p % recent
  int32_t* positions;       // [B, H, S] position of the token in each slot; optional
  int32_t* count;           // [B, H] tokens held; optional (see above)
  const int32_t* step_pos;  // [B] position of the token of this step
  uint64_t* victim_keys;    // [B, H, kMaxDecodeSplits]; when shared by the layer, head 0's serve all
  uint32_t* arrivals;       // [B, kMaxDecodeSplits] zero between launches
  uint32_t* flags;          // sticky DecodeFlag bits
  // Exchange between splits that are no cluster; zero between launches where it counts.
  float* split_softmax;     // [B*H, kMaxDecodeSplits, 8, 2]
  float* split_output;      // [B*H, n_splits, G*D]; twice that for leave one out
  uint32_t* split_barrier;  // [B*H]

  int32_t n_items;     // B * H
  int32_t n_kv_heads;  // H
  int32_t group;       // G, query heads per kv head
  int32_t half_group;  // ceil(G / 2): lanes of a quad that hold two heads each
  int32_t n_slots;     // S, capacity
  int32_t budget;      // <= S
  Divisor recent;      // how many of the newest tokens are never evicted
  int32_t pinned;      // positions below it are never evicted (sinks, prompt)
  int32_t n_splits;    // CTAs that share one (b, h)
  Divisor by_kv_heads, by_splits, by_groups;
  int32_t n_groups;      // pairs of consumer warps of a block, which take tiles in turn
  int32_t n_stages;      // tiles of the ring in shared memory; a multiple of n_groups
  int32_t warp_bytes;    // of a warp's logits in shared memory, or of its partial output over them
  int32_t logits_bytes;  // of all warps; leave one out: and the output reduction
  int32_t softmax_rows;  // of all splits' warps, in full batches
  OutputOwners owners;
  int32_t small_offset;  // of the barriers and exchange buffers in shared memory
  float logit_scale;     // log2(e) / sqrt(D)
  float score_scale;     // factor of the published mean
  FusedScore score;
  bool io_bf16;      // q, new rows and out of an fp8 cache are bf16, otherwise fp16
  bool shared;       // the layer's heads share one victim
  bool early_state;  // the kernel just before this one in the stream does not write this state or K, V
  bool next_early;   // the next kernel may start before this one has read its keys
  bool state_ahead;  // the next item's state is read while this one streams (copy engine only)
  // Leave one out: of the output reduction, which lies behind the logits there. Last, so that the others'
  // code does not change.
  int32_t partial_offset;
};

}  // namespace kvlapse
