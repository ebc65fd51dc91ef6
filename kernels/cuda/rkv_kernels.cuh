// The two kernels of an R-KV compaction (contract: kernels/decode/rkv_args.h), written in the operations of
// device_ops.cuh only, so that the CPU emulator of the tests compiles the same text; include device_ops.cuh
// (or the emulator) first.
//   1. rows: norms, the window's logits, partial sums of unit keys, every row's last similar key; a block of
//   128
//      rows each, which stay in shared memory. The search multiplies them with 64 keys at a time from the end
//      and stops when every row has its key.
//   2. select: softmax, pool, projections on the sum of unit keys (the second and last reading of K), scores,
//      order, moves; one block a head.
#pragma once

#include "kernels/decode/rkv_args.h"

namespace kvlapse::device {

struct F32 {};

template <class Element>
struct RkvElement {
  static constexpr int kBytes = 2;
};
template <>
struct RkvElement<F32> {
  static constexpr int kBytes = 4;
};

// Rows of keys in shared memory.
template <int kHeadDim, class Element>
struct RkvTile {
  static constexpr int kBytes = RkvElement<Element>::kBytes;
  static constexpr int kRowBytes = rkv_row_bytes(kHeadDim, kBytes);
  static constexpr int kRowChunks = kHeadDim * kBytes / 16;

  // The values of a 16-byte chunk of a row, which 8 rows read without a bank conflict.
  static constexpr int kChunkValues = 16 / kBytes;
  KVLAPSE_DEVICE static void load_chunk(SmemAddress row, int chunk, float (&v)[kChunkValues]) {
    const Float4 words = smem_load4(row + static_cast<uint32_t>(chunk * 16));
    const float parts[4] = {words.x, words.y, words.z, words.w};
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBytes == 4)
        v[i] = parts[i];
      else
        unpack2<Element>(float_bits(parts[i]), v[2 * i], v[2 * i + 1]);
    }
  }
  // Value pair d, d + 1 of a row.
  KVLAPSE_DEVICE static void load_pair(SmemAddress row, int d, float& a, float& b) {
    if constexpr (kBytes == 4)
      a = smem_load(row + static_cast<uint32_t>(d * 4)),
      b = smem_load(row + static_cast<uint32_t>(d * 4 + 4));
    else
      unpack2<Element>(float_bits(smem_load(row + static_cast<uint32_t>(d * 2))), a, b);
  }

  // c[n][..] = rows [16 of `a`] x keys [8 n ..] in the layout of mma's C: lane (g, t) holds rows g and g + 8,
  // columns 8 n + 2t, + 1.
  template <int kTiles>
  KVLAPSE_DEVICE static void products(float (&c)[kTiles][4], SmemAddress a, SmemAddress b, int lane,
                                      int n_columns = kTiles * 8) {
    KVLAPSE_UNROLL
    for (int n = 0; n < kTiles; ++n)
      for (int j = 0; j < 4; ++j) c[n][j] = 0;
    if constexpr (kBytes == 4) {
      const int g = lane / 4, t = lane % 4;
      for (int d = 0; d < kHeadDim; d += 4) {
        const auto at = static_cast<uint32_t>(d * 4);
        const Float4 low = smem_load4(a + static_cast<uint32_t>(g * kRowBytes) + at),
                     high = smem_load4(a + static_cast<uint32_t>((g + 8) * kRowBytes) + at);
        KVLAPSE_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          if (8 * n >= n_columns) break;
          KVLAPSE_UNROLL
          for (int j = 0; j < 2; ++j) {
            const Float4 key = smem_load4(b + static_cast<uint32_t>((8 * n + 2 * t + j) * kRowBytes) + at);
            c[n][j] += low.x * key.x + low.y * key.y + low.z * key.z + low.w * key.w;
            c[n][2 + j] += high.x * key.x + high.y * key.y + high.z * key.z + high.w * key.w;
          }
        }
      }
    } else {
      const SmemAddress a_row = a + static_cast<uint32_t>(((lane & 7) + ((lane >> 3) & 1) * 8) * kRowBytes);
      const SmemAddress b_row = b + static_cast<uint32_t>(((lane & 7) + (lane >> 4) * 8) * kRowBytes);
      KVLAPSE_UNROLL
      for (int i = 0; i < kHeadDim / 16; ++i) {
        uint32_t rows[4];
        load_matrix4(rows, a_row + static_cast<uint32_t>((2 * i + (lane >> 4)) * 16));
        KVLAPSE_UNROLL
        for (int n = 0; n < kTiles; n += 2) {
          if (8 * n >= n_columns) break;
          uint32_t keys[4];
          load_matrix4(keys,
                       b_row + static_cast<uint32_t>(8 * n * kRowBytes + (2 * i + ((lane >> 3) & 1)) * 16));
          multiply_add_16x8x16<Element>(c[n], rows, keys[0], keys[1]);
          multiply_add_16x8x16<Element>(c[n + 1], rows, keys[2], keys[3]);
        }
      }
    }
  }
};

template <int kHeadDim, class Element>
class RkvRows {
 public:
  using Tile = RkvTile<kHeadDim, Element>;
  static constexpr int kWarps = kRkvThreads / 32;
  static constexpr int kColumnTiles = kRkvColumns / 8;

  KVLAPSE_DEVICE RkvRows(const RkvArgs& args, unsigned char* shared)
      : args_(args),
        item_(block_index() / args.row_blocks),
        first_(block_index() % args.row_blocks * kRkvRows),
        held_(args.count[item_]),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        rows_(smem_address(shared)),
        keys_(rows_ + static_cast<uint32_t>(kRkvRows * Tile::kRowBytes)),
        row_norms_(keys_ + static_cast<uint32_t>(rkv_keys_bytes(kHeadDim, Tile::kBytes))),
        key_norms_(row_norms_ + kRkvRows * 4),
        shares_(key_norms_ + 2 * kRkvColumns * 4),
        flags_(shares_ + kRkvThreads * 8) {}

  KVLAPSE_DEVICE void run() {
    allow_next_kernel();
    if (held_ < args_.budget || first_ >= held_) return;
    int slots[kTileChunks];
    Float4 tile[kTileChunks];
    const int last_tile = (held_ - 1) / kRkvColumns;
    find_slots<kRkvColumns>(slots, last_tile * kRkvColumns);
    load_rows();
    gather(tile, slots);  // the first keys of the search: on their way from here
    find_slots<kRkvColumns>(slots, (last_tile - 1) * kRkvColumns);
    load_queries();
    block_sync();
    weigh_queries();
    sum_units();
    block_sync();  // products and shares are read; the keys' place is free
    store_keys(tile, 0);
    block_sync();
    search(last_tile, slots);
  }

 private:
  static constexpr float kNothing = -1e30f;
  static constexpr int kStride = kRkvColumns + 1;
  static constexpr int kTileChunks = kRkvColumns * Tile::kRowChunks / kRkvThreads;
  static constexpr int kRowsChunks = kRkvRows * Tile::kRowChunks / kRkvThreads;
  static_assert(kRkvColumns * Tile::kRowChunks % kRkvThreads == 0);

  KVLAPSE_DEVICE int64_t at(int rank) const { return static_cast<int64_t>(item_) * args_.n_slots + rank; }
  KVLAPSE_DEVICE SmemAddress row_address(int row) const {
    return rows_ + static_cast<uint32_t>(row * Tile::kRowBytes);
  }
  KVLAPSE_DEVICE SmemAddress norm_address(int row) const {
    return row_norms_ + static_cast<uint32_t>(row * 4);
  }

  // ---- rows on their way: chunk `thread + i * threads` of a block of rows belongs to a thread ----
  template <int kRowCount>
  KVLAPSE_DEVICE void find_slots(int (&slots)[kRowCount * Tile::kRowChunks / kRkvThreads], int first) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRowCount * Tile::kRowChunks / kRkvThreads; ++i) {
      const int rank = first + (thread_ + i * kRkvThreads) / Tile::kRowChunks;
      slots[i] = rank >= 0 && rank < held_ ? args_.order[at(rank)] : -1;
    }
  }
  template <int kChunks>
  KVLAPSE_DEVICE void gather(Float4 (&to)[kChunks], const int (&slots)[kChunks]) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kChunks; ++i)
      to[i] = slots[i] < 0
                  ? Float4{0, 0, 0, 0}
                  : static_cast<const Float4*>(args_.k)[at(slots[i]) * Tile::kRowChunks +
                                                        (thread_ + i * kRkvThreads) % Tile::kRowChunks];
  }
  // Into shared memory; norm(row, square) once a row.
  template <int kChunks, class Norm>
  KVLAPSE_DEVICE void spread(const Float4 (&from)[kChunks], SmemAddress to, Norm norm) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      const int chunk = thread_ + i * kRkvThreads, row = chunk / Tile::kRowChunks;
      smem_store4(to + static_cast<uint32_t>(row * Tile::kRowBytes + chunk % Tile::kRowChunks * 16), from[i]);
      const float parts[4] = {from[i].x, from[i].y, from[i].z, from[i].w};
      float square = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < 4; ++j) {
        if constexpr (Tile::kBytes == 4) {
          square += parts[j] * parts[j];
        } else {
          float a, b;
          unpack2<Element>(float_bits(parts[j]), a, b);
          square += a * a;
          square += b * b;
        }
      }
      KVLAPSE_UNROLL
      for (int mask = Tile::kRowChunks / 2; mask > 0; mask >>= 1) square += shuffle_xor(square, mask);
      if (chunk % Tile::kRowChunks == 0) norm(row, square);
    }
  }
  KVLAPSE_DEVICE static float inverse_of(float square) { return 1.0f / (square_root(square) + 1e-8f); }

  KVLAPSE_DEVICE void load_rows() const {
    int slots[kRowsChunks];
    Float4 chunks[kRowsChunks];
    find_slots<kRkvRows>(slots, first_);
    gather(chunks, slots);
    spread(chunks, rows_, [&](int row, float square) {
      const float inverse = inverse_of(square);
      smem_store(norm_address(row), first_ + row < held_ ? inverse : 0.0f);
      if (first_ + row >= held_) return;
      args_.inverse_norm[at(first_ + row)] = inverse;
      args_.own[at(first_ + row)] = square * inverse * inverse;
    });
  }
  KVLAPSE_DEVICE void store_keys(const Float4 (&chunks)[kTileChunks], int buffer) const {
    spread(chunks, keys_ + static_cast<uint32_t>(buffer * kRkvColumns * Tile::kRowBytes),
           [&](int row, float square) {
             smem_store(key_norms_ + static_cast<uint32_t>((buffer * kRkvColumns + row) * 4),
                        inverse_of(square));
           });
  }
  KVLAPSE_DEVICE void load_queries() const {
    const int b = item_ / args_.n_kv_heads, h = item_ % args_.n_kv_heads,
              n_q_heads = args_.n_kv_heads * args_.group;
    KVLAPSE_UNROLL
    for (int i = thread_; i < kRkvColumns * Tile::kRowChunks; i += kRkvThreads) {
      const int row = i / Tile::kRowChunks, query = row / args_.group,
                head = h * args_.group + row % args_.group;
      Float4 v{0, 0, 0, 0};
      if (query < args_.window)
        v = static_cast<const Float4*>(
            args_
                .q)[((static_cast<int64_t>(b) * args_.window + query) * n_q_heads + head) * Tile::kRowChunks +
                    i % Tile::kRowChunks];
      smem_store4(keys_ + static_cast<uint32_t>(row * Tile::kRowBytes + i % Tile::kRowChunks * 16), v);
    }
  }

  // Logits of the window's queries, max over the group; then max and sum of exp of each query over this
  // block's rows before the window, a warp a query.
  KVLAPSE_DEVICE void weigh_queries() const {
    const SmemAddress products = keys_;
    float c[kColumnTiles][4];
    Tile::products(c, row_address(warp_ * 16), keys_, lane_, args_.window * args_.group);
    block_sync();  // the queries are read; the products take their place
    const int g = lane_ / 4, t = lane_ % 4;
    KVLAPSE_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 4; ++j)
        smem_store(products + static_cast<uint32_t>(
                                  ((warp_ * 16 + g + (j / 2) * 8) * kStride + 8 * n + 2 * t + j % 2) * 4),
                   c[n][j]);
    }
    block_sync();
    constexpr int kRowsOfLane = kRkvRows / 32;
    const int before_window = held_ - args_.window - first_;
    for (int query = warp_; query < args_.window; query += kWarps) {
      float value[kRowsOfLane], most = kNothing;
      KVLAPSE_UNROLL
      for (int i = 0; i < kRowsOfLane; ++i) {
        const int row = lane_ + 32 * i;
        const SmemAddress from = products + static_cast<uint32_t>((row * kStride + query * args_.group) * 4);
        value[i] = smem_load(from);
        for (int head = 1; head < args_.group; ++head) {
          const float next = smem_load(from + static_cast<uint32_t>(head * 4));
          value[i] = next > value[i] ? next : value[i];
        }
        value[i] *= args_.logit_scale;
        if (first_ + row < held_)
          args_.logits[(static_cast<int64_t>(item_) * args_.window + query) * args_.n_slots + first_ + row] =
              value[i];
        if (row >= before_window) value[i] = kNothing;
        most = value[i] > most ? value[i] : most;
      }
      for (int mask = 16; mask > 0; mask >>= 1) {
        const float other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      float sum = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < kRowsOfLane; ++i)
        if (lane_ + 32 * i < before_window) sum += exponential(value[i] - most);
      for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
      if (lane_ != 0) continue;
      float* to =
          args_.softmax +
          ((static_cast<int64_t>(item_) * args_.row_blocks + first_ / kRkvRows) * args_.window + query) * 2;
      to[0] = most, to[1] = sum;
    }
  }

  // Sum of unit keys of the block: every thread sums one pair of components over a share of the rows.
  KVLAPSE_DEVICE void sum_units() const {
    constexpr int kPairs = kHeadDim / 2, kShares = kRkvThreads / kPairs;
    float low = 0, high = 0;
    const int pair = thread_ % kPairs, share = thread_ / kPairs;
    KVLAPSE_UNROLL_8
    for (int row = share; row < kRkvRows; row += kShares) {
      float a, b;
      Tile::load_pair(row_address(row), 2 * pair, a, b);
      const float inverse = smem_load(norm_address(row));
      low += a * inverse, high += b * inverse;
    }
    smem_store(shares_ + static_cast<uint32_t>((share * kHeadDim + 2 * pair) * 4), low);
    smem_store(shares_ + static_cast<uint32_t>((share * kHeadDim + 2 * pair + 1) * 4), high);
    block_sync();
    if (thread_ >= kHeadDim) return;
    float total = 0;
    for (int i = 0; i < kShares; ++i)
      total += smem_load(shares_ + static_cast<uint32_t>((i * kHeadDim + thread_) * 4));
    args_.partial_sum[(static_cast<int64_t>(item_) * args_.row_blocks + first_ / kRkvRows) * kHeadDim +
                      thread_] = total;
  }

  // Each row's last similar key. `slots`: of the keys behind the tile that is in shared memory.
  KVLAPSE_DEVICE void search(int last_tile, int (&slots)[kTileChunks]) const {
    const int g = lane_ / 4, t = lane_ % 4;
    const int low_row = first_ + warp_ * 16 + g;  // and + 8
    uint64_t found[2] = {0, 0};                   // (rank + 1) << 32 | bits of the cosine
    const float inverse[2] = {smem_load(norm_address(low_row - first_)),
                              smem_load(norm_address(low_row + 8 - first_))};
    bool done = first_ + warp_ * 16 >= held_;  // of all rows of the warp
    int buffer = 0;
    KVLAPSE_NO_UNROLL
    for (int tile = last_tile; tile >= 0; --tile, buffer ^= 1) {
      Float4 next[kTileChunks];
      if (tile > 0) {
        gather(next, slots);
        find_slots<kRkvColumns>(slots, (tile - 2) * kRkvColumns);
      }
      if (!done) {
        compare(tile, buffer, low_row, inverse, found);
        const bool both = (found[0] != 0 || low_row >= held_) && (found[1] != 0 || low_row + 8 >= held_);
        done = warp_ballot(both) == 0xffffffffu;
      }
      // Two sets of flags: a warp that is ahead writes the other one.
      const SmemAddress flags = flags_ + static_cast<uint32_t>(buffer * kWarps * 4);
      if (lane_ == 0) smem_store(flags + static_cast<uint32_t>(warp_ * 4), done ? 1.0f : 0.0f);
      if (tile > 0) store_keys(next, buffer ^ 1);
      block_sync();
      bool everyone = true;
      for (int w = 0; w < kWarps; ++w)
        everyone = everyone && smem_load(flags + static_cast<uint32_t>(w * 4)) != 0;
      if (everyone) break;
    }
    if (t != 0) return;
    for (int half = 0; half < 2; ++half) {
      const int row = low_row + half * 8;
      if (row >= held_) continue;
      args_.similar[at(row)] = static_cast<int32_t>(found[half] >> 32) - 1;
      args_.cosine[at(row)] = bits_float(static_cast<uint32_t>(found[half]));
    }
  }

  KVLAPSE_DEVICE void compare(int tile, int buffer, int low_row, const float (&inverse)[2],
                              uint64_t (&found)[2]) const {
    const int t = lane_ % 4, first_key = tile * kRkvColumns + 2 * t;
    float c[kColumnTiles][4];
    Tile::products(c, row_address(warp_ * 16),
                   keys_ + static_cast<uint32_t>(buffer * kRkvColumns * Tile::kRowBytes), lane_);
    const SmemAddress norms = key_norms_ + static_cast<uint32_t>((buffer * kRkvColumns + 2 * t) * 4);
    // A row is not like itself: only where the tile meets the block's own rows.
    if (tile * kRkvColumns < first_ + kRkvRows && (tile + 1) * kRkvColumns > first_) {
      KVLAPSE_UNROLL
      for (int n = 0; n < kColumnTiles; ++n)
        for (int j = 0; j < 4; ++j)
          if (first_key + 8 * n + j % 2 == low_row + (j / 2) * 8) c[n][j] = 0;
    }
    const int n_keys = held_ - first_key;
    int best[2] = {-1, -1};  // keys come in rising order: the last one wins
    float best_cosine[2] = {0, 0}, first_cosine[2] = {0, 0};
    KVLAPSE_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float key_inverse = smem_load(norms + static_cast<uint32_t>((8 * n + j) * 4));
        KVLAPSE_UNROLL
        for (int half = 0; half < 2; ++half) {
          const float cosine = c[n][half * 2 + j] * inverse[half] * key_inverse;
          const bool similar = cosine > args_.threshold && 8 * n + j < n_keys;
          best[half] = similar ? 8 * n + j : best[half];
          best_cosine[half] = similar ? cosine : best_cosine[half];
          if (n == 0 && j == 0) first_cosine[half] = cosine;
        }
      }
    }
    KVLAPSE_UNROLL
    for (int half = 0; half < 2; ++half) {
      uint64_t packed = best[half] < 0 ? 0
                                       : static_cast<uint64_t>(first_key + best[half] + 1) << 32 |
                                             float_bits(best_cosine[half]);
      packed = quad_max(packed);
      if (tile == 0) {  // rank 0, whose cosine the lane with t = 0 has
        const float of_first = shuffle_from(first_cosine[half], lane_ & ~3);
        if (packed == 0) packed = uint64_t{1} << 32 | float_bits(of_first);
      }
      if (found[half] == 0) found[half] = packed;
    }
  }
  KVLAPSE_DEVICE static uint64_t quad_max(uint64_t v) {
    for (int mask = 1; mask < 4; mask *= 2) {
      const uint64_t other = shuffle_xor(v, mask);
      v = v > other ? v : other;
    }
    return v;
  }

  const RkvArgs& args_;
  const int item_, first_, held_, thread_, warp_, lane_;
  const SmemAddress rows_, keys_, row_norms_, key_norms_, shares_, flags_;
};

// One block a head: scores, order, moves.
template <int kHeadDim, class Element>
class RkvSelect {
 public:
  using Tile = RkvTile<kHeadDim, Element>;
  static constexpr int kRowChunks = Tile::kRowChunks;
  static constexpr float kFixedPoint = 1099511627776.0f;  // 2^40: sums of cosines in integers, in any order

  KVLAPSE_DEVICE RkvSelect(const RkvArgs& args, unsigned char* shared)
      : args_(args),
        item_(block_index()),
        n_threads_(args.select_threads),
        n_warps_(n_threads_ / 32),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        sorted_(reinterpret_cast<uint64_t*>(shared)),
        importance_(reinterpret_cast<float*>(sorted_ + rkv_power_of_two(args.n_slots))),
        redundancy_(importance_ + args.n_slots),
        tail_rank_(reinterpret_cast<int32_t*>(redundancy_ + args.n_slots)),
        holes_(tail_rank_ + (args.n_slots - args.budget)),
        movers_(holes_ + (args.n_slots - args.budget)),
        victims_(movers_ + (args.n_slots - args.budget)),
        warp_values_(reinterpret_cast<float*>(victims_ + (args.n_slots - args.budget))),
        row_max_(warp_values_ + kRkvSelectThreads / 32),
        row_inverse_(row_max_ + kRkvColumns),
        sum_(row_inverse_ + kRkvColumns),
        n_moves_(reinterpret_cast<int32_t*>(sum_ + kHeadDim)) {}

  KVLAPSE_DEVICE void run() {
    wait_for_previous_kernel();
    held_ = args_.count[item_];
    if (held_ < args_.budget) return;
    weigh_window();
    project();
    forgive();
    score();
    sort();
    rearrange();
    move_rows();
  }

 private:
  KVLAPSE_DEVICE int64_t at(int rank) const { return static_cast<int64_t>(item_) * args_.n_slots + rank; }
  KVLAPSE_DEVICE int prefix() const { return held_ - args_.window; }

  KVLAPSE_DEVICE static int warp_max(int v) {
    for (int mask = 16; mask > 0; mask >>= 1) {
      const int other = shuffle_xor(v, mask);
      v = other > v ? other : v;
    }
    return v;
  }
  template <bool kMax>
  KVLAPSE_DEVICE float warp_reduce(float v) const {
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float other = shuffle_xor(v, mask);
      v = kMax ? (other > v ? other : v) : v + other;
    }
    return v;
  }
  KVLAPSE_DEVICE float block_max(float v) {
    v = warp_reduce<true>(v);
    if (lane_ == 0) warp_values_[warp_] = v;
    block_sync();
    float most = warp_values_[0];
    for (int w = 1; w < n_warps_; ++w) most = warp_values_[w] > most ? warp_values_[w] : most;
    block_sync();
    return most;
  }
  // Of value(i) over held ranks, in the order of the largest block whatever this one's size is.
  template <class Value>
  KVLAPSE_DEVICE float block_sum(Value value) {
    for (int first = 0; first < kRkvSelectThreads; first += n_threads_) {
      float sum = 0;
      for (int i = first + thread_; i < held_; i += kRkvSelectThreads) sum += value(i);
      sum = warp_reduce<false>(sum);
      if (lane_ == 0) warp_values_[first / 32 + warp_] = sum;
    }
    block_sync();
    float total = warp_values_[0];
    for (int w = 1; w < kRkvSelectThreads / 32; ++w) total += warp_values_[w];
    block_sync();
    return total;
  }

  // importance = max pool of the mean over queries of their softmax before the window. And the sum of unit
  // keys.
  KVLAPSE_DEVICE void weigh_window() {
    const int n = prefix();
    if (thread_ >= n_threads_ - kHeadDim) {
      const int d = thread_ - (n_threads_ - kHeadDim);
      const float* parts = args_.partial_sum + static_cast<int64_t>(item_) * args_.row_blocks * kHeadDim + d;
      float total = 0;
      KVLAPSE_UNROLL_8
      for (int block = 0; block * kRkvRows < held_; ++block) total += parts[block * kHeadDim];
      sum_[d] = total;
    }
    if (thread_ < args_.window) {
      const float* parts =
          args_.softmax + (static_cast<int64_t>(item_) * args_.row_blocks * args_.window + thread_) * 2;
      const int stride = args_.window * 2, blocks = (held_ + kRkvRows - 1) / kRkvRows;
      float most = parts[0];
      KVLAPSE_UNROLL_8
      for (int i = 1; i < blocks; ++i) most = parts[i * stride] > most ? parts[i * stride] : most;
      float sum = 0;
      KVLAPSE_UNROLL_8
      for (int i = 0; i < blocks; ++i) sum += parts[i * stride + 1] * exponential(parts[i * stride] - most);
      row_max_[thread_] = most, row_inverse_[thread_] = 1.0f / sum;
    }
    block_sync();
    const float scale = 1.0f / static_cast<float>(args_.window);
    for (int i = thread_; i < n; i += n_threads_) {
      float sum = 0;
      KVLAPSE_UNROLL_8
      for (int query = 0; query < args_.window; ++query)
        sum += exponential(
                   args_.logits[(static_cast<int64_t>(item_) * args_.window + query) * args_.n_slots + i] -
                   row_max_[query]) *
               row_inverse_[query];
      redundancy_[i] = sum * scale;  // its place, until the pool is done
    }
    block_sync();
    const int half = args_.kernel / 2;
    for (int i = thread_; i < n; i += n_threads_) {
      float most = redundancy_[i];
      for (int j = i - half > 0 ? i - half : 0; j <= i + half && j < n; ++j)
        most = redundancy_[j] > most ? redundancy_[j] : most;
      importance_[i] = most;
    }
    block_sync();
  }

  // redundancy[rank] = unit key . sum of unit keys, without its own square. Lanes share a row; four rows of a
  // lane are on their way at once.
  KVLAPSE_DEVICE void project() {
    constexpr int kRowsOfWarp = 32 / kRowChunks, kAtOnce = 4;
    const int part = lane_ % kRowChunks, first_row = warp_ * kRowsOfWarp + lane_ / kRowChunks;
    float sum[Tile::kChunkValues];
    KVLAPSE_UNROLL
    for (int i = 0; i < Tile::kChunkValues; ++i) sum[i] = sum_[part * Tile::kChunkValues + i];
    KVLAPSE_NO_UNROLL
    for (int base = 0; base < held_; base += n_warps_ * kRowsOfWarp * kAtOnce) {
      int slot[kAtOnce];
      Float4 row[kAtOnce];
      float dot[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int rank = base + first_row + u * n_warps_ * kRowsOfWarp;
        slot[u] = rank < held_ ? args_.order[at(rank)] : 0;
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u)
        row[u] = static_cast<const Float4*>(args_.k)[at(slot[u]) * kRowChunks + part];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const float words[4] = {row[u].x, row[u].y, row[u].z, row[u].w};
        dot[u] = 0;
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          if constexpr (Tile::kBytes == 4) {
            dot[u] += words[i] * sum[i];
          } else {
            float a, b;
            unpack2<Element>(float_bits(words[i]), a, b);
            dot[u] += a * sum[2 * i];
            dot[u] += b * sum[2 * i + 1];
          }
        }
      }
      // A lane ends up with the sum of one of the four rows: halves are swapped, then quarters.
      const bool upper = (part & (kRowChunks / 2)) != 0, odd = (part & (kRowChunks / 4)) != 0;
      const float a = (upper ? dot[1] : dot[0]) + shuffle_xor(upper ? dot[0] : dot[1], kRowChunks / 2);
      const float b = (upper ? dot[3] : dot[2]) + shuffle_xor(upper ? dot[2] : dot[3], kRowChunks / 2);
      float total = (odd ? b : a) + shuffle_xor(odd ? a : b, kRowChunks / 4);
      KVLAPSE_UNROLL
      for (int mask = kRowChunks / 8; mask > 0; mask >>= 1) total += shuffle_xor(total, mask);
      const int rank = base + first_row + ((odd ? 2 : 0) + (upper ? 1 : 0)) * n_warps_ * kRowsOfWarp;
      if (part % (kRowChunks / 4) == 0 && rank < held_)
        redundancy_[rank] = total * args_.inverse_norm[at(rank)] - args_.own[at(rank)];
    }
  }

  // redundancy = softmax over all ranks of the mean cosine without what was forgiven.
  KVLAPSE_DEVICE void forgive() {
    for (int i = thread_; i < held_; i += n_threads_) sorted_[i] = 0;
    block_sync();
    // Often a whole warp forgives the same key: its sum is added once.
    for (int first = 0; first < held_; first += n_threads_) {
      const int i = first + thread_;
      const int target = i < held_ ? args_.similar[at(i)] : -1;
      int64_t amount = i < held_ ? static_cast<int64_t>(args_.cosine[at(i)] * kFixedPoint) : 0;
      const int common = warp_max(target);
      if (warp_ballot(target == common || target < 0) == 0xffffffffu) {
        for (int mask = 16; mask > 0; mask >>= 1) amount += shuffle_xor(amount, mask);
        if (lane_ == 0 && common >= 0) shared_add(sorted_ + common, static_cast<uint64_t>(amount));
      } else if (target >= 0) {
        shared_add(sorted_ + target, static_cast<uint64_t>(amount));
      }
    }
    block_sync();
    const float scale = 1.0f / static_cast<float>(held_);
    float most = -3.0e38f;
    for (int i = thread_; i < held_; i += n_threads_) {
      const float forgiven = static_cast<float>(static_cast<int64_t>(sorted_[i])) * (1.0f / kFixedPoint);
      const float mean = (redundancy_[i] - forgiven) * scale;
      redundancy_[i] = mean;
      most = mean > most ? mean : most;
    }
    most = block_max(most);
    const float inverse = 1.0f / block_sum([&](int i) {
                            const float weight = exponential(redundancy_[i] - most);
                            redundancy_[i] = weight;
                            return weight;
                          });
    for (int i = thread_; i < held_; i += n_threads_) redundancy_[i] *= inverse;
    block_sync();
  }

  // Ascending keys: the highest score first, the lowest rank first among equals.
  KVLAPSE_DEVICE void score() {
    const int n = prefix(), padded = rkv_power_of_two(n);
    for (int i = thread_; i < padded; i += n_threads_) {
      if (i >= n) {
        sorted_[i] = ~uint64_t{0};
        continue;
      }
      const float z = importance_[i] * args_.lambda - redundancy_[i] * (1.0f - args_.lambda);
      if (args_.scores != nullptr) args_.scores[at(i)] = z;
      const uint32_t bits = float_bits(z);
      const uint32_t rising = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
      sorted_[i] = (static_cast<uint64_t>(~rising) << 32) | static_cast<uint32_t>(i);
    }
    block_sync();
  }

  // Bitonic; 64 keys at a time stay in a warp's registers, longer strides are taken two at a time.
  KVLAPSE_DEVICE void sort() {
    const int n = rkv_power_of_two(prefix());
    for (int first = warp_ * 64; first < n; first += n_warps_ * 64) {
      uint64_t low = sorted_[first + lane_], high = sorted_[first + 32 + lane_];
      KVLAPSE_UNROLL
      for (int size = 2; size <= 32; size *= 2) {
        KVLAPSE_UNROLL
        for (int stride = size / 2; stride > 0; stride /= 2) {
          low = exchange(low, stride, (lane_ & size) == 0);
          high = exchange(high, stride, ((32 + lane_) & size) == 0);
        }
      }
      merge(low, high, (first & 64) == 0);
      sorted_[first + lane_] = low, sorted_[first + 32 + lane_] = high;
    }
    block_sync();
    for (int size = 128; size <= n; size *= 2) {
      int stride = size / 2;
      for (; stride >= 128; stride /= 4) {
        const int half = stride / 2;
        for (int i = thread_; i < n / 4; i += n_threads_) {
          const int at = i / half * stride * 2 + i % half;
          const bool rising = (at & size) == 0;
          uint64_t a = sorted_[at], b = sorted_[at + half], c = sorted_[at + stride],
                   d = sorted_[at + stride + half];
          in_order(a, c, rising);
          in_order(b, d, rising);
          in_order(a, b, rising);
          in_order(c, d, rising);
          sorted_[at] = a, sorted_[at + half] = b, sorted_[at + stride] = c, sorted_[at + stride + half] = d;
        }
        block_sync();
      }
      if (stride == 64) {
        for (int i = thread_; i < n / 2; i += n_threads_) {
          const int at = i / 64 * 128 + i % 64;
          uint64_t a = sorted_[at], b = sorted_[at + 64];
          in_order(a, b, (at & size) == 0);
          sorted_[at] = a, sorted_[at + 64] = b;
        }
        block_sync();
      }
      for (int first = warp_ * 64; first < n; first += n_warps_ * 64) {
        uint64_t low = sorted_[first + lane_], high = sorted_[first + 32 + lane_];
        merge(low, high, (first & size) == 0);
        sorted_[first + lane_] = low, sorted_[first + 32 + lane_] = high;
      }
      block_sync();
    }
  }
  KVLAPSE_DEVICE static void in_order(uint64_t& a, uint64_t& b, bool rising) {
    const uint64_t less = a < b ? a : b, more = a < b ? b : a;
    a = rising ? less : more, b = rising ? more : less;
  }
  KVLAPSE_DEVICE uint64_t exchange(uint64_t key, int stride, bool rising) const {
    const uint64_t other = shuffle_xor(key, stride);
    return (key < other) == (((lane_ & stride) == 0) == rising) ? key : other;
  }
  KVLAPSE_DEVICE void merge(uint64_t& low, uint64_t& high, bool rising) const {
    in_order(low, high, rising);
    KVLAPSE_UNROLL
    for (int stride = 16; stride > 0; stride /= 2) {
      low = exchange(low, stride, rising);
      high = exchange(high, stride, rising);
    }
  }

  // New order of the survivors; who moves where.
  KVLAPSE_DEVICE void rearrange() {
    const int n = prefix(), kept = args_.budget - args_.window, drops = held_ - args_.budget;
    int32_t* slots = reinterpret_cast<int32_t*>(importance_);  // of the new ranks; the scores are used up
    for (int i = thread_; i < args_.n_slots - args_.budget; i += n_threads_) tail_rank_[i] = -1;
    block_sync();
    for (int i = thread_; i < held_; i += n_threads_) {  // survivors, victims, the window
      const int old = i < n ? static_cast<int>(static_cast<uint32_t>(sorted_[i])) : i;
      const int slot = args_.order[at(old)];
      if (i >= kept && i < n) {
        victims_[i - kept] = slot;
        continue;
      }
      const int rank = i < kept ? i : i - drops;
      slots[rank] = slot;
      if (slot >= args_.budget) tail_rank_[slot - args_.budget] = rank;
    }
    block_sync();
    if (args_.evicted != nullptr)
      for (int i = thread_; i < args_.n_slots - args_.budget; i += n_threads_)
        args_.evicted[static_cast<int64_t>(item_) * (args_.n_slots - args_.budget) + i] =
            i < drops ? args_.positions[at(victims_[i])] : -1;
    if (warp_ == 0) {
      // As many holes below the budget as survivors behind it, both in the order that they are met.
      int n_holes = 0, n_movers = 0;
      for (int first = 0; first < drops; first += 32) {
        const int i = first + lane_;
        const int slot = i < drops ? victims_[i] : args_.n_slots;
        const uint32_t holes = warp_ballot(slot < args_.budget);
        if (slot < args_.budget) holes_[n_holes + bits_below(holes, lane_)] = slot;
        n_holes += bits_below(holes, 32);
        const bool moves = i < drops && tail_rank_[i] >= 0;
        const uint32_t movers = warp_ballot(moves);
        if (moves) movers_[n_movers + bits_below(movers, lane_)] = args_.budget + i;
        n_movers += bits_below(movers, 32);
      }
      if (lane_ == 0) *n_moves_ = n_movers;
    }
    block_sync();
    for (int i = thread_; i < *n_moves_; i += n_threads_)
      slots[tail_rank_[movers_[i] - args_.budget]] = holes_[i];
    block_sync();
    for (int i = thread_; i < args_.budget; i += n_threads_) args_.order[at(i)] = slots[i];
    for (int i = args_.budget + thread_; i < args_.n_slots; i += n_threads_)
      args_.order[at(i)] = i;  // where tokens come next
    if (thread_ == 0) args_.count[item_] = args_.budget;
  }

  // Nobody reads what another move writes: all loads of a thread are in flight together.
  KVLAPSE_DEVICE void move_rows() {
    Float4* const k = static_cast<Float4*>(args_.k);
    Float4* const v = static_cast<Float4*>(args_.v);
    const int n = *n_moves_ * kRowChunks;
    for (int i = thread_; i < n; i += 2 * n_threads_) {
      const int other = i + n_threads_ < n ? i + n_threads_ : i;
      const int64_t from = at(movers_[i / kRowChunks]) * kRowChunks + i % kRowChunks,
                    other_from = at(movers_[other / kRowChunks]) * kRowChunks + other % kRowChunks,
                    to = at(holes_[i / kRowChunks]) * kRowChunks + i % kRowChunks,
                    other_to = at(holes_[other / kRowChunks]) * kRowChunks + other % kRowChunks;
      const Float4 moved[4] = {k[from], v[from], k[other_from], v[other_from]};
      k[to] = moved[0], v[to] = moved[1], k[other_to] = moved[2], v[other_to] = moved[3];
    }
    for (int i = thread_; i < *n_moves_; i += n_threads_) {
      const int64_t from = at(movers_[i]), to = at(holes_[i]);
      if (args_.positions != nullptr) args_.positions[to] = args_.positions[from];
      if (args_.value_l1 != nullptr) args_.value_l1[to] = args_.value_l1[from];
    }
  }

  const RkvArgs& args_;
  const int item_, n_threads_, n_warps_, thread_, warp_, lane_;
  int held_ = 0;
  uint64_t* sorted_;  // scores with ranks; before that what is forgiven
  float* importance_;
  float* redundancy_;
  int32_t* tail_rank_;  // new rank of the token in slot budget + i, -1: none
  int32_t* holes_;
  int32_t* movers_;
  int32_t* victims_;  // slots, the lowest score last
  float* warp_values_;
  float* row_max_;
  float* row_inverse_;
  float* sum_;  // of unit keys
  int32_t* n_moves_;
};

}  // namespace kvlapse::device
