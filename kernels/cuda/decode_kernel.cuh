// The fused decode step on the device (contract: kernels/decode/decode_args.h). Written in the operations of
// device_ops.cuh only, so that the CPU emulator of the tests compiles the same text; include device_ops.cuh
// (or the emulator) first.
//
// A CTA works on one (b, kv head) and one share ("split") of its 64-slot tiles; CTAs persist and take item
// after item. One producer warp streams all K tiles, then all V tiles, through a ring in shared memory,
// running ahead into the next item; consumer warps, two to a tile, take tiles in turn, 32 slots at a
// time: two independent rows of matrix instructions, and whatever is paid once a tile is paid by few warps.
//   1. logits: K tile x Q^T on the matrix unit (slots are the rows, query heads the 8 columns); logits go to
//      shared memory private to the lane, which keeps a running (max, sum) of its heads.
//   2. Every warp sends its (max, sum) to all splits of the item.
//   3. values: O^T += V^T x P^T, P relative to the warp's own max, which is known at once: others' sums
//   arrive
//      while the first tile of V is multiplied. Behind it probabilities are final, and the same lane turns
//      its own into the slot's exact score and minimum.
//   4. O is brought to the common max and summed over warps and splits in fixed order; the victim is an
//   integer
//      minimum. Nothing depends on timing: the result is bitwise repeatable for a given plan.
//
// The producer's instructions are time: its tiles leave one after another, and a warp that issues among
// eleven takes 6 clocks for each. So a tile is one copy, told without a branch, and a block that starts asks
// for its first tiles before anything that it can do later (H200: half the instructions a tile are 3 % at
// 16384 slots). Probabilities enter the matrix unit as 2^(s - max), so fp16 keeps them normal; 1/sum is
// applied in fp32.
//
// The error that leaving a slot out makes (FusedScore::leave_one_out) asks for the output first. Instances of
// their own read V again, last tile first, because that is what L2 still holds:
//   3. values as above, but with probabilities in two parts of the matrix type, so that O has fp32's
//      precision as far as it matters. A slot of more than half the weight of a head (it is the largest, and
//      there is one) stays out of the sum, and the others are taken relative to their own total: what is left
//      without that slot is no difference of nearly equal numbers then.
//   4. O is summed and sent to all splits.
//   5. distances: |o - v|^2 = |o|^2 - 2 o.v + |v|^2, o in two parts on the matrix unit and |v|^2 from the
//      same tile. Where less than 1/64 of |o|^2 + |v|^2 is left, the warp subtracts element by
//      element instead.
//
// fp8: bytes are widened to fp16 between shared memory and the matrix unit; the slots' scales travel with
// their tile. K's scale multiplies the logit, V's the probability, relative to the largest scale that the
// warp has met (a power of two, so that its sums are rescaled exactly), and q in bf16 enters relative to its
// row's largest value. K is widened as it lies: a lane holds four neighbours of 16 dimensions.
#pragma once

#include "core/base/fp8.h"
#include "kernels/cuda/ring_cursor.cuh"
#include "kernels/decode/decode_args.h"

namespace kvlapse::device {

inline constexpr int kTileSlots = kDecodeTileSlots;
inline constexpr int kHalfSlots = kTileSlots / 2;
static_assert(kHalfSlots == 32);
inline constexpr int kMaxStages = kMaxDecodeStages;
inline constexpr int kConsumerWarps = kMaxDecodeWarps;
inline constexpr int kTileWarps = kDecodeTileWarps;
inline constexpr int kOutputPad = kDecodeOutputPad;
inline constexpr float kNoMax = -1e30f;         // finite, so that an empty row gives 2^(x - x) and no NaN
inline constexpr float kCancelled = 1.0f / 64;  // of |o|^2 + |v|^2: less is computed by subtraction
inline constexpr int kConsumerBarrier = 1;

// Small shared memory behind the ring, the logits and what other splits send.
struct alignas(16) DecodeSmall {
  uint64_t full[kMaxStages];
  uint64_t empty[kMaxStages];
  uint64_t info_full[2];
  uint64_t info_empty[2];
  uint64_t softmax_bar;
  uint64_t output_bar;
  uint64_t drained_bar;  // the item's partial sums have been read
  uint64_t gather_bar;   // leave one out: the whole output has arrived
  uint64_t keys[kConsumerWarps];
  uint64_t layer_keys[kConsumerWarps];
  int32_t info[2][8];
  float inverse_sum[kMaxDecodeGroup];
  int32_t last_arrival;
};
static_assert(sizeof(DecodeSmall) == kDecodeSmallBytes);

template <int kHeadDimension, class ElementTag, bool kBulkCopy, bool kLeavesOut, bool kMayShare>
struct DecodeTraits {
  using Element = ElementTag;
  static constexpr bool kLeaveOneOut = kLeavesOut;  // the score is FusedScore::leave_one_out
  static constexpr bool kShares = kMayShare;        // a layer's heads may share their victim
  static constexpr bool kFp8 = __is_same(Element, E4m3);
  // At most, which decides how many registers there are: 128 where two blocks of seven warps share them.
  static constexpr int kThreads = paired_decode_warps(kHeadDimension, kFp8 && !kLeavesOut) > 4
                                      ? 512
                                      : (max_decode_warps(kHeadDimension) + 1) * 32;
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kRowBytes = kHeadDim * (kFp8 ? 1 : 2);
  static constexpr bool kBulk =
      kBulkCopy;  // copy engine and clusters (sm_90), otherwise cp.async and global memory
  static constexpr int kBoxRowBytes = kRowBytes < 128 ? kRowBytes : 128;
  static constexpr int kBoxes = kRowBytes / kBoxRowBytes;
  static constexpr int kBoxChunks = kBoxRowBytes / 16;  // 16-byte chunks of a row inside a box
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kLoads = kRowChunks / 2;     // of fragments over a row: 32 bytes each
  static constexpr int kBoxLoads = kBoxChunks / 2;  // inside a box
  static constexpr int kNewChunks = kHeadDim / 8;   // of a row as it comes in
  static constexpr uint32_t kSwizzle = kBoxRowBytes == 128 ? 0x70u : kBoxRowBytes == 64 ? 0x30u : 0x10u;
  static constexpr int kBoxBytes = kTileSlots * kBoxRowBytes;
  static constexpr int kTileBytes = kBoxes * kBoxBytes;
  static constexpr int kScaleBytes = kFp8 ? kTileSlots * 4 : 0;  // of a tile
  static constexpr int kSteps = kHeadDim / 16;                   // matrix instructions over D
  static constexpr int kPlanes = kLeaveOneOut ? 3 : 2;           // K, V and perhaps V again
};

// What the matrix unit multiplies.
template <class Element>
struct MatrixElement {
  using Type = Element;
};
template <>
struct MatrixElement<E4m3> {
  using Type = F16;
};

struct DecodeTiles {
  int begin, end;
  KVLAPSE_DEVICE int count() const { return end - begin; }
};
struct ItemInfo {
  int n;        // valid slots, the new token's included
  int slot;     // of the new token, or -1
  int expired;  // slot that leaves the recent window, or -1
  int pos;
  DecodeTiles tiles;  // of this split
};

// The first slot of a slot's half tile; no half's for -1.
KVLAPSE_DEVICE int half_of_slot(int slot) {
  return slot & ~(kHalfSlots - 1);
}

KVLAPSE_DEVICE void merge_softmax(float& m, float& l, float other_m, float other_l) {
  const float top = m > other_m ? m : other_m;
  l = l * exp2_approximate(m - top) + other_l * exp2_approximate(other_m - top);
  m = top;
}
// The same with sums that leave one of the largest out: exact however little the others weigh. -1: empty.
KVLAPSE_DEVICE void merge_rest(float& m, float& rest, float other_m, float other_rest) {
  const bool stays = m >= other_m;
  const float top = stays ? m : other_m, low = stays ? other_m : m;
  rest = (stays ? rest : other_rest) + (1 + (stays ? other_rest : rest)) * exp2_approximate(low - top);
  m = top;
}
KVLAPSE_DEVICE uint64_t min_key(uint64_t a, uint64_t b) {
  return a < b ? a : b;
}
KVLAPSE_DEVICE uint64_t warp_min(uint64_t key) {
  const uint32_t high = static_cast<uint32_t>(key >> 32);
  const uint32_t least = warp_smallest(high);
  const uint32_t low = warp_smallest(high == least ? static_cast<uint32_t>(key) : ~uint32_t{0});
  return (static_cast<uint64_t>(least) << 32) | low;
}

template <class Traits, class Args>
class DecodeCta {
 public:
  KVLAPSE_DEVICE DecodeCta(const Args& args, unsigned char* shared)
      : args_(args),
        small_(*reinterpret_cast<DecodeSmall*>(shared + args.small_offset)),
        ring_(smem_address(shared)),
        scales_(ring_ + static_cast<uint32_t>(args.n_stages * Traits::kTileBytes)),
        logits_(scales_ + static_cast<uint32_t>(args.n_stages * Traits::kScaleBytes)),
        softmax_(logits_ + static_cast<uint32_t>(args.logits_bytes)),
        received_(softmax_ + static_cast<uint32_t>(args.softmax_rows) * kDecodeSoftmaxBytes),
        n_threads_(args.n_groups * kTileWarps * 32),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        rank_(block_index()),
        first_item_(block_row()),
        item_stride_(block_rows()) {}

  KVLAPSE_DEVICE void run() {
    const bool produces = warp_ == consumer_warps();
    ItemState first;
    if (produces) {  // its state is on its way while barriers are made
      if (!args_.early_state) wait_for_previous_kernel();
      read_state(first_item_, first);
      if (Traits::kBulk && lane_ == 0) {
        prefetch_tensor_map(&args_.k_map);
        prefetch_tensor_map(&args_.v_map);
      }
    }
    init_barriers();
    if (!produces) clear_padding();
    block_sync();
    if (clustered()) cluster_arrive_relaxed();
    if (produces)
      produce(first);
    else
      consume();
  }

 private:
  using Matrix = typename MatrixElement<typename Traits::Element>::Type;
  using Tiles = DecodeTiles;
  struct Softmax {
    float max[2];      // of query heads 2t, 2t + 1 over the slots of this warp; leave one out: over all
    float inverse[2];  // 2^(this max - that over all) / sum; 0 for heads that do not exist
    float rescale[2];  // 2^(this max - that over all)
    float gain[2];     // leave one out: where the largest outweighs the others, -1 / their sum or 0; else 1
  };
  static constexpr float kEmptySum = Traits::kLeaveOneOut ? -1.0f : 0.0f;
  KVLAPSE_DEVICE static void merge(float& m, float& l, float other_m, float other_l) {
    if constexpr (Traits::kLeaveOneOut)
      merge_rest(m, l, other_m, other_l);
    else
      merge_softmax(m, l, other_m, other_l);
  }

  KVLAPSE_DEVICE int consumer_warps() const { return n_threads_ / 32; }
  // Which warp keeps an item's state: they take turns, the last one first, which has no part of the output
  // where splits are many.
  KVLAPSE_DEVICE int keeper(int turn) const {
    return consumer_warps() - 1 - (turn & (consumer_warps() < 4 ? 1 : 3));
  }
  KVLAPSE_DEVICE void consumer_sync() { named_barrier(kConsumerBarrier, n_threads_); }
  KVLAPSE_DEVICE bool clustered() const { return Traits::kBulk && args_.n_splits != 1; }
  KVLAPSE_DEVICE SmemAddress bar(const uint64_t& b) const { return smem_address(&b); }
  KVLAPSE_DEVICE bool shared() const { return Traits::kShares && args_.shared; }
  KVLAPSE_DEVICE int half_group() const { return args_.half_group; }  // lanes of a quad that hold heads
  KVLAPSE_DEVICE Tiles tiles_of(int n) const {
    const int tiles = (n + kTileSlots - 1) / kTileSlots;
    return {quotient(tiles * rank_, args_.by_splits), quotient(tiles * rank_ + tiles, args_.by_splits)};
  }
  // 16-byte chunk of a row in a tile, as the copy engine swizzles rows of 128 bytes (address bits 4..6 ^=
  // bits 7..9), of 64 bytes (bits 4..5 ^= bits 7..8: 8 rows of one column lie in 8 different bank groups) and
  // of 32 bytes (bit 4 ^= bit 7).
  KVLAPSE_DEVICE static uint32_t chunk_offset(int row, int chunk) {
    const uint32_t at = static_cast<uint32_t>(row * Traits::kBoxRowBytes + (chunk % Traits::kBoxChunks) * 16);
    return static_cast<uint32_t>(chunk / Traits::kBoxChunks) * Traits::kBoxBytes +
           (at ^ ((at >> 3) & Traits::kSwizzle));
  }
  KVLAPSE_DEVICE const unsigned char* row_of(const void* plane, int item, int slot) const {
    return static_cast<const unsigned char*>(plane) +
           (static_cast<int64_t>(item) * args_.n_slots + slot) * Traits::kRowBytes;
  }
  KVLAPSE_DEVICE int64_t scale_index(int item, int slot) const {
    return static_cast<int64_t>(item) * ((args_.n_slots + kTileSlots - 1) / kTileSlots * kTileSlots) + slot;
  }
  // Of a slot of the tile in a stage.
  KVLAPSE_DEVICE SmemAddress scale_address(int stage, int slot) const {
    return scales_ + static_cast<uint32_t>(stage * Traits::kScaleBytes + slot * 4);
  }
  // Of arrays by slot, which the plan keeps below 2^31 elements.
  KVLAPSE_DEVICE uint32_t slot_index(int item, int slot) const {
    return static_cast<uint32_t>(item * args_.n_slots + slot);
  }
  KVLAPSE_DEVICE uint32_t protect_index(int item, int group16) const {
    return static_cast<uint32_t>(item * ((args_.n_slots + kTileSlots - 1) / kTileSlots * 4) + group16);
  }

  // Every warp makes some: one thread makes one after another, and each takes it about 40 clocks.
  KVLAPSE_DEVICE void init_barriers() {
    constexpr uint32_t kFills = Traits::kBulk ? 1 : 32;
    const int n_warps = consumer_warps() + 1;
    KVLAPSE_NO_UNROLL
    for (int i = warp_; i < args_.n_stages + 4 && lane_ == 0; i += n_warps) {
      const int other = i - args_.n_stages;
      if (other < 0) {
        mbarrier_init(bar(small_.full[i]), kFills);
        mbarrier_init(bar(small_.empty[i]), static_cast<uint32_t>(kTileWarps * kReleases));
      } else if (other < 2) {
        mbarrier_init(bar(small_.info_full[other]), 1);
        mbarrier_init(bar(small_.info_empty[other]), static_cast<uint32_t>(consumer_warps()));
      } else if (other == 2) {
        mbarrier_init(bar(small_.softmax_bar), 1);
        mbarrier_init(bar(small_.output_bar), 1);
      } else {
        mbarrier_init(bar(small_.drained_bar), static_cast<uint32_t>(consumer_warps()));
        if constexpr (Traits::kLeaveOneOut) mbarrier_init(bar(small_.gather_bar), 1);
      }
    }
    fence_barrier_init();
  }

  // Rows of softmax behind the last, which nobody sends.
  KVLAPSE_DEVICE void clear_padding() {
    for (int i = softmax_rows() * 4 + thread_index(); i < args_.softmax_rows * 4; i += n_threads_)
      smem_store4(softmax_ + static_cast<uint32_t>(i * 16), {kNoMax, kEmptySum, kNoMax, kEmptySum});
  }

  // ---- producer ----
  // An item's state before this step, as it is read: nobody writes it before every split has read it.
  struct ItemState {
    int pos = -1, held = 0, oldest = -1;
    uint64_t key = ~uint64_t{0};  // of this lane
  };

  // The first item's state has been asked for already.
  KVLAPSE_DEVICE void produce(ItemState state) {
    const uint64_t policy = Traits::kBulk ? evict_first_policy() : 0;
    // V that is read again shall stay in L2, before K and what has been read twice.
    const uint64_t keeps = Traits::kBulk && Traits::kLeaveOneOut ? evict_normal_policy() : policy;
    RingCursor ring;
    int turn = 0;
    const bool ahead = Traits::kBulk && args_.state_ahead;
    KVLAPSE_NO_UNROLL
    for (int item = first_item_; item < args_.n_items; item += item_stride_, ++turn) {
      if (!ahead && turn > 0) read_state(item, state);
      const int n = valid_slots(state);
      const Tiles tiles = tiles_of(n);
      if (!ahead || turn == 0) read_oldest(item, state);
      // The ring is empty: K is on its way before all of the state is here.
      int loaded = turn == 0 && tiles.count() > 0 ? args_.n_groups : 0;
      load_tiles(0, item, tiles, 0, loaded, n, ring, policy);
      const ItemInfo info = resolve(state, n, tiles);
      if (lane_ == 0) publish(info, turn);
      prefetch_side(item, tiles, n);
      KVLAPSE_NO_UNROLL
      for (int plane = 0; plane < Traits::kPlanes; ++plane, loaded = 0) {
        if (ahead) {
          if (plane == 0)
            read_state(item + item_stride_, state);
          else if (plane == 1)
            read_oldest(item + item_stride_, state);
        }
        load_tiles(plane, item, tiles, loaded, whole_rounds(tiles), n, ring,
                   Traits::kLeaveOneOut && plane == 1 ? keeps : policy);
      }
      warp_sync();
    }
    if (clustered()) cluster_wait();
  }

  // All that does not hang on the position, in flight together.
  KVLAPSE_DEVICE void read_state(int item, ItemState& state) const {
    if (item >= args_.n_items) return;
    const int sequence = quotient(item, args_.by_kv_heads);
    const int key_item = shared() ? sequence * args_.n_kv_heads : item;
    state.pos = args_.step_pos[sequence];
    state.key = ~uint64_t{0};
    if (args_.k_new != nullptr && lane_ < args_.n_splits)
      state.key = args_.victim_keys[key_item * kMaxDecodeSplits + lane_];
    if (args_.count != nullptr) state.held = args_.count[item];
  }
  KVLAPSE_DEVICE void read_oldest(int item, ItemState& state) const {
    state.oldest = -1;
    if (item < args_.n_items && args_.k_new != nullptr && args_.recent.divisor > 0 &&
        state.pos - args_.recent.divisor >= args_.pinned)
      state.oldest = args_.recent_slots[recent_index(item, state.pos)];
  }
  KVLAPSE_DEVICE int64_t recent_index(int item, int pos) const {
    return static_cast<int64_t>(item) * args_.recent.divisor + remainder(pos, args_.recent);
  }
  KVLAPSE_DEVICE int held_before(const ItemState& state) const {
    if (args_.count != nullptr) return state.held;
    return state.pos < args_.budget ? state.pos : args_.budget;
  }
  // The new token's slot counted.
  KVLAPSE_DEVICE int valid_slots(const ItemState& state) const {
    if (state.pos < 0) return 0;
    const int held = held_before(state);
    return args_.k_new != nullptr && held < args_.budget ? held + 1 : held;
  }
  // All lanes.
  KVLAPSE_DEVICE ItemInfo resolve(const ItemState& state, int n, const Tiles& tiles) const {
    if (state.pos < 0) return {0, -1, -1, state.pos, tiles};
    const uint64_t key = warp_min(state.key);
    const int held = held_before(state);
    if (args_.k_new == nullptr) return {n, -1, -1, state.pos, tiles};
    if (held < args_.budget) return {n, held, state.oldest, state.pos, tiles};
    int slot = static_cast<int>(static_cast<uint32_t>(key));
    if (key == ~uint64_t{0} || slot >= held) {
      slot = state.oldest >= 0 ? state.oldest : 0;
      if (lane_ == 0) *args_.flags = kFlagNoCandidate;
    }
    return {n, slot, state.oldest, state.pos, tiles};
  }

  // Norms, scores and protection bits of an item into L2 while K streams, in one piece: a tile's share of
  // them at a time is a few bytes of a page of memory each. By the copy engine alone: the threads that copy
  // by cp.async lost 15 % by asking (H200).
  KVLAPSE_DEVICE void prefetch_side(int item, const Tiles& tiles, int n) const {
    if (!Traits::kBulk || lane_ != 0 || args_.score == FusedScore::none || n == 0) return;
    const int first = tiles.begin * kTileSlots, end = tiles.end * kTileSlots < n ? tiles.end * kTileSlots : n;
    if (score_uses_norm(args_.score)) prefetch(args_.value_l1 + slot_index(item, first), (end - first) * 4);
    if (score_accumulates(args_.score))
      prefetch(args_.accumulated + slot_index(item, first), (end - first) * 4);
    prefetch(args_.protect + protect_index(item, first / 16), (end - first + 15) / 16 * 2);
  }
  KVLAPSE_DEVICE static void prefetch(const void* from, int bytes) {
    const char* data = static_cast<const char*>(from);
    const int before = static_cast<int>(reinterpret_cast<uint64_t>(data) & 15);
    if (bytes >= 16) bulk_prefetch_l2(data - before, static_cast<uint32_t>(bytes + before) & ~15u);
  }

  KVLAPSE_DEVICE void publish(const ItemInfo& info, int turn) {
    const int i = turn & 1;
    mbarrier_wait(bar(small_.info_empty[i]), ((static_cast<uint32_t>(turn) >> 1) & 1) ^ 1);
    int32_t* to = small_.info[i];
    to[0] = info.n;
    to[1] = info.slot;
    to[2] = info.expired;
    to[3] = info.pos;
    to[4] = info.tiles.begin;
    to[5] = info.tiles.end;
    mbarrier_arrive(bar(small_.info_full[i]));
  }

  // Tiles of a split, and empty ones up to where all groups have taken as many: a stage always serves the
  // same group, and groups need not wait for each other between K and V.
  KVLAPSE_DEVICE int whole_rounds(const Tiles& tiles) const {
    return quotient(tiles.count() + args_.n_groups - 1, args_.by_groups) * args_.n_groups;
  }
  // Tiles [first, end) in the order in which they are taken: V is read again from its end.
  KVLAPSE_DEVICE void load_tiles(int plane, int item, const Tiles& tiles, int first, int end, int n,
                                 RingCursor& ring, uint64_t policy) {
    KVLAPSE_NO_UNROLL
    for (int i = first; i < end; ++i, ring.step(1, args_.n_stages))
      load_tile(plane, item, Traits::kLeaveOneOut && plane == 2 ? tiles.end - 1 - i : tiles.begin + i,
                i < tiles.count(), n, ring, policy);
  }
  KVLAPSE_DEVICE void load_tile(int plane, int item, int tile, bool is_there, int n, const RingCursor& ring,
                                uint64_t policy) {
    const SmemAddress to = ring_ + static_cast<uint32_t>(ring.stage * Traits::kTileBytes);
    const SmemAddress full = bar(small_.full[ring.stage]);
    if constexpr (Traits::kBulk) {
      mbarrier_wait(bar(small_.empty[ring.stage]), ring.phase ^ 1);
      const bool first_lane = lane_ == 0, issues = first_lane && is_there;
      mbarrier_arrive_expect(first_lane, full, is_there ? Traits::kTileBytes + Traits::kScaleBytes : 0);
      bulk_load_tile(issues, to, plane == 0 ? &args_.k_map : &args_.v_map, tile * kTileSlots, item, full,
                     policy);
      if constexpr (Traits::kFp8)
        if (issues)
          bulk_load(scale_address(ring.stage, 0), scales_of(plane) + scale_index(item, tile * kTileSlots),
                    Traits::kScaleBytes, full, policy);
    } else {
      mbarrier_wait(bar(small_.empty[ring.stage]), ring.phase ^ 1);
      const unsigned char* from = row_of(plane == 0 ? args_.k : args_.v, item, tile * kTileSlots);
      const int rows = n - tile * kTileSlots;
      constexpr int kAtOnce =
          Traits::kRowChunks * kTileSlots / 32 < 8 ? Traits::kRowChunks * kTileSlots / 32 : 8;
      KVLAPSE_NO_UNROLL
      for (int i = lane_; i < kTileSlots * Traits::kRowChunks; i += 32 * kAtOnce) {
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          const int chunk = i + u * 32;
          const int row = chunk / Traits::kRowChunks;
          const bool valid = row < rows;
          copy_async16(to + chunk_offset(row, chunk % Traits::kRowChunks), valid ? from + chunk * 16 : from,
                       valid);
        }
      }
      if constexpr (Traits::kFp8)
        if (lane_ < Traits::kScaleBytes / 16 && is_there)
          copy_async16(scale_address(ring.stage, lane_ * 4),
                       scales_of(plane) + scale_index(item, tile * kTileSlots + lane_ * 4), true);
      copy_async_arrive(full);
    }
  }
  KVLAPSE_DEVICE const float* scales_of(int plane) const {
    return plane == 0 ? args_.k_scale : args_.v_scale;
  }

  // ---- consumers ----
  // The two warps of a group take half a tile each.
  KVLAPSE_DEVICE int tile_group() const { return warp_ >> 1; }
  KVLAPSE_DEVICE int own_half() const { return warp_ & 1; }
  KVLAPSE_DEVICE bool takes(const Tiles& tiles, int slot, bool last_first = false) const {
    const int tile = slot / kTileSlots;
    return slot >= 0 && tile >= tiles.begin && tile < tiles.end &&
           (last_first ? tiles.end - 1 - tile : tile - tiles.begin) % args_.n_groups == tile_group() &&
           slot / kHalfSlots % 2 == own_half();
  }

  KVLAPSE_DEVICE void consume() {
    const int group = tile_group();
    RingCursor at{group, 0};
    int turn = 0;
    LayerChoice choice;
    if (clustered()) cluster_wait();
    KVLAPSE_NO_UNROLL
    for (int item = first_item_; item < args_.n_items; item += item_stride_, ++turn) {
      uint32_t query = query_index(item);
      computed_here(query);
      const ItemInfo info = take_info(turn);  // behind the kernel in front, unless state may be read early
      const Tiles tiles = info.tiles;
      Softmax softmax{{kNoMax, kNoMax}, {0, 0}, {1, 1}, {1, 1}};
      // Early: their latency is hidden by K, and by the kernel in front.
      SlotSide sides[2];
      if constexpr (!Traits::kLeaveOneOut) {
        const int end = scored_end(info, tiles);
        const int first = (tiles.begin + group) * kTileSlots + own_half() * kHalfSlots;
        sides[0] = load_side(side_rows(item), first, end);
        sides[1] = load_side(side_rows(item), first + args_.n_groups * kTileSlots, end);
      }
      uint32_t has_new = takes(tiles, info.slot) ? 1 : 0;
      if (turn == 0) {
        computed_here(has_new);
        wait_for_previous_kernel();
        if (args_.next_early) allow_next_kernel();
      }
      NewRows rows;
      if constexpr (Traits::kLeaveOneOut) clear_heaviest();
      const bool idles = attend_keys(item, turn, info, tiles, at, query, has_new != 0, rows, softmax);
      if (item + item_stride_ >= args_.n_items) allow_next_kernel();
      arrive_again(choice);
      send_softmax(softmax);
      const float new_norm = has_new != 0 ? note_new_token(item, info, rows.v) : 0;
      const auto combine = [&] { combine_softmax(item, turn, softmax); };
      if constexpr (Traits::kLeaveOneOut) combine();

      float output[Traits::kSteps][4];
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kSteps; ++i)
        for (int j = 0; j < 4; ++j) output[i][j] = 0;
      uint64_t key = attend_values(item, info, tiles, at, rows.v, new_norm, softmax, combine, sides, output);
      pass_tile(idles, at);
      choose_for_layer(choice);
      if constexpr (Traits::kLeaveOneOut) {
        combine_output(item, turn, output);
        key = measure_values(item, info, tiles, at, softmax.max);
        pass_tile(idles, at);
        finish_choice(item, turn, info, key);
      } else {
        finish(item, turn, info, key, output, softmax.rescale);
      }
      choice = {item, info.n, keeper(turn), args_.score != FusedScore::none && info.pos >= 0 && shared()};
    }
    if (choice.due) {
      consumer_sync();
      choose_for_layer(choice);
    }
  }

  KVLAPSE_DEVICE ItemInfo take_info(int turn) {
    const int i = turn & 1;
    mbarrier_wait(bar(small_.info_full[i]), (static_cast<uint32_t>(turn) >> 1) & 1);
    const int32_t* from = small_.info[i];
    const ItemInfo info{from[0], from[1], from[2], from[3], {from[4], from[5]}};
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.info_empty[i]));
    return info;
  }

  // Who arrives when a warp has read a stage. Every lane where threads write the next tile: race detectors do
  // not follow a lane that speaks for its warp.
  static constexpr int kReleases = Traits::kBulk ? 1 : 32;
  KVLAPSE_DEVICE void release(const RingCursor& at) {
    warp_sync();
    if (lane_ < kReleases) mbarrier_arrive(bar(small_.empty[at.stage]));
  }

  // An empty tile, if there is one.
  KVLAPSE_DEVICE bool pass_tile(bool is_there, RingCursor& at) {
    if (is_there) {
      mbarrier_wait(bar(small_.full[at.stage]), at.phase);
      release(at);
      at.step(args_.n_groups, args_.n_stages);
    }
    return is_there;
  }

  // Where this lane keeps the logits (heads 2t, 2t + 1) of slots g and g + 8, and behind them of the next 16
  // slots: those of the halves that a warp visits follow each other. A lane without heads reads where the
  // last one with heads keeps its own.
  KVLAPSE_DEVICE uint32_t pair_bytes() const { return static_cast<uint32_t>(half_group()) * 128; }
  KVLAPSE_DEVICE SmemAddress logit_address(int warp, int visit) const {
    const int lanes = half_group(), t = lane_ % 4 < lanes ? lane_ % 4 : lanes - 1;
    return logits_ + static_cast<uint32_t>(warp * args_.warp_bytes + ((lane_ / 4) * lanes + t) * 16) +
           static_cast<uint32_t>(visit) * 2 * pair_bytes();
  }
  // Of any tile.
  KVLAPSE_DEVICE SmemAddress logit_address_of(int local_tile, int half) const {
    return logit_address(2 * (local_tile % args_.n_groups) + half, local_tile / args_.n_groups);
  }

  // Offsets in a half tile that this lane addresses for load_matrix4: 16 rows, 32 bytes of them. Every 16
  // rows are swizzled alike.
  KVLAPSE_DEVICE static void fragment_offsets(int row, int chunk, uint32_t (&offsets)[Traits::kBoxLoads]) {
    KVLAPSE_UNROLL
    for (int i = 0; i < Traits::kBoxLoads; ++i) offsets[i] = chunk_offset(row, 2 * i + chunk);
  }
  KVLAPSE_DEVICE static SmemAddress fragment_address(SmemAddress rows,
                                                     const uint32_t (&offsets)[Traits::kBoxLoads], int load,
                                                     int block) {
    return rows + offsets[load % Traits::kBoxLoads] +
           static_cast<uint32_t>(load / Traits::kBoxLoads * Traits::kBoxBytes +
                                 block * 16 * Traits::kBoxRowBytes);
  }
  KVLAPSE_DEVICE SmemAddress half_of(int stage, int half) const {
    return ring_ +
           static_cast<uint32_t>(stage * Traits::kTileBytes + half * kHalfSlots * Traits::kBoxRowBytes);
  }

  // The new token's rows, 16 bytes a lane; only in the warp that holds its slot. Of fp8, once quantised, a
  // lane's eight bytes and the row's scale.
  struct NewRows {
    Float4 k, v;
  };
  KVLAPSE_DEVICE NewRows load_new_rows(int item, bool takes_them) const {
    NewRows rows{};
    if (lane_ >= Traits::kNewChunks || !takes_them) return rows;
    const int64_t at = static_cast<int64_t>(item) * Traits::kNewChunks + lane_;
    rows.k = static_cast<const Float4*>(args_.k_new)[at];
    rows.v = static_cast<const Float4*>(args_.v_new)[at];
    return rows;
  }
  // Of a lane's 8 values; lanes without a part of the row hold zeros.
  KVLAPSE_DEVICE Float4 quantised(const Float4& row) const {
    const float words[4] = {row.x, row.y, row.z, row.w};
    float values[8], largest = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) unpack_io(float_bits(words[i]), values[2 * i], values[2 * i + 1]);
    KVLAPSE_UNROLL
    for (int i = 0; i < 8; ++i) largest = larger(largest, magnitude(values[i]));
    const Fp8Scale scale = fp8_scale(bits_float(warp_largest(float_bits(largest))));
    KVLAPSE_UNROLL
    for (int i = 0; i < 8; ++i) values[i] *= scale.inverse;
    return {bits_float(narrow_e4m3(values[0], values[1], values[2], values[3])),
            bits_float(narrow_e4m3(values[4], values[5], values[6], values[7])), scale.scale, 0};
  }
  // Both in turn by the same instructions: short items wait for code.
  KVLAPSE_DEVICE void quantise(NewRows& rows) const {
    KVLAPSE_NO_UNROLL
    for (int plane = 0; plane < 2; ++plane) rows = {rows.v, quantised(rows.k)};
  }
  // Puts the new token's row over what the copy brought, and into the cache for the steps to come. All lanes.
  KVLAPSE_DEVICE void write_row(int stage, int slot, int item, const Float4& row, int plane) {
    const SmemAddress tile = ring_ + static_cast<uint32_t>(stage * Traits::kTileBytes);
    unsigned char* to = const_cast<unsigned char*>(row_of(plane == 0 ? args_.k : args_.v, item, slot));
    if constexpr (Traits::kFp8) {
      const uint64_t bytes = static_cast<uint64_t>(float_bits(row.y)) << 32 | float_bits(row.x);
      if (lane_ < Traits::kNewChunks) {
        smem_store_u64(
            tile + chunk_offset(slot % kTileSlots, lane_ / 2) + static_cast<uint32_t>(lane_ % 2 * 8), bytes);
        reinterpret_cast<uint64_t*>(to)[lane_] = bytes;
      }
      if (lane_ == 0) {
        smem_store(scale_address(stage, slot % kTileSlots), row.z);
        (plane == 0 ? args_.k_scale : args_.v_scale)[scale_index(item, slot)] = row.z;
      }
    } else if (lane_ < Traits::kRowChunks) {
      smem_store4(tile + chunk_offset(slot % kTileSlots, lane_), row);
      reinterpret_cast<Float4*>(to)[lane_] = row;
    }
    fence_proxy_async();  // the next tile comes over it
    warp_sync();
  }

  // Two 16-bit values as q, new rows and output hold them.
  KVLAPSE_DEVICE void unpack_io(uint32_t packed, float& low, float& high) const {
    if constexpr (!Traits::kFp8)
      unpack2<typename Traits::Element>(packed, low, high);
    else if (args_.io_bf16)
      unpack2<Bf16>(packed, low, high);
    else
      unpack2<F16>(packed, low, high);
  }
  KVLAPSE_DEVICE uint32_t pack_io(float low, float high) const {
    if constexpr (!Traits::kFp8)
      return pack2<typename Traits::Element>(low, high);
    else
      return args_.io_bf16 ? pack2<Bf16>(low, high) : pack2<F16>(low, high);
  }
  // The smallest power of two that is not below a value of these bits (0 for 0), as bits; and one over it.
  KVLAPSE_DEVICE static uint32_t power_above(uint32_t bits) {
    const uint32_t up = (bits + 0x7fffffu) & 0xff800000u;
    return up < 0x7e800000u ? up : 0x7e800000u;
  }
  KVLAPSE_DEVICE static float magnitude(float v) { return bits_float(float_bits(v) & 0x7fffffffu); }
  KVLAPSE_DEVICE static float one_over_power(uint32_t bits) { return bits_float(0x7f000000u - bits); }

  // Q^T as the second operand: lane (g, t) holds head g, d = 16 i + 2t, +1, +8, +9; for fp8 d = 16 i + 4t,
  // +1, +2, +3, bf16 divided by a power of two that comes back for this lane's columns, heads 2t and 2t + 1.
  KVLAPSE_DEVICE uint32_t query_index(int item) const {
    return static_cast<uint32_t>((item * args_.group + own_head()) * (Traits::kHeadDim / 2) +
                                 lane_ % 4 * (Traits::kFp8 ? 2 : 1));
  }
  // Columns without a head repeat the last one's: nothing of them is kept.
  KVLAPSE_DEVICE int own_head() const { return lane_ / 4 < args_.group ? lane_ / 4 : args_.group - 1; }
  KVLAPSE_DEVICE void load_query(const uint32_t* row, uint32_t (&query)[Traits::kSteps][2],
                                 float (&scale)[2]) const {
    constexpr int kSecond = Traits::kFp8 ? 1 : 4;
    KVLAPSE_UNROLL
    for (int i = 0; i < Traits::kSteps; ++i) query[i][0] = row[i * 8], query[i][1] = row[i * 8 + kSecond];
    scale[0] = scale[1] = 1;
    if constexpr (Traits::kFp8) {
      if (!args_.io_bf16) return;  // what the matrix unit takes
      float largest = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kSteps * 2; ++i) {
        float a, b;
        unpack2<Bf16>(query[i / 2][i % 2], a, b);
        largest = larger(larger(largest, magnitude(a)), magnitude(b));
      }
      for (int mask = 1; mask < 4; mask *= 2) largest = larger(largest, shuffle_xor(largest, mask));
      const uint32_t power = power_above(float_bits(largest));
      const float inverse = one_over_power(power);
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kSteps * 2; ++i) {
        float a, b;
        unpack2<Bf16>(query[i / 2][i % 2], a, b);
        query[i / 2][i % 2] = pack2<F16>(a * inverse, b * inverse);
      }
      const int t = lane_ % 4;
      scale[0] = shuffle_from(bits_float(power), 2 * t * 4);
      scale[1] = shuffle_from(bits_float(power), (2 * t + 1) * 4);
    }
  }

  // Returns whether the last round has no tile for this group.
  KVLAPSE_DEVICE bool attend_keys(int item, int turn, const ItemInfo& info, const Tiles& tiles,
                                  RingCursor& at, uint32_t query_at, bool has_new, NewRows& rows,
                                  Softmax& softmax) {
    const int g = lane_ / 4, t = lane_ % 4;
    uint32_t query[Traits::kSteps][2], offsets[Traits::kBoxLoads];
    float query_scale[2];
    load_query(static_cast<const uint32_t*>(args_.q) + query_at, query, query_scale);
    rows = load_new_rows(item, has_new);
    fragment_offsets((lane_ & 7) + ((lane_ >> 3) & 1) * 8, lane_ >> 4, offsets);
    const float scale[2] = {query_scale[0] * args_.logit_scale, query_scale[1] * args_.logit_scale};
    float sum[2] = {kEmptySum, kEmptySum};
    SmemAddress logits = logit_address(warp_, 0);
    const int half = own_half();
    bool waits = !Traits::kLeaveOneOut && turn > 0;
    int tile = tiles.begin + tile_group();
    KVLAPSE_NO_UNROLL
    for (; tile < tiles.end; tile += args_.n_groups) {
      mbarrier_wait(bar(small_.full[at.stage]), at.phase);
      const int first = tile * kTileSlots + half * kHalfSlots;
      if (half_of_slot(info.slot) == first) {
        if constexpr (Traits::kFp8) quantise(rows);
        write_row(at.stage, info.slot, item, rows.k, 0);
      }
      const SmemAddress data = half_of(at.stage, half);
      float even[2][4] = {}, odd[2][4] = {};
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kLoads; ++i) {
        KVLAPSE_UNROLL
        for (int block = 0; block < 2; ++block) {
          uint32_t r[4];
          load_matrix4(r, fragment_address(data, offsets, i, block));
          if constexpr (Traits::kFp8) {  // rows g and g + 8 of 16 dimensions, then of the next 16
            uint32_t a[4], b[4];
            widen_e4m3(r[0], a[0], a[2]);
            widen_e4m3(r[1], a[1], a[3]);
            multiply_add_16x8x16<Matrix>(even[block], a, query[2 * i][0], query[2 * i][1]);
            widen_e4m3(r[2], b[0], b[2]);
            widen_e4m3(r[3], b[1], b[3]);
            multiply_add_16x8x16<Matrix>(odd[block], b, query[2 * i + 1][0], query[2 * i + 1][1]);
          } else {
            multiply_add_16x8x16<Matrix>(i % 2 ? odd[block] : even[block], r, query[i][0], query[i][1]);
          }
        }
      }
      float slot_scale[4] = {1, 1, 1, 1};
      if constexpr (Traits::kFp8)
        for (int k = 0; k < 4; ++k)
          slot_scale[k] = smem_load(scale_address(at.stage, half * kHalfSlots + g + k * 8));
      release(at);

      float s[2][4];
      KVLAPSE_UNROLL
      for (int block = 0; block < 2; ++block) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 4; ++j) {
          s[block][j] = (even[block][j] + odd[block][j]) * scale[j % 2];
          if constexpr (Traits::kFp8) s[block][j] *= slot_scale[2 * block + j / 2];
        }
      }
      if (first + kHalfSlots > info.n) {
        KVLAPSE_UNROLL
        for (int block = 0; block < 2; ++block)
          for (int j = 0; j < 4; ++j)
            if (first + block * 16 + g + j / 2 * 8 >= info.n) s[block][j] = -kInfinity;
      }
      if (waits) {  // the item in front has left its sums here
        mbarrier_wait(bar(small_.drained_bar), static_cast<uint32_t>(turn - 1) & 1);
        waits = false;
      }
      if (t < half_group()) {
        smem_store4(logits, {s[0][0], s[0][1], s[0][2], s[0][3]});
        smem_store4(logits + pair_bytes(), {s[1][0], s[1][1], s[1][2], s[1][3]});
      }
      logits += 2 * pair_bytes();
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        if constexpr (Traits::kLeaveOneOut) {
          KVLAPSE_UNROLL
          for (int k = 0; k < 4; ++k) merge(softmax.max[j], sum[j], s[k / 2][j + k % 2 * 2], 0);
        } else {
          const float top =
              larger(larger(larger(s[0][j], s[0][j + 2]), larger(s[1][j], s[1][j + 2])), softmax.max[j]);
          sum[j] = sum[j] * exp2_approximate(softmax.max[j] - top) +
                   ((exp2_approximate(s[0][j] - top) + exp2_approximate(s[0][j + 2] - top)) +
                    (exp2_approximate(s[1][j] - top) + exp2_approximate(s[1][j + 2] - top)));
          softmax.max[j] = top;
        }
      }
      at.step(args_.n_groups, args_.n_stages);
    }
    softmax.inverse[0] = sum[0], softmax.inverse[1] = sum[1];  // sums until combine_softmax
    return pass_tile(tile - tile_group() < tiles.end, at);
  }

  // In: max and sum (in `inverse`) of this lane. Every warp's row goes to every split's own memory, with the
  // bytes of its barrier: nobody gathers first, and no wait is over the cluster.
  KVLAPSE_DEVICE void send_softmax(Softmax& softmax) {
    const int g = lane_ / 4;
    float(&m)[2] = softmax.max;
    float(&l)[2] = softmax.inverse;
    merge_lanes(m, l);
    const Float4 row{m[0], l[0], m[1], l[1]};
    if (clustered()) {
      if (thread_index() == 0)
        mbarrier_arrive_expect(bar(small_.softmax_bar), static_cast<uint32_t>(softmax_rows()) * kRowBytes);
      for (int to = g; to < args_.n_splits; to += 8)
        remote_store4(remote_address(softmax_address(rank_ * consumer_warps() + warp_), to), row,
                      remote_address(bar(small_.softmax_bar), to));
    } else if (g == 0) {
      smem_store4(softmax_address(warp_), row);
    }
    if (!Traits::kLeaveOneOut && lane_ % 4 >= half_group())
      m[0] = m[1] = kInfinity;  // so that every probability of theirs is zero
    warp_sync();                // they read logits of others
  }
  KVLAPSE_DEVICE int softmax_rows() const {
    return clustered() ? args_.n_splits * consumer_warps() : consumer_warps();
  }

  // Out: the whole row's max and sum. Behind the first product with V, which is relative to what the warp
  // knows itself: meanwhile the others' rows arrive.
  KVLAPSE_DEVICE void combine_softmax(int item, int turn, Softmax& softmax) {
    const int g = lane_ / 4, t = lane_ % 4;
    float m[2] = {softmax.max[0], softmax.max[1]}, l[2] = {softmax.inverse[0], softmax.inverse[1]};
    if (clustered())
      mbarrier_wait(bar(small_.softmax_bar), static_cast<uint32_t>(turn) & 1);
    else
      consumer_sync();
    if (Traits::kBulk || args_.n_splits == 1)
      merge_rows(m, l);
    else
      exchange_softmax_in_memory(item, m, l);
    // All have read of the item in front (choose_for_layer is behind one), or cleared.
    if (clustered() && (turn > 0 || Traits::kLeaveOneOut)) consumer_sync();
    if constexpr (Traits::kLeaveOneOut) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float rest = l[j];
        l[j] = 2 * t + j < args_.group && rest > kEmptySum ? 1 / (1 + rest) : 0;
        softmax.gain[j] = l[j] == 0 || rest >= 1 ? 1 : rest > kLeastRest ? -1 / rest : 0;
        softmax.max[j] = m[j], softmax.inverse[j] = l[j];
        if (warp_ == 0 && g == 0) {
          small_.inverse_sum[2 * t + j] = l[j];
          smem_store(rest_address(2 * t + j), rest);
        }
      }
    } else {
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        l[j] = 2 * t + j < args_.group && l[j] > 0 ? reciprocal_approximate(l[j]) : 0.0f;
        softmax.rescale[j] = t < half_group() ? exp2_approximate(softmax.max[j] - m[j]) : 0.0f;
        softmax.inverse[j] = l[j] * softmax.rescale[j];
      }
      if (warp_ == 0 && g == 0) small_.inverse_sum[2 * t] = l[0], small_.inverse_sum[2 * t + 1] = l[1];
    }
  }
  static constexpr uint32_t kRowBytes = kDecodeSoftmaxBytes;
  KVLAPSE_DEVICE void exchange_softmax_in_memory(int item, float (&m)[2], float (&l)[2]) {
    const int g = lane_ / 4, t = lane_ % 4;
    Float4* scratch =
        reinterpret_cast<Float4*>(args_.split_softmax) + static_cast<int64_t>(item) * kMaxDecodeSplits * 4;
    if (warp_ == 0) {
      merge_rows(m, l);
      if (g == 0) scratch[rank_ * 4 + t] = {m[0], l[0], m[1], l[1]};
      warp_sync();
      if (lane_ == 0) resident_barrier(args_.split_barrier + item, rank_, args_.n_splits);
    }
    consumer_sync();
    m[0] = m[1] = kNoMax, l[0] = l[1] = kEmptySum;
    for (int r = 0; r < args_.n_splits; ++r) {
      const Float4 row = load_shared_by_device(scratch + r * 4 + t);
      merge(m[0], l[0], row.x, row.y);
      merge(m[1], l[1], row.z, row.w);
    }
  }
  // Of what warps send, heads 2t and 2t + 1.
  KVLAPSE_DEVICE SmemAddress softmax_address(int row) const {
    return softmax_ + static_cast<uint32_t>(row) * kRowBytes + static_cast<uint32_t>(lane_ % 4 * 16);
  }

  // Over the lanes with the same heads; all of them end with the same bits.
  KVLAPSE_DEVICE static void merge_lanes(float (&m)[2], float (&l)[2]) {
    if constexpr (Traits::kLeaveOneOut) {
      KVLAPSE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float other_m = shuffle_xor(m[j], mask), other_l = shuffle_xor(l[j], mask);
          merge(m[j], l[j], other_m, other_l);
        }
      }
    } else {
      float top[2] = {m[0], m[1]};
      KVLAPSE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 2; ++j) top[j] = larger(top[j], shuffle_xor(top[j], mask));
      }
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) l[j] *= exp2_approximate(m[j] - top[j]), m[j] = top[j];
      KVLAPSE_UNROLL
      for (int mask = 4; mask < 32; mask *= 2) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 2; ++j) l[j] += shuffle_xor(l[j], mask);
      }
    }
  }
  // All rows of (max, sum), a lane reading every eighth, a batch at a time. Behind the last they are empty.
  KVLAPSE_DEVICE void merge_rows(float (&m)[2], float (&l)[2]) {
    constexpr int kAtOnce = kDecodeSoftmaxBatch / 8;
    m[0] = m[1] = kNoMax, l[0] = l[1] = kEmptySum;
    SmemAddress row = softmax_address(lane_ / 4);
    KVLAPSE_NO_UNROLL
    for (int first = 0; first < softmax_rows(); first += kDecodeSoftmaxBatch) {
      Float4 rows[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u, row += 8 * kRowBytes) rows[u] = smem_load4(row);
      if constexpr (Traits::kLeaveOneOut) {
        KVLAPSE_UNROLL
        for (const Float4& v : rows) merge(m[0], l[0], v.x, v.y), merge(m[1], l[1], v.z, v.w);
      } else {
        float top[2] = {m[0], m[1]};
        KVLAPSE_UNROLL
        for (const Float4& v : rows) top[0] = larger(top[0], v.x), top[1] = larger(top[1], v.z);
        KVLAPSE_UNROLL
        for (int j = 0; j < 2; ++j) l[j] *= exp2_approximate(m[j] - top[j]), m[j] = top[j];
        KVLAPSE_UNROLL
        for (const Float4& v : rows)
          l[0] += v.y * exp2_approximate(v.x - m[0]), l[1] += v.w * exp2_approximate(v.z - m[1]);
      }
    }
    merge_lanes(m, l);
    if constexpr (Traits::kLeaveOneOut) {  // whose sums are not symmetric
      const int first_lane = lane_ % 4;
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j)
        m[j] = shuffle_from(m[j], first_lane), l[j] = shuffle_from(l[j], first_lane);
    }
  }

  // What a lane needs of its slot of a half tile (lane (g, t) owns slot g + 8t) beyond K and V, loaded two
  // visits ahead: memory answers later than a half is done. protect: bits of all 32 slots.
  struct SlotSide {
    float norm = 1, accumulated = 0;
    uint32_t protect = 0;
  };
  KVLAPSE_DEVICE int own_slot() const { return lane_ / 4 + lane_ % 4 * 8; }
  // Where they lie: this lane's slot of the item's first half, and protection bits from there on.
  struct SideRows {
    uint32_t slot, protect;
    KVLAPSE_DEVICE uint32_t slot_at(int first) const { return slot + static_cast<uint32_t>(first); }
    KVLAPSE_DEVICE uint32_t protect_at(int first) const {
      return protect + (static_cast<uint32_t>(first) >> 4);
    }
  };
  KVLAPSE_DEVICE SideRows side_rows(int item) const {
    return {slot_index(item, own_slot()), protect_index(item, 0)};
  }
  // first: of the half; end: of this split's valid slots, none where nothing is scored.
  KVLAPSE_DEVICE SlotSide load_side(const SideRows& rows, int first, int end) const {
    SlotSide side;
    const bool valid = first + own_slot() < end;
    if (valid) side.protect = load_bits(args_.protect + rows.protect_at(first));
    if (valid && score_uses_norm(args_.score)) side.norm = args_.value_l1[rows.slot_at(first)];
    if (valid && score_accumulates(args_.score)) side.accumulated = args_.accumulated[rows.slot_at(first)];
    return side;
  }
  KVLAPSE_DEVICE int scored_end(const ItemInfo& info, const Tiles& tiles) const {
    const int end = tiles.end * kTileSlots;
    return args_.score == FusedScore::none ? 0 : end < info.n ? end : info.n;
  }

  // combine() sets softmax to what all slots say, as combine_softmax does; once, behind the first tile.
  template <class Combine>
  KVLAPSE_DEVICE uint64_t attend_values(int item, const ItemInfo& info, const Tiles& tiles, RingCursor& at,
                                        const Float4& new_row, float new_norm, const Softmax& softmax,
                                        const Combine& combine, SlotSide (&sides)[2],
                                        float (&output)[Traits::kSteps][4]) {
    const int g = lane_ / 4, t = lane_ % 4;
    const bool scores = !Traits::kLeaveOneOut && args_.score != FusedScore::none;
    uint32_t offsets[Traits::kBoxLoads];
    fragment_offsets((lane_ & 7) + (lane_ >> 4) * 8, (lane_ >> 3) & 1, offsets);
    uint32_t best = kNoScore, best_slot = ~uint32_t{0};
    const SideRows lie = side_rows(item);
    const int end = scored_end(info, tiles), ahead = 2 * args_.n_groups * kTileSlots;
    uint32_t top = 0;  // fp8: power of two above the scales that this warp has met, as bits
    SmemAddress logits = logit_address(warp_, 0);
    const int half = own_half();
    bool waits = !Traits::kLeaveOneOut;  // for softmax of all slots
    KVLAPSE_NO_UNROLL
    for (int pair = tiles.begin + tile_group(); pair < tiles.end; pair += 2 * args_.n_groups) {
      KVLAPSE_UNROLL
      for (int visit = 0; visit < 2; ++visit) {  // so that sides[] are registers that nobody copies
        const int tile = pair + visit * args_.n_groups;
        if (tile >= tiles.end) break;
        const int first = tile * kTileSlots + half * kHalfSlots;
        float p[2][4];
        bool heaviest[2][4];  // leave one out: outweighs the head's others
        KVLAPSE_UNROLL
        for (int block = 0; block < 2; ++block) {
          const Float4 s = smem_load4(logits + static_cast<uint32_t>(block) * pair_bytes());
          const float l[4] = {s.x, s.y, s.z, s.w};
          KVLAPSE_UNROLL
          for (int j = 0; j < 4; ++j) {
            p[block][j] = exp2_approximate(l[j] - softmax.max[j % 2]);
            heaviest[block][j] = false;
            if constexpr (Traits::kLeaveOneOut) {
              const float gain = softmax.gain[j % 2];
              heaviest[block][j] = gain <= 0 && l[j] == softmax.max[j % 2];
              p[block][j] =
                  heaviest[block][j] || t >= half_group() ? 0 : p[block][j] * (gain < 0 ? -gain : gain);
            }
          }
        }
        logits += 2 * pair_bytes();
        uint32_t b[2][2], c[2][2];  // c: what rounding b took away
        const auto pack = [&](int block, float low, float high) {
          b[block][0] = transpose_matrix(pack2<Matrix>(p[block][0] * low, p[block][1] * low));
          b[block][1] = transpose_matrix(pack2<Matrix>(p[block][2] * high, p[block][3] * high));
          if constexpr (Traits::kLeaveOneOut) {
            c[block][0] = transpose_matrix(pack_rest(p[block][0] * low, p[block][1] * low));
            c[block][1] = transpose_matrix(pack_rest(p[block][2] * high, p[block][3] * high));
          }
        };
        if constexpr (!Traits::kFp8) pack(0, 1, 1), pack(1, 1, 1);

        // One test where there is nothing special about a half.
        const bool has_new = half_of_slot(info.slot) == first, is_cut = first + kHalfSlots > info.n;
        if (has_new || is_cut || half_of_slot(info.expired) == first) {
          if (has_new && own_slot() == info.slot % kHalfSlots)
            sides[visit].norm = new_norm, sides[visit].accumulated = 0;
          if (scores) update_protection(lie, info, first, sides[visit]);
          mbarrier_wait(bar(small_.full[at.stage]), at.phase);
          if (has_new) write_row(at.stage, info.slot, item, new_row, 1);
          if (is_cut) clear_rows(at.stage, half, info.n - first);
        }
        const auto score = [&] {
          float w[4];
          KVLAPSE_UNROLL
          for (int k = 0; k < 4; ++k)
            w[k] = p[k / 2][k % 2 * 2] * softmax.inverse[0] + p[k / 2][k % 2 * 2 + 1] * softmax.inverse[1];
          const uint32_t bits = score_half(lie, info, first, w, sides[visit]);
          if (bits < best) best = bits, best_slot = static_cast<uint32_t>(first + own_slot());
          sides[visit] = load_side(lie, first + ahead, end);
        };
        // While the matrix unit is busy, or where bytes are widened then while V is on its way (1 %, H200).
        constexpr bool kScoresFirst = Traits::kFp8;
        const bool is_first = visit == 0 && waits;
        if (scores && kScoresFirst && !is_first) score();
        mbarrier_wait(bar(small_.full[at.stage]), at.phase);
        const SmemAddress data = half_of(at.stage, half);
        if constexpr (Traits::kFp8) {
          float scale[4], largest = 0;
          KVLAPSE_UNROLL
          for (int k = 0; k < 4; ++k) {
            scale[k] = smem_load(scale_address(at.stage, half * kHalfSlots + g + k * 8));
            largest = larger(largest, scale[k]);
          }
          if (warp_ballot(float_bits(largest) > top) != 0) {
            const uint32_t above = power_above(warp_largest(float_bits(largest)));
            const float rescale = bits_float(top) * one_over_power(above);
            KVLAPSE_UNROLL
            for (int i = 0; i < Traits::kSteps; ++i)
              for (int j = 0; j < 4; ++j) output[i][j] *= rescale;
            top = above;
          }
          const float inverse = one_over_power(top);
          pack(0, scale[0] * inverse, scale[1] * inverse);
          pack(1, scale[2] * inverse, scale[3] * inverse);
        }
        if constexpr (Traits::kLeaveOneOut) {
          keep_heaviest(at.stage, half * kHalfSlots, heaviest[0]);
          keep_heaviest(at.stage, half * kHalfSlots + 16, heaviest[1]);
        }
        if (is_first) {
          add_values(data, offsets, b, c, output);
          release(at);
          combine();
          waits = false;
          if (scores) score();
        } else {
          add_values(data, offsets, b, c, output);
          if (scores && !kScoresFirst) score();  // in one block of code without a branch
          release(at);
        }
        at.step(args_.n_groups, args_.n_stages);
      }
    }
    if (waits) combine();  // there was no tile
    if constexpr (Traits::kFp8) {
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kSteps; ++i)
        for (int j = 0; j < 4; ++j) output[i][j] *= bits_float(top);
    }
    return (static_cast<uint64_t>(best) << 32) | best_slot;
  }
  // V^T of 32 slots times b, and what is left of it.
  KVLAPSE_DEVICE static void add_values(SmemAddress data, const uint32_t (&offsets)[Traits::kBoxLoads],
                                        const uint32_t (&b)[2][2], const uint32_t (&c)[2][2],
                                        float (&output)[Traits::kSteps][4]) {
    KVLAPSE_UNROLL
    for (int block = 0; block < 2; ++block) {
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kLoads; ++i) {
        uint32_t r[4];
        load_matrix4_transposed(r, fragment_address(data, offsets, i, block));
        const auto add = [&](int step, const uint32_t(&a)[4]) {
          multiply_add_16x8x16<Matrix>(output[step], a, b[block][0], b[block][1]);
          if constexpr (Traits::kLeaveOneOut)
            multiply_add_16x8x16<Matrix>(output[step], a, c[block][0], c[block][1]);
        };
        if constexpr (Traits::kFp8) {  // pairs of dimensions of slots 2t, 2t + 1; of 16 dimensions, of the
                                       // next
          uint32_t low[4], high[4];
          widen_e4m3_apart(r[0], low[0], low[1]);
          widen_e4m3_apart(r[2], low[2], low[3]);
          add(2 * i, low);
          widen_e4m3_apart(r[1], high[0], high[1]);
          widen_e4m3_apart(r[3], high[2], high[3]);
          add(2 * i + 1, high);
        } else {
          add(i, r);
        }
      }
    }
  }
  // What is left of two numbers once they are rounded to the matrix type.
  KVLAPSE_DEVICE static uint32_t pack_rest(float low, float high) {
    float a, b;
    unpack2<Matrix>(pack2<Matrix>(low, high), a, b);
    return pack2<Matrix>(low - a, high - b);
  }

  // Dimension of an output that a lane holds.
  KVLAPSE_DEVICE static int output_dim(int step, int row, int second) {
    return Traits::kFp8 ? step * 16 + row * 2 + second : step * 16 + row + second * 8;
  }

  // Rows and scales past the last valid slot may hold anything; 0 * NaN must not reach the sum.
  KVLAPSE_DEVICE void clear_rows(int stage, int half, int n_valid) {
    const SmemAddress data = ring_ + static_cast<uint32_t>(stage * Traits::kTileBytes);
    const int from = n_valid < 0 ? 0 : n_valid;
    KVLAPSE_NO_UNROLL
    for (int i = lane_; i < (kHalfSlots - from) * Traits::kRowChunks; i += 32)
      smem_store4(
          data + chunk_offset(half * kHalfSlots + from + i / Traits::kRowChunks, i % Traits::kRowChunks),
          {0, 0, 0, 0});
    if constexpr (Traits::kFp8)
      if (lane_ >= from) smem_store(scale_address(stage, half * kHalfSlots + lane_), 0);
    fence_proxy_async();
    warp_sync();
  }

  // By the warp that holds the new slot, all lanes, while others' softmax is on its way: its position and
  // norm.
  KVLAPSE_DEVICE float note_new_token(int item, const ItemInfo& info, const Float4& row) {
    float norm = 1;
    if (score_uses_norm(args_.score)) {
      const float words[4] = {row.x, row.y, row.z, row.w};
      norm = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < (Traits::kFp8 ? 2 : 4); ++i) {
        uint32_t pairs[2] = {float_bits(words[i]), 0};
        if constexpr (Traits::kFp8) widen_e4m3(float_bits(words[i]), pairs[0], pairs[1]);
        KVLAPSE_UNROLL
        for (int pair = 0; pair < (Traits::kFp8 ? 2 : 1); ++pair) {
          float low, high;
          unpack2<Matrix>(pairs[pair], low, high);
          norm += magnitude(low) + magnitude(high);
        }
      }
      for (int mask = 16; mask > 0; mask >>= 1) norm += shuffle_xor(norm, mask);
      if constexpr (Traits::kFp8) norm *= shuffle_from(row.z, 0);
    }
    if (lane_ == 0) {
      if (score_uses_norm(args_.score)) args_.value_l1[slot_index(item, info.slot)] = norm;
      if (args_.positions != nullptr) args_.positions[slot_index(item, info.slot)] = info.pos;
    }
    return norm;
  }

  static constexpr uint32_t kNoScore = ~uint32_t{0};
  // All lanes. w: of slots g + 8k of a half tile, summed over this lane's heads. Bits of the score of the
  // slot that this lane owns, kNoScore when it may not be taken.
  KVLAPSE_DEVICE uint32_t score_half(const SideRows& rows, const ItemInfo& info, int first,
                                     const float (&w)[4], const SlotSide& side) {
    const int t = lane_ % 4;
    // Lanes of a quad exchange halves, so that each ends with the sum of one slot.
    const bool upper = (t & 2) != 0, odd = (t & 1) != 0;
    const float a = (upper ? w[2] : w[0]) + shuffle_xor(upper ? w[0] : w[2], 2);
    const float b = (upper ? w[3] : w[1]) + shuffle_xor(upper ? w[1] : w[3], 2);
    float score = (odd ? b : a) + shuffle_xor(odd ? a : b, 1);
    const bool valid = first + own_slot() < info.n;
    score += side.accumulated;
    if (score_accumulates(args_.score) && valid) args_.accumulated[rows.slot_at(first)] = score;
    score *= side.norm * args_.score_scale;
    if (args_.importance != nullptr && valid) args_.importance[rows.slot_at(first)] = score;
    return valid && ((side.protect >> own_slot()) & 1u) == 0 ? float_bits(score) : kNoScore;
  }

  // Bits of 32 slots after this step: the new token's set when it is protected, cleared when it is not (it
  // may take the slot of an unprotected victim only, so clear already), the expired one's cleared.
  KVLAPSE_DEVICE void update_protection(const SideRows& rows, const ItemInfo& info, int first,
                                        SlotSide& side) {
    const bool has_new = half_of_slot(info.slot) == first, removes = half_of_slot(info.expired) == first;
    if (!has_new && !removes) return;
    const bool adds = has_new && (args_.recent.divisor > 0 || info.pos < args_.pinned);
    if (removes) side.protect &= ~(1u << (info.expired - first));
    if (adds) side.protect |= 1u << (info.slot - first);
    if (lane_ == 0 && (adds || removes)) store_bits(args_.protect + rows.protect_at(first), side.protect);
  }

  // ---- end of an item ----
  KVLAPSE_DEVICE void finish(int item, int turn, const ItemInfo& info, uint64_t key,
                             const float (&output)[Traits::kSteps][4], const float (&rescale)[2]) {
    if (clustered() && thread_index() == 0)
      mbarrier_arrive_expect(bar(small_.output_bar),
                             static_cast<uint32_t>(args_.n_splits * own_chunks() * 16));
    store_partial(output, rescale);  // over the warp's own logits
    key = warp_min(key);
    if (lane_ == 0) small_.keys[warp_] = key;
    consumer_sync();                 // global scores are written
    if (clustered()) send_output();  // first: others wait for it
    keep_state(item, turn, info);
    if (args_.n_splits == 1)
      write_output(item);
    else if (clustered())
      receive_output(item, turn);
    else
      exchange_output_in_memory(item);
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.drained_bar));
  }

  // By one warp, behind a barrier: what this CTA leaves for the next step. Others go on meanwhile.
  KVLAPSE_DEVICE void keep_state(int item, int turn, const ItemInfo& info) {
    if (warp_ != keeper(turn)) return;
    const bool chooses = args_.score != FusedScore::none && info.pos >= 0;
    if (chooses && !shared()) {
      const uint64_t key = warp_min(lane_ < consumer_warps() ? small_.keys[lane_] : ~uint64_t{0});
      if (lane_ == 0) args_.victim_keys[item * kMaxDecodeSplits + rank_] = key;
    }
    if (lane_ == 0) {
      if (rank_ == 0) note_item(item, info);
      if (chooses && shared()) small_.last_arrival = arrive_at_layer(item);
    }
    warp_sync();
  }

  // State that all splits have read by now. A sequence that is skipped keeps its own.
  KVLAPSE_DEVICE void note_item(int item, const ItemInfo& info) {
    if (info.slot < 0) return;
    if (args_.recent.divisor > 0) args_.recent_slots[recent_index(item, info.pos)] = info.slot;
    if (args_.count != nullptr) args_.count[item] = info.n;
  }

  // [head][D + pad] fp32 over each warp's logits; behind all of them where they are needed again.
  KVLAPSE_DEVICE SmemAddress partial_address(int warp, int head, int d) const {
    if constexpr (Traits::kLeaveOneOut)
      return logits_ +
             static_cast<uint32_t>(args_.partial_offset +
                                   ((warp * args_.group + head) * (Traits::kHeadDim + kOutputPad) + d) * 4);
    else
      return logits_ + static_cast<uint32_t>(warp * args_.warp_bytes +
                                             (head * (Traits::kHeadDim + kOutputPad) + d) * 4);
  }
  KVLAPSE_DEVICE uint32_t partial_stride() const {
    return Traits::kLeaveOneOut ? static_cast<uint32_t>(args_.group * (Traits::kHeadDim + kOutputPad) * 4)
                                : static_cast<uint32_t>(args_.warp_bytes);
  }
  KVLAPSE_DEVICE void store_partial(const float (&output)[Traits::kSteps][4], const float (&rescale)[2]) {
    const int g = lane_ / 4, t = lane_ % 4;
    KVLAPSE_UNROLL
    for (int j = 0; j < 2; ++j) {
      if (2 * t + j >= args_.group) break;
      const SmemAddress to = partial_address(warp_, 2 * t + j, output_dim(0, g, 0));
      KVLAPSE_UNROLL
      for (int i = 0; i < Traits::kSteps; ++i) {
        KVLAPSE_UNROLL
        for (int second = 0; second < 2; ++second)
          smem_store(to + static_cast<uint32_t>(output_dim(i, 0, second) * 4),
                     output[i][2 * second + j] * rescale[j]);
      }
    }
  }
  static constexpr int kHeadChunks = Traits::kHeadDim / 4;  // four floats
  KVLAPSE_DEVICE int n_chunks() const { return args_.group * kHeadChunks; }
  KVLAPSE_DEVICE int owner_of(int chunk) const {
    return chunk * args_.owners.scale >> OutputOwners::kScaleBits;
  }
  KVLAPSE_DEVICE int first_own_chunk() const { return args_.owners.first[rank_]; }
  KVLAPSE_DEVICE int end_own_chunks() const { return args_.owners.first[rank_ + 1]; }
  KVLAPSE_DEVICE int own_chunks() const { return end_own_chunks() - first_own_chunk(); }
  // What splits send of a chunk to its owner, which sums in the order of splits.
  KVLAPSE_DEVICE SmemAddress received_address(int from, int chunk, int owner) const {
    return received_ + static_cast<uint32_t>(from) * received_stride() +
           static_cast<uint32_t>((chunk - args_.owners.first[owner]) * kReceivedBytes);
  }
  KVLAPSE_DEVICE uint32_t received_stride() const {
    return static_cast<uint32_t>(args_.owners.most * kReceivedBytes);
  }
  static constexpr int kReceivedBytes = Traits::kLeaveOneOut ? 32 : 16;

  KVLAPSE_DEVICE Float4 sum_of_warps(int chunk) const {
    return sum_in_order(partial_address(0, chunk / kHeadChunks, chunk % kHeadChunks * 4), partial_stride(),
                        consumer_warps());
  }
  // Of n times four numbers; four loads are in flight before the first is added.
  KVLAPSE_DEVICE static Float4 sum_in_order(SmemAddress at, uint32_t stride, int n) {
    Float4 total{0, 0, 0, 0};
    KVLAPSE_NO_UNROLL
    for (int first = 0; first < n; first += 4) {
      Float4 part[4];
      KVLAPSE_UNROLL
      for (int u = 0; u < 4; ++u, at += stride) part[u] = first + u < n ? smem_load4(at) : Float4{0, 0, 0, 0};
      KVLAPSE_UNROLL
      for (int u = 0; u < 4; ++u) add(total, part[u]);
    }
    return total;
  }
  KVLAPSE_DEVICE static void add(Float4& a, const Float4& b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  }
  KVLAPSE_DEVICE void store_output(int item, int chunk, const Float4& v) {
    const float scale = small_.inverse_sum[chunk / kHeadChunks];
    store_output(item, chunk, v, scale);
  }
  KVLAPSE_DEVICE void store_output(int item, int chunk, const Float4& v, float scale) {
    static_cast<uint64_t*>(args_.out)[static_cast<uint32_t>(item * n_chunks() + chunk)] =
        static_cast<uint64_t>(pack_io(v.z * scale, v.w * scale)) << 32 | pack_io(v.x * scale, v.y * scale);
  }

  KVLAPSE_DEVICE void write_output(int item) {
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_)
      store_output(item, chunk, sum_of_warps(chunk));
  }
  KVLAPSE_DEVICE void send_output() {
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_) {
      const int owner = owner_of(chunk);
      remote_store4(remote_address(received_address(rank_, chunk, owner), owner), sum_of_warps(chunk),
                    remote_address(bar(small_.output_bar), owner));
    }
  }
  KVLAPSE_DEVICE void receive_output(int item, int turn) {
    mbarrier_wait(bar(small_.output_bar), static_cast<uint32_t>(turn) & 1);
    for (int chunk = first_own_chunk() + thread_index(); chunk < end_own_chunks(); chunk += n_threads_)
      store_output(item, chunk,
                   sum_in_order(received_address(0, chunk, rank_), received_stride(), args_.n_splits));
  }
  KVLAPSE_DEVICE void exchange_output_in_memory(int item) {
    Float4* scratch = reinterpret_cast<Float4*>(args_.split_output) +
                      static_cast<int64_t>(item) * args_.n_splits * n_chunks();
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_)
      scratch[rank_ * n_chunks() + chunk] = sum_of_warps(chunk);
    consumer_sync();
    if (thread_index() == 0) resident_barrier(args_.split_barrier + item, rank_, args_.n_splits);
    consumer_sync();
    for (int chunk = first_own_chunk() + thread_index(); chunk < end_own_chunks(); chunk += n_threads_) {
      Float4 total{0, 0, 0, 0};
      for (int r = 0; r < args_.n_splits; ++r)
        add(total, load_shared_by_device(scratch + r * n_chunks() + chunk));
      store_output(item, chunk, total);
    }
  }

  // ---- leave one out ----
  // Behind the warps' partial sums, all [head][D + pad] fp32: V of the slots that outweigh a head's others
  // (zero in heads without one, and in splits that do not hold it); the whole output; the mean of the others
  // less that V. Then the sums without the largest, of 8 heads.
  KVLAPSE_DEVICE SmemAddress heaviest_address(int head, int d) const {
    return partial_address(consumer_warps(), head, d);
  }
  KVLAPSE_DEVICE SmemAddress whole_address(int head, int d) const {
    return partial_address(consumer_warps() + 1, head, d);
  }
  KVLAPSE_DEVICE SmemAddress left_address(int head, int d) const {
    return partial_address(consumer_warps() + 2, head, d);
  }
  KVLAPSE_DEVICE SmemAddress rest_address(int head) const {
    return partial_address(consumer_warps() + 3, 0, head);
  }

  KVLAPSE_DEVICE void clear_heaviest() {
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_)
      smem_store4(heaviest_address(chunk / kHeadChunks, chunk % kHeadChunks * 4), {0, 0, 0, 0});
  }

  // 16 bytes of a row as numbers, in order: 8 of 16 bits or 16 of fp8.
  static constexpr int kChunkValues = Traits::kFp8 ? 16 : 8;
  KVLAPSE_DEVICE static void unpack_chunk(const Float4& chunk, float (&values)[kChunkValues]) {
    const float words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (Traits::kFp8) {
        uint32_t low, high;
        widen_e4m3(float_bits(words[i]), low, high);
        unpack2<Matrix>(low, values[4 * i], values[4 * i + 1]);
        unpack2<Matrix>(high, values[4 * i + 2], values[4 * i + 3]);
      } else {
        unpack2<Matrix>(float_bits(words[i]), values[2 * i], values[2 * i + 1]);
      }
    }
  }

  // All lanes. flags: of rows g, g + 8 behind the first and heads 2t, 2t + 1.
  KVLAPSE_DEVICE void keep_heaviest(int stage, int first_row, const bool (&flags)[4]) {
    if (warp_ballot(flags[0] || flags[1] || flags[2] || flags[3]) == 0) return;
    const SmemAddress data = ring_ + static_cast<uint32_t>(stage * Traits::kTileBytes);
    KVLAPSE_NO_UNROLL
    for (int j = 0; j < 4; ++j) {
      uint32_t found = warp_ballot(j < 2 ? (j == 0 ? flags[0] : flags[1]) : (j == 2 ? flags[2] : flags[3]));
      for (int lane = 0; found != 0; ++lane, found >>= 1) {
        if ((found & 1u) == 0) continue;
        const int row = first_row + lane / 4 + j / 2 * 8, head = lane % 4 * 2 + j % 2;
        float scale = 1;
        if constexpr (Traits::kFp8) scale = smem_load(scale_address(stage, row));
        if (lane_ >= Traits::kRowChunks) continue;
        float values[kChunkValues];
        unpack_chunk(smem_load4(data + chunk_offset(row, lane_)), values);
        KVLAPSE_UNROLL
        for (int i = 0; i < kChunkValues; i += 4)
          smem_store4(
              heaviest_address(head, lane_ * kChunkValues + i),
              {values[i] * scale, values[i + 1] * scale, values[i + 2] * scale, values[i + 3] * scale});
      }
    }
  }

  // Four dimensions of a head once they are summed over everything: output, and mean of the others less V of
  // the slot that outweighs them.
  struct Left {
    Float4 output, difference;
  };
  KVLAPSE_DEVICE Left left_of(int chunk, const Float4& others, const Float4& heaviest) const {
    const int head = chunk / kHeadChunks;
    const float inverse = small_.inverse_sum[head], rest = smem_load(rest_address(head));
    if (rest >= 1)
      return {{others.x * inverse, others.y * inverse, others.z * inverse, others.w * inverse}, {0, 0, 0, 0}};
    return {{(others.x * rest + heaviest.x) * inverse, (others.y * rest + heaviest.y) * inverse,
             (others.z * rest + heaviest.z) * inverse, (others.w * rest + heaviest.w) * inverse},
            {others.x - heaviest.x, others.y - heaviest.y, others.z - heaviest.z, others.w - heaviest.w}};
  }
  KVLAPSE_DEVICE Float4 heaviest_of(int chunk) const {
    return smem_load4(heaviest_address(chunk / kHeadChunks, chunk % kHeadChunks * 4));
  }
  KVLAPSE_DEVICE void keep_left(int chunk, const Left& left) {
    const int head = chunk / kHeadChunks, d = chunk % kHeadChunks * 4;
    smem_store4(whole_address(head, d), left.output);
    smem_store4(left_address(head, d), left.difference);
  }

  // The output of every head and what belongs to it, in every split's shared memory; each chunk is summed in
  // the same order wherever that is done, and written by its owner.
  KVLAPSE_DEVICE void combine_output(int item, int turn, const float (&output)[Traits::kSteps][4]) {
    if (clustered() && thread_index() == 0) {
      const uint32_t own = static_cast<uint32_t>(own_chunks()) * 32;
      mbarrier_arrive_expect(bar(small_.output_bar), static_cast<uint32_t>(args_.n_splits) * own);
      mbarrier_arrive_expect(bar(small_.gather_bar), static_cast<uint32_t>(n_chunks()) * 32 - own);
    }
    store_partial(output, {1, 1});
    consumer_sync();
    if (args_.n_splits == 1) {
      for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_) {
        const Left left = left_of(chunk, sum_of_warps(chunk), heaviest_of(chunk));
        keep_left(chunk, left);
        store_output(item, chunk, left.output, 1);
      }
    } else if (clustered()) {
      combine_output_in_cluster(item, turn);
    } else {
      combine_output_in_memory(item);
    }
    consumer_sync();
  }
  KVLAPSE_DEVICE void combine_output_in_cluster(int item, int turn) {
    const auto send = [&](SmemAddress to, const Float4& v, const uint64_t& barrier, int rank) {
      remote_store4(remote_address(to, rank), v, remote_address(bar(barrier), rank));
    };
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_) {
      const int owner = owner_of(chunk);
      const SmemAddress to = received_address(rank_, chunk, owner);
      send(to, sum_of_warps(chunk), small_.output_bar, owner);
      send(to + 16, heaviest_of(chunk), small_.output_bar, owner);
    }
    mbarrier_wait(bar(small_.output_bar), static_cast<uint32_t>(turn) & 1);
    for (int chunk = first_own_chunk() + thread_index(); chunk < end_own_chunks(); chunk += n_threads_) {
      const SmemAddress from = received_address(0, chunk, rank_);
      const Float4 others = sum_in_order(from, received_stride(), args_.n_splits);
      const Float4 heaviest = sum_in_order(from + 16, received_stride(), args_.n_splits);
      const Left left = left_of(chunk, others, heaviest);
      keep_left(chunk, left);
      const int head = chunk / kHeadChunks, d = chunk % kHeadChunks * 4;
      for (int r = 0; r < args_.n_splits; ++r) {
        if (r == rank_) continue;
        send(whole_address(head, d), left.output, small_.gather_bar, r);
        send(left_address(head, d), left.difference, small_.gather_bar, r);
      }
      store_output(item, chunk, left.output, 1);
    }
    mbarrier_wait(bar(small_.gather_bar), static_cast<uint32_t>(turn) & 1);
  }
  KVLAPSE_DEVICE void combine_output_in_memory(int item) {
    Float4* scratch = reinterpret_cast<Float4*>(args_.split_output) +
                      static_cast<int64_t>(item) * args_.n_splits * n_chunks() * 2;
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_) {
      scratch[(rank_ * n_chunks() + chunk) * 2] = sum_of_warps(chunk);
      scratch[(rank_ * n_chunks() + chunk) * 2 + 1] = heaviest_of(chunk);
    }
    consumer_sync();
    if (thread_index() == 0) resident_barrier(args_.split_barrier + item, rank_, args_.n_splits);
    consumer_sync();
    for (int chunk = thread_index(); chunk < n_chunks(); chunk += n_threads_) {
      Float4 others{0, 0, 0, 0}, heaviest{0, 0, 0, 0};
      for (int r = 0; r < args_.n_splits; ++r) {
        add(others, load_shared_by_device(scratch + (r * n_chunks() + chunk) * 2));
        add(heaviest, load_shared_by_device(scratch + (r * n_chunks() + chunk) * 2 + 1));
      }
      const Left left = left_of(chunk, others, heaviest);
      keep_left(chunk, left);
      if (owner_of(chunk) == rank_) store_output(item, chunk, left.output, 1);
    }
  }

  // O^T as the second operand, as load_query holds Q^T, but in shared memory, over the partial sums: lane
  // (g, t) has head g. Every number is the sum of two parts, relative to a power of two that comes back for
  // this lane's columns, with |o|^2, heads 2t and 2t + 1.
  struct OutputScale {
    float scale[2], square[2];
  };
  KVLAPSE_DEVICE SmemAddress operand_address(int step, int head) const {
    return partial_address(0, 0, 0) +
           static_cast<uint32_t>(((step * args_.group + head) * 4 + lane_ % 4) * 16);
  }
  KVLAPSE_DEVICE OutputScale prepare_operand() {
    const int t = lane_ % 4, head = own_head();
    constexpr int kLane = Traits::kFp8 ? 4 : 2, kSecond = Traits::kFp8 ? 2 : 8;
    const auto value = [&](int step, int second, int which) {
      return smem_load(whole_address(head, step * 16 + t * kLane + second * kSecond + which));
    };
    float largest = 0, square = 0;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < Traits::kSteps; ++i) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 4; ++j) {
        const float v = value(i, j / 2, j % 2), size = v < 0 ? -v : v;
        largest = size > largest ? size : largest;
        square += v * v;
      }
    }
    for (int mask = 1; mask < 4; mask *= 2) {
      const float other = shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
      square += shuffle_xor(square, mask);
    }
    const uint32_t power = power_above(float_bits(largest));
    const float inverse = power == 0 ? 0 : one_over_power(power);
    KVLAPSE_NO_UNROLL
    for (int i = warp_; i < Traits::kSteps; i += consumer_warps()) {
      float parts[4];  // of the first two numbers, of the others; what is left of them
      KVLAPSE_UNROLL
      for (int second = 0; second < 2; ++second) {
        const float low = value(i, second, 0) * inverse, high = value(i, second, 1) * inverse;
        parts[second] = bits_float(pack2<Matrix>(low, high));
        parts[second + 2] = bits_float(pack_rest(low, high));
      }
      if (lane_ / 4 < args_.group)
        smem_store4(operand_address(i, head), {parts[0], parts[1], parts[2], parts[3]});
    }
    OutputScale o;
    KVLAPSE_UNROLL
    for (int j = 0; j < 2; ++j) {
      o.scale[j] = shuffle_from(bits_float(power), (2 * t + j) * 4);
      o.square[j] = shuffle_from(square, (2 * t + j) * 4);
    }
    consumer_sync();
    return o;
  }
  // V of slots g and g + 8 at the four dimensions of a step that a lane holds, as prepare_operand orders
  // them.
  KVLAPSE_DEVICE static void unpack_rows(const uint32_t (&a)[4], float (&low)[4], float (&high)[4]) {
    unpack2<Matrix>(a[0], low[0], low[1]);
    unpack2<Matrix>(a[2], low[2], low[3]);
    unpack2<Matrix>(a[1], high[0], high[1]);
    unpack2<Matrix>(a[3], high[2], high[3]);
  }
  // Step i of 16 rows as the first operand; of fp8 an even step's load serves the odd one behind it.
  KVLAPSE_DEVICE void load_rows(SmemAddress data, int row, int i, uint32_t (&loaded)[4],
                                uint32_t (&a)[4]) const {
    if constexpr (Traits::kFp8) {
      if (i % 2 == 0) load_matrix4(loaded, data + chunk_offset(row, i + (lane_ >> 4)));
      widen_e4m3(loaded[i % 2 * 2], a[0], a[2]);
      widen_e4m3(loaded[i % 2 * 2 + 1], a[1], a[3]);
    } else {
      load_matrix4(a, data + chunk_offset(row, 2 * i + (lane_ >> 4)));
    }
  }

  // The third pass: every slot's error. Tiles come last first.
  KVLAPSE_DEVICE uint64_t measure_values(int item, const ItemInfo& info, const Tiles& tiles, RingCursor& at,
                                         const float (&max)[2]) {
    const int group = tile_group(), t = lane_ % 4;
    NewRows rows = load_new_rows(item, takes(tiles, info.slot, true));
    const SideRows lie = side_rows(item);
    const int end = scored_end(info, tiles);
    const auto side_of = [&](int tile, int half) {
      return load_side(lie, tile < tiles.begin ? end : tile * kTileSlots + half * kHalfSlots, end);
    };
    const int half = own_half();
    SlotSide side = side_of(tiles.end - 1 - group, half);
    const OutputScale o = prepare_operand();
    float inverse[2],
        heaviest[2];  // heaviest: error of leaving out the slot that outweighs the others, or -1
    KVLAPSE_UNROLL
    for (int j = 0; j < 2; ++j) {
      inverse[j] = small_.inverse_sum[2 * t + j];
      heaviest[j] = inverse[j] > 0 && smem_load(rest_address(2 * t + j)) < 1
                        ? inverse[j] * square_root(square_of_left(2 * t + j))
                        : -1.0f;
    }
    uint64_t best = ~uint64_t{0};
    KVLAPSE_NO_UNROLL
    for (int tile = tiles.end - 1 - group; tile >= tiles.begin; tile -= args_.n_groups) {
      const int first = tile * kTileSlots + half * kHalfSlots;
      const SlotSide next = side_of(tile - args_.n_groups, half);
      const SmemAddress data = ring_ + static_cast<uint32_t>(at.stage * Traits::kTileBytes);
      float sums[4];
      KVLAPSE_UNROLL
      for (int block = 0; block < 2; ++block) {
        // Factors w / (1 - w); the slot that outweighs the others has its error already.
        float factor[4] = {0, 0, 0, 0}, known[4] = {0, 0, 0, 0};
        if (t < half_group()) {
          const Float4 s = smem_load4(logit_address_of(tile - tiles.begin, half) +
                                      static_cast<uint32_t>(block) * pair_bytes());
          const float logits[4] = {s.x, s.y, s.z, s.w};
          KVLAPSE_UNROLL
          for (int j = 0; j < 4; ++j) {
            const float w = exp2_approximate(logits[j] - max[j % 2]) * inverse[j % 2];
            const bool outweighs = heaviest[j % 2] >= 0 && logits[j] == max[j % 2];
            factor[j] = outweighs ? 0 : w / (1 - w);
            known[j] = outweighs ? heaviest[j % 2] : 0;
          }
        }
        if (block == 0) {
          mbarrier_wait(bar(small_.full[at.stage]), at.phase);
          if (half_of_slot(info.slot) == first) {
            if constexpr (Traits::kFp8) rows.v = quantised(rows.v);
            write_row(at.stage, info.slot, item, rows.v, 1);
          }
        }
        const int first_row = half * kHalfSlots + block * 16;
        float error[4];
        measure_block(info, tile * kTileSlots, first_row, at.stage, o, factor, known, data, error);
        sums[2 * block] = error[0] + error[1], sums[2 * block + 1] = error[2] + error[3];
      }
      release(at);
      update_protection(lie, info, first, side);
      const uint32_t bits = score_half(lie, info, first, sums, side);
      if (bits != kNoScore)
        best = min_key(best, (static_cast<uint64_t>(bits) << 32) | static_cast<uint32_t>(first + own_slot()));
      side = next;
      at.step(args_.n_groups, args_.n_stages);
    }
    return best;
  }

  // Errors of rows g and g + 8 behind `first_row`, heads 2t and 2t + 1.
  KVLAPSE_DEVICE void measure_block(const ItemInfo& info, int tile_slot, int first_row, int stage,
                                    const OutputScale& o, const float (&factor)[4], const float (&known)[4],
                                    SmemAddress data, float (&error)[4]) {
    const int g = lane_ / 4, row = first_row + (lane_ & 7) + ((lane_ >> 3) & 1) * 8;
    float cross[4] = {0, 0, 0, 0}, cross_rest[4] = {0, 0, 0, 0}, square[2] = {0, 0};
    constexpr int kAtOnce = Traits::kSteps < 4 ? Traits::kSteps : 4;
    KVLAPSE_NO_UNROLL
    for (int at = 0; at < Traits::kSteps; at += kAtOnce) {
      uint32_t loaded[4];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        uint32_t a[4];
        load_rows(data, row, at + u, loaded, a);
        const Float4 parts = smem_load4(operand_address(at + u, own_head()));
        multiply_add_16x8x16<Matrix>(cross, a, float_bits(parts.x), float_bits(parts.y));
        multiply_add_16x8x16<Matrix>(cross_rest, a, float_bits(parts.z), float_bits(parts.w));
        float low[4], high[4];
        unpack_rows(a, low, high);
        KVLAPSE_UNROLL
        for (int k = 0; k < 4; ++k) square[0] += low[k] * low[k], square[1] += high[k] * high[k];
      }
    }
    float slot_scale[2] = {1, 1};
    KVLAPSE_UNROLL
    for (int k = 0; k < 2; ++k) {
      square[k] += shuffle_xor(square[k], 1);
      square[k] += shuffle_xor(square[k], 2);
      if constexpr (Traits::kFp8) {
        slot_scale[k] = smem_load(scale_address(stage, first_row + g + k * 8));
        square[k] *= slot_scale[k] * slot_scale[k];
      }
    }
    float distance[4];  // squares
    bool cancelled[4];
    KVLAPSE_UNROLL
    for (int j = 0; j < 4; ++j) {
      const float product = (cross[j] + cross_rest[j]) * o.scale[j % 2] * slot_scale[j / 2];
      const float both = o.square[j % 2] + square[j / 2];
      distance[j] = both - 2 * product;
      cancelled[j] = factor[j] > 0 && tile_slot + first_row + g + j / 2 * 8 < info.n &&
                     !(distance[j] >= kCancelled * both);
    }
    if (warp_ballot(cancelled[0] || cancelled[1] || cancelled[2] || cancelled[3]) != 0)
      subtract_output(data, row, slot_scale, cancelled, distance);
    KVLAPSE_UNROLL
    for (int j = 0; j < 4; ++j) error[j] = factor[j] > 0 ? factor[j] * square_root(distance[j]) : known[j];
  }

  // |o - v|^2 element by element where it is asked for: a slot's error does not depend on its neighbours'.
  KVLAPSE_DEVICE void subtract_output(SmemAddress data, int row, const float (&slot_scale)[2],
                                      const bool (&wanted)[4], float (&distance)[4]) const {
    const int t = lane_ % 4;
    constexpr int kLane = Traits::kFp8 ? 4 : 2, kSecond = Traits::kFp8 ? 2 : 8;
    KVLAPSE_NO_UNROLL
    for (int head = 0; head < args_.group; ++head) {
      float low = 0, high = 0;
      KVLAPSE_NO_UNROLL
      for (int i = 0; i < Traits::kSteps; i += 2) {
        uint32_t loaded[4];
        KVLAPSE_UNROLL
        for (int second = 0; second < 2; ++second) {
          uint32_t a[4];
          load_rows(data, row, i + second, loaded, a);
          float v[4], u[4];
          unpack_rows(a, v, u);
          KVLAPSE_UNROLL
          for (int k = 0; k < 4; ++k) {
            const float o =
                smem_load(whole_address(head, (i + second) * 16 + t * kLane + k / 2 * kSecond + k % 2));
            const float x = o - v[k] * slot_scale[0], y = o - u[k] * slot_scale[1];
            low += x * x, high += y * y;
          }
        }
      }
      for (int mask = 1; mask < 4; mask *= 2) low += shuffle_xor(low, mask), high += shuffle_xor(high, mask);
      KVLAPSE_UNROLL
      for (int j = 0; j < 4; ++j)
        if (wanted[j] && head == 2 * t + j % 2) distance[j] = j < 2 ? low : high;
    }
  }

  KVLAPSE_DEVICE float square_of_left(int head) const {
    float square = 0;
    for (int d = 0; d < Traits::kHeadDim; d += 4) {
      const Float4 v = smem_load4(left_address(head, d));
      square += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
    }
    return square;
  }

  KVLAPSE_DEVICE void finish_choice(int item, int turn, const ItemInfo& info, uint64_t key) {
    key = warp_min(key);
    if (lane_ == 0) small_.keys[warp_] = key;
    consumer_sync();  // global scores are written; buffers may be used again
    keep_state(item, turn, info);
  }

  // One thread, behind a barrier: this CTA's scores are in memory. True when all other heads' are, and the
  // one that arrives twice has.
  KVLAPSE_DEVICE bool arrive_at_layer(int item) {
    const uint32_t last = static_cast<uint32_t>(args_.n_kv_heads - (twice_at_layer(item) < 0 ? 1 : 0));
    return count_arrival(args_.arrivals + quotient(item, args_.by_kv_heads) * kMaxDecodeSplits + rank_,
                         last) == last;
  }
  // The item of a layer whose CTA arrives once more amid its next item, by turns: where blocks take many
  // items the slowest would be the last to arrive, and become slower still, in every layer. -1: none, as
  // there is no next item.
  KVLAPSE_DEVICE int twice_at_layer(int item) const {
    const int layer = quotient(item, args_.by_kv_heads), first = layer * args_.n_kv_heads;
    const int twice = first + (first / item_stride_ + layer) % args_.n_kv_heads;
    return twice + item_stride_ < args_.n_items ? twice : -1;
  }

  // The last to arrive at this share of a layer's slots sums the heads' scores in order and picks: behind the
  // next barrier among consumers, as the warp that counts the arrival waits for memory.
  struct LayerChoice {
    int item = 0, n = 0, keeper = 0;
    bool due = false;
  };
  KVLAPSE_DEVICE void arrive_again(const LayerChoice& choice) {
    if (!choice.due || warp_ != choice.keeper) return;
    if (lane_ == 0 && twice_at_layer(choice.item) == choice.item)
      small_.last_arrival = arrive_at_layer(choice.item);
    warp_sync();
  }
  KVLAPSE_DEVICE void choose_for_layer(const LayerChoice& choice) {
    if (!choice.due || !small_.last_arrival) return;
    const int item = choice.item;
    const Tiles tiles = tiles_of(choice.n);
    const int first_item = quotient(item, args_.by_kv_heads) * args_.n_kv_heads;
    const int end = tiles.end * kTileSlots < choice.n ? tiles.end * kTileSlots : choice.n;
    uint64_t best = ~uint64_t{0};
    const auto protection = [&](int slot) -> uint32_t {
      return static_cast<uint32_t>(args_.protect[protect_index(item, slot / 16)]) >> (slot % 16);
    };
    const auto consider = [&](int slot, float score, uint32_t bits) {
      if (slot >= end || (bits & 1u)) return;
      best = min_key(best, (static_cast<uint64_t>(float_bits(score)) << 32) | static_cast<uint32_t>(slot));
    };
    const auto consider4 = [&](int slot, const Float4& score, uint32_t bits) {
      consider(slot, score.x, bits);
      consider(slot + 1, score.y, bits >> 1);
      consider(slot + 2, score.z, bits >> 2);
      consider(slot + 3, score.w, bits >> 3);
    };
    // All heads' loads are in flight before the first is added.
    constexpr int kHeads = Traits::kBulk ? 8 : 4;
    const auto scores4 = [&](int h, int slot) {
      return h < args_.n_kv_heads ? load_shared_by_device(reinterpret_cast<const Float4*>(
                                        args_.importance + slot_index(first_item + h, slot)))
                                  : Float4{0, 0, 0, 0};
    };
    const int begin = tiles.begin * kTileSlots, step = n_threads_ * 4;
    if (args_.n_slots % 4 == 0) {  // rows are aligned: two times four slots at once
      KVLAPSE_NO_UNROLL
      for (int slot = begin + thread_index() * 4; slot < end; slot += 2 * step) {
        const int second = slot + step < end ? slot + step : slot;
        const uint32_t bits = protection(slot), more_bits = protection(second);
        Float4 score{0, 0, 0, 0}, more{0, 0, 0, 0};
        KVLAPSE_NO_UNROLL
        for (int h = 0; h < args_.n_kv_heads; h += kHeads) {
          Float4 loaded[2][kHeads];
          KVLAPSE_UNROLL
          for (int u = 0; u < kHeads; ++u)
            loaded[0][u] = scores4(h + u, slot), loaded[1][u] = scores4(h + u, second);
          KVLAPSE_UNROLL
          for (int u = 0; u < kHeads; ++u) add(score, loaded[0][u]), add(more, loaded[1][u]);
        }
        consider4(slot, score, bits);
        consider4(second, more, more_bits);
      }
    } else {
      KVLAPSE_NO_UNROLL
      for (int slot = begin + thread_index(); slot < end; slot += n_threads_) {
        float score = 0;
        KVLAPSE_NO_UNROLL
        for (int h = 0; h < args_.n_kv_heads; h += kHeads) {
          float loaded[kHeads];
          KVLAPSE_UNROLL
          for (int u = 0; u < kHeads; ++u)
            loaded[u] = h + u < args_.n_kv_heads
                            ? load_shared_by_device(args_.importance + slot_index(first_item + h + u, slot))
                            : 0.0f;
          KVLAPSE_UNROLL
          for (int u = 0; u < kHeads; ++u) score += loaded[u];
        }
        consider(slot, score, protection(slot));
      }
    }
    best = warp_min(best);
    if (lane_ == 0) small_.layer_keys[warp_] = best;
    consumer_sync();
    if (warp_ != 0) return;
    best = warp_min(lane_ < consumer_warps() ? small_.layer_keys[lane_] : ~uint64_t{0});
    if (lane_ == 0) args_.victim_keys[first_item * kMaxDecodeSplits + rank_] = best;
  }

  static constexpr float kInfinity = __builtin_huge_valf();

  const Args& args_;
  DecodeSmall& small_;
  const SmemAddress ring_, scales_, logits_, softmax_, received_;
  const int n_threads_;  // that consume
  const int warp_, lane_, rank_, first_item_, item_stride_;
};

}  // namespace kvlapse::device
