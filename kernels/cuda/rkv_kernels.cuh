// The three kernels of an R-KV compaction (contract: kernels/decode/rkv_args.h), written in the operations of
// device_ops.cuh only, so that the CPU emulator of the tests compiles the same text; include device_ops.cuh
// (or the emulator) first.
//   1. measure: norms, the window's logits, partial sums of unit keys; a block of rows each.
//   2. similar: every row's last similar key, by products of 128 rows with 64 keys at a time from the end;
//   exits early.
//   3. select: softmax, pool, scores, order, moves; one block a head.
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
        keys_(rows_ + static_cast<uint32_t>(kRkvRows * Tile::kRowBytes)) {}

  // Norms, logits of the window's queries, sums of unit keys.
  KVLAPSE_DEVICE void measure() {
    if (held_ < args_.budget || first_ >= held_) return;
    const SmemAddress products = keys_ + static_cast<uint32_t>(kRkvColumns * Tile::kRowBytes);
    const SmemAddress norms = products + static_cast<uint32_t>(kRkvRows * kStride * 4);
    load_rows();
    load_queries();
    block_sync();
    if (thread_ < kRkvRows) {
      const float inverse = inverse_norm(row_address(thread_));
      smem_store(norms + static_cast<uint32_t>(thread_ * 4), first_ + thread_ < held_ ? inverse : 0.0f);
      if (first_ + thread_ < held_) args_.inverse_norm[at(first_ + thread_)] = inverse;
    }
    float c[kColumnTiles][4];
    Tile::products(c, row_address(warp_ * 16), keys_, lane_, args_.window * args_.group);
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
    for (int i = thread_; i < args_.window * kRkvRows; i += kRkvThreads) {
      const int row = i % kRkvRows, query = i / kRkvRows;
      if (first_ + row >= held_) continue;
      const SmemAddress from = products + static_cast<uint32_t>((row * kStride + query * args_.group) * 4);
      float most = smem_load(from);
      for (int head = 1; head < args_.group; ++head) {
        const float next = smem_load(from + static_cast<uint32_t>(head * 4));
        most = next > most ? next : most;
      }
      args_.logits[(static_cast<int64_t>(item_) * args_.window + query) * args_.n_slots + first_ + row] =
          most * args_.logit_scale;
    }
    weigh_block(products);
    // Every thread sums one pair of components over a share of the rows.
    constexpr int kPairs = kHeadDim / 2, kShares = kRkvThreads / kPairs;
    float low = 0, high = 0;
    const int pair = thread_ % kPairs, share = thread_ / kPairs;
    for (int row = share; row < kRkvRows; row += kShares) {
      float a, b;
      Tile::load_pair(row_address(row), 2 * pair, a, b);
      const float inverse = smem_load(norms + static_cast<uint32_t>(row * 4));
      low += a * inverse, high += b * inverse;
    }
    block_sync();  // the products are read; their place takes the shares
    smem_store(products + static_cast<uint32_t>((share * kHeadDim + 2 * pair) * 4), low);
    smem_store(products + static_cast<uint32_t>((share * kHeadDim + 2 * pair + 1) * 4), high);
    block_sync();
    if (thread_ >= kHeadDim) return;
    float total = 0;
    for (int i = 0; i < kShares; ++i)
      total += smem_load(products + static_cast<uint32_t>((i * kHeadDim + thread_) * 4));
    args_.partial_sum[(static_cast<int64_t>(item_) * args_.row_blocks + first_ / kRkvRows) * kHeadDim +
                      thread_] = total;
  }

  // Each row's last similar key, and its part of the column sums.
  KVLAPSE_DEVICE void similar() {
    if (held_ < args_.budget || first_ >= held_) return;
    const SmemAddress row_norms = keys_ + static_cast<uint32_t>(2 * kRkvColumns * Tile::kRowBytes);
    const SmemAddress key_norms = row_norms + kRkvRows * 4, sum = key_norms + 2 * kRkvColumns * 4,
                      flags = sum + kHeadDim * 4;
    load_rows();
    if (thread_ < kRkvRows)
      smem_store(row_norms + static_cast<uint32_t>(thread_ * 4),
                 first_ + thread_ < held_ ? args_.inverse_norm[at(first_ + thread_)] : 0.0f);
    if (thread_ < kHeadDim) {
      float total = 0;
      KVLAPSE_UNROLL_8
      for (int block = 0; block * kRkvRows < held_; ++block)
        total +=
            args_.partial_sum[(static_cast<int64_t>(item_) * args_.row_blocks + block) * kHeadDim + thread_];
      smem_store(sum + static_cast<uint32_t>(thread_ * 4), total);
    }
    int tile = (held_ - 1) / kRkvColumns, buffer = 0;
    load_keys(tile, buffer, key_norms);
    block_sync();
    if (thread_ < kRkvRows && first_ + thread_ < held_) {
      float dot = 0, square = 0;
      for (int chunk = 0; chunk < Tile::kRowChunks; ++chunk) {
        float v[Tile::kChunkValues];
        Tile::load_chunk(row_address(thread_), chunk, v);
        KVLAPSE_UNROLL
        for (int i = 0; i < Tile::kChunkValues; ++i) {
          dot += v[i] * smem_load(sum + static_cast<uint32_t>((chunk * Tile::kChunkValues + i) * 4));
          square += v[i] * v[i];
        }
      }
      const float inverse = smem_load(row_norms + static_cast<uint32_t>(thread_ * 4));
      args_.projection[at(first_ + thread_)] = dot * inverse - square * inverse * inverse;
    }

    const int g = lane_ / 4, t = lane_ % 4;
    const int low_row = first_ + warp_ * 16 + g;  // and + 8
    uint64_t found[2] = {0, 0};                   // (rank + 1) << 32 | bits of the cosine
    KVLAPSE_NO_UNROLL
    for (; tile >= 0; --tile, buffer ^= 1) {
      Prefetched next;
      if (tile > 0) prefetch_keys(next, tile - 1);
      float c[kColumnTiles][4];
      Tile::products(c, row_address(warp_ * 16),
                     keys_ + static_cast<uint32_t>(buffer * kRkvColumns * Tile::kRowBytes), lane_);
      bool done = true;
      KVLAPSE_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = low_row + half * 8;
        const float inverse = smem_load(row_norms + static_cast<uint32_t>((row - first_) * 4));
        uint64_t best = 0, fallback = 0;
        KVLAPSE_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          KVLAPSE_UNROLL
          for (int j = 0; j < 2; ++j) {
            const int column = 8 * n + 2 * t + j, key = tile * kRkvColumns + column;
            const float cosine =
                key == row
                    ? 0.0f
                    : c[n][half * 2 + j] * inverse *
                          smem_load(key_norms + static_cast<uint32_t>((buffer * kRkvColumns + column) * 4));
            const uint64_t packed = (static_cast<uint64_t>(key + 1) << 32) | float_bits(cosine);
            if (key < held_ && cosine > args_.threshold) best = best > packed ? best : packed;
            if (key == 0) fallback = packed;
          }
        }
        best = quad_max(best);
        if (tile == 0) fallback = quad_max(fallback);
        if (found[half] == 0) found[half] = best != 0 ? best : fallback;
        done = done && (found[half] != 0 || row >= held_);
      }
      const bool all = warp_ballot(done) == 0xffffffffu;
      if (lane_ == 0) smem_store(flags + static_cast<uint32_t>(warp_ * 4), all ? 1.0f : 0.0f);
      if (tile > 0) store_keys(next, buffer ^ 1, key_norms);
      block_sync();
      bool everyone = true;
      for (int w = 0; w < kWarps; ++w)
        everyone = everyone && smem_load(flags + static_cast<uint32_t>(w * 4)) != 0;
      block_sync();  // the flags and the buffer just read are written again
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

  // Max and sum of exp of each query's logits over this block's rows before the window, a warp a query.
  KVLAPSE_DEVICE void weigh_block(SmemAddress products) const {
    constexpr int kRowsOfLane = kRkvRows / 32;
    const int n = held_ - args_.window - first_;
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
        value[i] = row < n ? value[i] * args_.logit_scale : kNothing;
        most = value[i] > most ? value[i] : most;
      }
      for (int mask = 16; mask > 0; mask >>= 1) {
        const float other = shuffle_xor(most, mask);
        most = other > most ? other : most;
      }
      float sum = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < kRowsOfLane; ++i)
        if (lane_ + 32 * i < n) sum += exponential(value[i] - most);
      for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
      if (lane_ != 0) continue;
      float* to =
          args_.softmax +
          ((static_cast<int64_t>(item_) * args_.row_blocks + first_ / kRkvRows) * args_.window + query) * 2;
      to[0] = most, to[1] = sum;
    }
  }

 private:
  static constexpr float kNothing = -1e30f;
  static constexpr int kStride = kRkvColumns + 1;
  struct Prefetched {
    Float4 chunks[kRkvColumns * Tile::kRowChunks / kRkvThreads];
    float norm;
  };

  KVLAPSE_DEVICE int64_t at(int rank) const { return static_cast<int64_t>(item_) * args_.n_slots + rank; }
  KVLAPSE_DEVICE SmemAddress row_address(int row) const {
    return rows_ + static_cast<uint32_t>(row * Tile::kRowBytes);
  }
  // All loads of a thread are in flight together: slots, then rows.
  template <int kRowCount>
  KVLAPSE_DEVICE void gather(Float4 (&to)[kRowCount * Tile::kRowChunks / kRkvThreads], int first) const {
    constexpr int kChunks = kRowCount * Tile::kRowChunks / kRkvThreads;
    int slot[kChunks];
    KVLAPSE_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      const int rank = first + (thread_ + i * kRkvThreads) / Tile::kRowChunks;
      slot[i] = rank < held_ ? args_.order[at(rank)] : -1;
    }
    KVLAPSE_UNROLL
    for (int i = 0; i < kChunks; ++i)
      to[i] =
          slot[i] < 0
              ? Float4{0, 0, 0, 0}
              : static_cast<const Float4*>(
                    args_.k)[at(slot[i]) * Tile::kRowChunks + (thread_ + i * kRkvThreads) % Tile::kRowChunks];
  }
  template <int kRowCount>
  KVLAPSE_DEVICE void spread(const Float4 (&from)[kRowCount * Tile::kRowChunks / kRkvThreads],
                             SmemAddress to) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRowCount * Tile::kRowChunks / kRkvThreads; ++i) {
      const int chunk = thread_ + i * kRkvThreads;
      smem_store4(to + static_cast<uint32_t>(chunk / Tile::kRowChunks * Tile::kRowBytes +
                                             chunk % Tile::kRowChunks * 16),
                  from[i]);
    }
  }
  KVLAPSE_DEVICE void load_rows() const {
    Float4 chunks[kRkvRows * Tile::kRowChunks / kRkvThreads];
    gather<kRkvRows>(chunks, first_);
    spread<kRkvRows>(chunks, rows_);
  }
  KVLAPSE_DEVICE void load_queries() const {
    const int b = item_ / args_.n_kv_heads, h = item_ % args_.n_kv_heads,
              n_q_heads = args_.n_kv_heads * args_.group;
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
  KVLAPSE_DEVICE void prefetch_keys(Prefetched& to, int tile) const {
    gather<kRkvColumns>(to.chunks, tile * kRkvColumns);
    const int rank = tile * kRkvColumns + thread_;
    to.norm = thread_ < kRkvColumns && rank < held_ ? args_.inverse_norm[at(rank)] : 0.0f;
  }
  KVLAPSE_DEVICE void store_keys(const Prefetched& from, int buffer, SmemAddress norms) const {
    spread<kRkvColumns>(from.chunks, keys_ + static_cast<uint32_t>(buffer * kRkvColumns * Tile::kRowBytes));
    if (thread_ < kRkvColumns)
      smem_store(norms + static_cast<uint32_t>((buffer * kRkvColumns + thread_) * 4), from.norm);
  }
  KVLAPSE_DEVICE void load_keys(int tile, int buffer, SmemAddress norms) const {
    Prefetched keys;
    prefetch_keys(keys, tile);
    store_keys(keys, buffer, norms);
  }
  KVLAPSE_DEVICE static float inverse_norm(SmemAddress row) {
    float square = 0;
    for (int chunk = 0; chunk < Tile::kRowChunks; ++chunk) {
      float v[Tile::kChunkValues];
      Tile::load_chunk(row, chunk, v);
      KVLAPSE_UNROLL
      for (int i = 0; i < Tile::kChunkValues; ++i) square += v[i] * v[i];
    }
    return 1.0f / (square_root(square) + 1e-8f);
  }
  KVLAPSE_DEVICE static uint64_t quad_max(uint64_t v) {
    for (int mask = 1; mask < 4; mask *= 2) {
      const uint64_t other = shuffle_xor(v, mask);
      v = v > other ? v : other;
    }
    return v;
  }

  static_assert(kRkvColumns * Tile::kRowChunks % kRkvThreads == 0);

  const RkvArgs& args_;
  const int item_, first_, held_, thread_, warp_, lane_;
  const SmemAddress rows_, keys_;
};

// One block a head: scores, order, moves.
template <int kHeadDim, class Element>
class RkvSelect {
 public:
  static constexpr int kThreads = kRkvSelectThreads, kWarps = kThreads / 32;
  static constexpr int kRowChunks = RkvTile<kHeadDim, Element>::kRowChunks;
  static constexpr float kFixedPoint = 1099511627776.0f;  // 2^40: sums of cosines in integers, in any order

  KVLAPSE_DEVICE RkvSelect(const RkvArgs& args, unsigned char* shared)
      : args_(args),
        item_(block_index()),
        held_(args.count[item_]),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        sorted_(reinterpret_cast<uint64_t*>(shared)),
        importance_(reinterpret_cast<float*>(sorted_ + rkv_power_of_two(args.n_slots))),
        redundancy_(importance_ + args.n_slots),
        tail_rank_(reinterpret_cast<int32_t*>(redundancy_ + args.n_slots)),
        holes_(tail_rank_ + (args.n_slots - args.budget)),
        movers_(holes_ + (args.n_slots - args.budget)),
        warp_values_(reinterpret_cast<float*>(movers_ + (args.n_slots - args.budget))),
        row_max_(warp_values_ + kWarps),
        row_inverse_(row_max_ + kRkvColumns),
        n_moves_(reinterpret_cast<int32_t*>(row_inverse_ + kRkvColumns)) {}

  KVLAPSE_DEVICE void run() {
    if (held_ < args_.budget) return;
    weigh_window();
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
  template <bool kMax>
  KVLAPSE_DEVICE float block_reduce(float v) {
    v = warp_reduce<kMax>(v);
    if (lane_ == 0) warp_values_[warp_] = v;
    block_sync();
    float total = warp_values_[0];
    for (int w = 1; w < kWarps; ++w)
      total = kMax ? (warp_values_[w] > total ? warp_values_[w] : total) : total + warp_values_[w];
    block_sync();
    return total;
  }

  // importance = max pool of the mean over queries of their softmax before the window.
  KVLAPSE_DEVICE void weigh_window() {
    const int n = prefix();
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
    for (int i = thread_; i < n; i += kThreads) {
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
    for (int i = thread_; i < n; i += kThreads) {
      float most = redundancy_[i];
      for (int j = i - half > 0 ? i - half : 0; j <= i + half && j < n; ++j)
        most = redundancy_[j] > most ? redundancy_[j] : most;
      importance_[i] = most;
    }
  }

  // redundancy = softmax over all ranks of the mean cosine without what was forgiven.
  KVLAPSE_DEVICE void forgive() {
    for (int i = thread_; i < held_; i += kThreads) sorted_[i] = 0;
    block_sync();
    // Often a whole warp forgives the same key: its sum is added once.
    for (int first = 0; first < held_; first += kThreads) {
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
    for (int i = thread_; i < held_; i += kThreads) {
      const float forgiven = static_cast<float>(static_cast<int64_t>(sorted_[i])) * (1.0f / kFixedPoint);
      const float mean = (args_.projection[at(i)] - forgiven) * scale;
      redundancy_[i] = mean;
      most = mean > most ? mean : most;
    }
    most = block_reduce<true>(most);
    float sum = 0;
    for (int i = thread_; i < held_; i += kThreads) {
      const float weight = exponential(redundancy_[i] - most);
      redundancy_[i] = weight;
      sum += weight;
    }
    const float inverse = 1.0f / block_reduce<false>(sum);
    for (int i = thread_; i < held_; i += kThreads) redundancy_[i] *= inverse;
    block_sync();
  }

  // Ascending keys: the highest score first, the lowest rank first among equals.
  KVLAPSE_DEVICE void score() {
    const int n = prefix(), padded = rkv_power_of_two(n);
    for (int i = thread_; i < padded; i += kThreads) {
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

  KVLAPSE_DEVICE void sort() {  // bitonic
    const int n = rkv_power_of_two(prefix());
    for (int size = 2; size <= n; size *= 2)
      for (int stride = size / 2; stride > 0; stride /= 2) {
        for (int i = thread_; i < n / 2; i += kThreads) {
          const int low = i / stride * stride * 2 + i % stride, high = low + stride;
          const uint64_t a = sorted_[low], b = sorted_[high];
          if ((a > b) == ((low & size) == 0)) sorted_[low] = b, sorted_[high] = a;
        }
        block_sync();
      }
  }

  // New order of the survivors; who moves where.
  KVLAPSE_DEVICE void rearrange() {
    const int n = prefix(), kept = args_.budget - args_.window, drops = held_ - args_.budget;
    int32_t* slots = reinterpret_cast<int32_t*>(importance_);  // of the new ranks; the scores are used up
    for (int i = thread_; i < args_.n_slots - args_.budget; i += kThreads) tail_rank_[i] = -1;
    block_sync();
    for (int i = thread_; i < args_.budget; i += kThreads) {
      const int old = i < kept ? static_cast<int>(static_cast<uint32_t>(sorted_[i])) : i - kept + n;
      const int slot = args_.order[at(old)];
      slots[i] = slot;
      if (slot >= args_.budget) tail_rank_[slot - args_.budget] = i;
    }
    if (args_.evicted != nullptr)
      for (int i = thread_; i < args_.n_slots - args_.budget; i += kThreads)
        args_.evicted[static_cast<int64_t>(item_) * (args_.n_slots - args_.budget) + i] =
            i < drops ? args_.positions[at(
                            args_.order[at(static_cast<int>(static_cast<uint32_t>(sorted_[kept + i])))])]
                      : -1;
    block_sync();
    if (warp_ == 0) {
      // As many holes below the budget as survivors behind it, both in the order that they are met.
      int n_holes = 0, n_movers = 0;
      for (int first = 0; first < drops; first += 32) {
        const int i = first + lane_;
        int slot = args_.n_slots;
        if (i < drops) slot = args_.order[at(static_cast<int>(static_cast<uint32_t>(sorted_[kept + i])))];
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
    for (int i = thread_; i < *n_moves_; i += kThreads)
      slots[tail_rank_[movers_[i] - args_.budget]] = holes_[i];
    block_sync();
    for (int i = thread_; i < args_.budget; i += kThreads) args_.order[at(i)] = slots[i];
    for (int i = args_.budget + thread_; i < args_.n_slots; i += kThreads)
      args_.order[at(i)] = i;  // where tokens come next
    if (thread_ == 0) args_.count[item_] = args_.budget;
  }

  KVLAPSE_DEVICE void move_rows() {
    for (int i = thread_; i < *n_moves_ * kRowChunks; i += kThreads) {
      const int64_t from = at(movers_[i / kRowChunks]) * kRowChunks + i % kRowChunks,
                    to = at(holes_[i / kRowChunks]) * kRowChunks + i % kRowChunks;
      static_cast<Float4*>(args_.k)[to] = static_cast<Float4*>(args_.k)[from];
      static_cast<Float4*>(args_.v)[to] = static_cast<Float4*>(args_.v)[from];
    }
    for (int i = thread_; i < *n_moves_; i += kThreads) {
      const int64_t from = at(movers_[i]), to = at(holes_[i]);
      if (args_.positions != nullptr) args_.positions[to] = args_.positions[from];
      if (args_.value_l1 != nullptr) args_.value_l1[to] = args_.value_l1[from];
    }
  }

  const RkvArgs& args_;
  const int item_, held_, thread_, warp_, lane_;
  uint64_t* sorted_;  // scores with ranks; before that what is forgiven
  float* importance_;
  float* redundancy_;
  int32_t* tail_rank_;  // new rank of the token in slot budget + i, -1: none
  int32_t* holes_;
  int32_t* movers_;
  float* warp_values_;
  float* row_max_;
  float* row_inverse_;
  int32_t* n_moves_;
};

}  // namespace kvlapse::device
