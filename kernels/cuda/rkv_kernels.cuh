// An R-KV compaction (contract: kernels/decode/rkv_args.h), written in the operations of device_ops.cuh only,
// so that the CPU emulator of the tests compiles the same text; include device_ops.cuh (or the emulator)
// first.
//   RkvRows: 32 rows a warp, which go from device memory straight into the registers that multiply them and
//   stay there through both phases where these are one launch: norms, logits of the window (kept for phase
//   two), sums; then projections, importance and the search, which multiplies rows with tiles of keys from
//   the end and stops when every row has its key.
//   RkvSelect: softmax, pool, scores, order (a sort by buckets of equal width), moves of a head, by the block
//   of it that ends last.
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

// Rows in shared memory in chunks of 16 bytes. Odd rows swap the halves of 128 bytes, so that two rows are
// read without a bank conflict, 64 bytes of each.
template <int kHeadDim, class Element>
struct RkvTile {
  static constexpr int kBytes = RkvElement<Element>::kBytes;
  static constexpr int kRowBytes = kHeadDim * kBytes;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kLaneChunks = kRowChunks / 4;  // of a row that four lanes share: 4 j + t
  static constexpr int kChunkValues = 16 / kBytes;

  KVLAPSE_DEVICE static SmemAddress chunk_address(SmemAddress rows, int row, int chunk) {
    const int at = kRowChunks >= 8 ? chunk ^ ((row & 1) * 4) : chunk;
    return rows + static_cast<uint32_t>(row * kRowBytes + at * 16);
  }
  KVLAPSE_DEVICE static void values_of(const Float4& chunk, float (&v)[kChunkValues]) {
    const float words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kBytes == 4)
        v[i] = words[i];
      else
        unpack2<Element>(float_bits(words[i]), v[2 * i], v[2 * i + 1]);
    }
  }
};

// 32 rows of a warp in registers. Lane (g, t) = (lane / 4, lane % 4) has chunks 4 j + t of rows
// 16 m + 8 half + g. Products sum over components in any order that both sides agree on, so that these chunks
// are operands of mma as they are, and so are the same chunks of a row in shared memory.
template <int kHeadDim, class Element>
class RkvFragments {
 public:
  using Tile = RkvTile<kHeadDim, Element>;
  static constexpr int kValues = Tile::kChunkValues;

  // row(m, half): a row of chunks.
  template <class Row>
  KVLAPSE_DEVICE void load(int lane, Row row) {
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Float4* const from = row(i / 2, i % 2) + lane % 4;
      KVLAPSE_UNROLL
      for (int j = 0; j < Tile::kLaneChunks; ++j) chunks_[i / 2][i % 2][j] = from[4 * j];
    }
  }

  // c[m][n][..] = rows x 8 rows in shared memory, in the layout of mma's C: lane (g, t) has rows g and g + 8,
  // columns 2t, + 1. row_of(n, column): which row of `rows` a column is.
  template <int kTiles, class RowOf>
  KVLAPSE_DEVICE void products(float (&c)[2][kTiles][4], SmemAddress rows, int lane, RowOf row_of) const {
    const int g = lane / 4, t = lane % 4;
    KVLAPSE_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      KVLAPSE_UNROLL
      for (int i = 0; i < 8; ++i) c[i / 4][n][i % 4] = 0;
    }
    if constexpr (Tile::kBytes == 4) {
      for (int n = 0; n < kTiles; ++n) {
        KVLAPSE_UNROLL
        for (int column = 0; column < 8; ++column) {
          float dot[4] = {0, 0, 0, 0};
          const int row = row_of(n, column);
          KVLAPSE_UNROLL
          for (int j = 0; j < Tile::kLaneChunks; ++j) {
            const Float4 key = smem_load4(Tile::chunk_address(rows, row, 4 * j + t));
            KVLAPSE_UNROLL
            for (int i = 0; i < 4; ++i) {
              const Float4& own = chunks_[i / 2][i % 2][j];
              dot[i] += own.x * key.x + own.y * key.y + own.z * key.z + own.w * key.w;
            }
          }
          quad_sum(dot);
          KVLAPSE_UNROLL
          for (int i = 0; i < 4; ++i)
            if (t == column / 2) c[i / 2][n][i % 2 * 2 + column % 2] = dot[i];
        }
      }
    } else {
      SmemAddress row[kTiles];
      KVLAPSE_UNROLL
      for (int n = 0; n < kTiles; ++n) row[n] = Tile::chunk_address(rows, row_of(n, g), t);
      KVLAPSE_UNROLL
      for (int j = 0; j < Tile::kLaneChunks; ++j) {
        KVLAPSE_UNROLL
        for (int n = 0; n < kTiles; ++n) {
          // Chunk 4 j + t of the row: the swizzle turns bit 6 of the offset, whatever j is.
          const SmemAddress at = Tile::kRowChunks >= 8 ? row[n] ^ static_cast<uint32_t>(j % 2 * 64) : row[n];
          multiply_add(c, n, j, smem_load4(at + static_cast<uint32_t>(j / 2 * 128)));
        }
      }
    }
  }

  // Of [m][half], the same in the four lanes of a row.
  KVLAPSE_DEVICE void squares(float (&square)[4], int lane) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      square[i] = 0;
      if constexpr (Tile::kBytes == 4) {
        KVLAPSE_UNROLL
        for (int j = 0; j < Tile::kLaneChunks; ++j) {
          const Float4& v = chunks_[i / 2][i % 2][j];
          square[i] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
      } else {
        // The diagonal of rows x rows: eight rows are a column operand as they are.
        float c[4] = {0, 0, 0, 0};
        KVLAPSE_UNROLL
        for (int j = 0; j < Tile::kLaneChunks; ++j) multiply_add(c, i / 2, j, chunks_[i / 2][i % 2][j]);
        const int g = lane / 4;
        if (lane % 4 == g / 2) square[i] = g % 2 == 0 ? c[i % 2 * 2] : c[i % 2 * 2 + 1];
      }
    }
    quad_sum(square);
  }

  // Sum over the rows of value x factor[m][half], into floats [kHeadDim] of shared memory.
  KVLAPSE_DEVICE void sum_rows(const float (&factor)[4], SmemAddress to, int lane) const {
    KVLAPSE_UNROLL
    for (int j = 0; j < Tile::kLaneChunks; ++j) {
      float sum[kValues];
      KVLAPSE_UNROLL
      for (int e = 0; e < kValues; ++e) sum[e] = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < 4; ++i) {
        float v[kValues];
        Tile::values_of(chunks_[i / 2][i % 2][j], v);
        KVLAPSE_UNROLL
        for (int e = 0; e < kValues; ++e) sum[e] += v[e] * factor[i];
      }
      // Over g: lanes halve what they hold while they add.
      int first = 0;
      KVLAPSE_UNROLL
      for (int step = 0; step < 3; ++step) {
        const int mask = 16 >> step, n = kValues >> (step + 1);
        if (n == 0) {
          sum[0] += shuffle_xor(sum[0], mask);
          continue;
        }
        const bool upper = (lane & mask) != 0;
        KVLAPSE_UNROLL
        for (int e = 0; e < n; ++e) {
          const float sent = upper ? sum[e] : sum[e + n];
          sum[e] = (upper ? sum[e + n] : sum[e]) + shuffle_xor(sent, mask);
        }
        first += upper ? n : 0;
      }
      smem_store(to + static_cast<uint32_t>(((4 * j + lane % 4) * kValues + first) * 4), sum[0]);
    }
  }

  // Rows x the vector that store_vector made.
  KVLAPSE_DEVICE void project(float (&dot)[4], SmemAddress vector, int lane) const {
    const int t = lane % 4;
    if constexpr (Tile::kBytes == 4) {
      KVLAPSE_UNROLL
      for (int i = 0; i < 4; ++i) dot[i] = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < Tile::kLaneChunks; ++j) {
        const Float4 v = smem_load4(Tile::chunk_address(vector, 0, 4 * j + t));
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i) {
          const Float4& own = chunks_[i / 2][i % 2][j];
          dot[i] += own.x * v.x + own.y * v.y + own.z * v.z + own.w * v.w;
        }
      }
    } else {
      float c[2][1][4];
      products(c, vector, lane, [](int, int column) { return column < 2 ? column : 2; });
      KVLAPSE_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float first = c[i / 2][0][i % 2 * 2], second = c[i / 2][0][i % 2 * 2 + 1];
        dot[i] = t == 0 ? first + second : t == 1 ? first : 0.0f;
      }
    }
    quad_sum(dot);
  }
  // Component d of a vector, by the lanes of a warp in a row: three rows of elements that add up to it.
  KVLAPSE_DEVICE static void store_vector(SmemAddress vector, int d, float value) {
    const int chunk = d / kValues, offset = d % kValues * Tile::kBytes;
    if constexpr (Tile::kBytes == 4) {
      smem_store(Tile::chunk_address(vector, 0, chunk) + static_cast<uint32_t>(offset), value);
    } else {
      float rest[2] = {value, shuffle_xor(value, 1)};
      KVLAPSE_UNROLL
      for (int part = 0; part < 3; ++part) {
        const uint32_t packed = pack2<Element>(rest[0], rest[1]);
        float low, high;
        unpack2<Element>(packed, low, high);
        rest[0] -= low, rest[1] -= high;
        if (d % 2 == 0)
          smem_store(Tile::chunk_address(vector, part, chunk) + static_cast<uint32_t>(offset),
                     bits_float(packed));
      }
    }
  }

  KVLAPSE_DEVICE static void quad_sum(float (&v)[4]) {
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      v[i] += shuffle_xor(v[i], 1);
      v[i] += shuffle_xor(v[i], 2);
    }
  }

 private:
  KVLAPSE_DEVICE void multiply_add(float (&c)[4], int m, int j, const Float4& b) const {
    const Float4 &low = chunks_[m][0][j], &high = chunks_[m][1][j];
    const uint32_t first[4] = {float_bits(low.x), float_bits(high.x), float_bits(low.y), float_bits(high.y)};
    multiply_add_16x8x16<Element>(c, first, float_bits(b.x), float_bits(b.y));
    const uint32_t second[4] = {float_bits(low.z), float_bits(high.z), float_bits(low.w), float_bits(high.w)};
    multiply_add_16x8x16<Element>(c, second, float_bits(b.z), float_bits(b.w));
  }
  template <int kTiles>
  KVLAPSE_DEVICE void multiply_add(float (&c)[2][kTiles][4], int n, int j, const Float4& b) const {
    multiply_add(c[0][n], 0, j, b);
    multiply_add(c[1][n], 1, j, b);
  }

  Float4 chunks_[2][2][Tile::kLaneChunks];
};

constexpr float kRkvFixedPoint = 1099511627776.0f;  // 2^40

// One block a head: scores, order, moves.
template <int kHeadDim, class Element>
class RkvSelect {
 public:
  static constexpr int kRowChunks = RkvTile<kHeadDim, Element>::kRowChunks;
  static constexpr int kMaxWarps = kRkvThreads / 32;
  static constexpr float kFinite = 3.0e38f;
  static constexpr uint32_t kNegativeNan = 0xff800001u;  // as the upper half of a key, and what follows

  KVLAPSE_DEVICE RkvSelect(const RkvArgs& args, unsigned char* shared, int item, int held)
      : args_(args),
        item_(item),
        held_(held),
        n_threads_(args.block_threads),
        n_warps_(n_threads_ / 32),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        sorted_(reinterpret_cast<uint64_t*>(shared)),
        spare_(sorted_ + args.stride),
        importance_(reinterpret_cast<float*>(spare_)),
        redundancy_(importance_ + args.stride),
        tail_rank_(reinterpret_cast<int32_t*>(redundancy_ + args.stride)),
        holes_(tail_rank_ + (args.n_slots - args.budget)),
        movers_(holes_ + (args.n_slots - args.budget)),
        victims_(movers_ + (args.n_slots - args.budget)),
        group_sums_(reinterpret_cast<float*>(victims_ + (args.n_slots - args.budget))),
        warp_values_(group_sums_ + kRkvMaxSlots / 32),
        totals_(reinterpret_cast<int32_t*>(warp_values_ + 2 * kMaxWarps)),
        n_moves_(totals_ + kMaxWarps),
        buckets_(reinterpret_cast<int32_t*>(shared + rkv_select_smem_bytes(args)) - kRkvBuckets) {}

  KVLAPSE_DEVICE void run() {
    weigh(load_means());
    score();
    sort();
    rearrange();
    move_rows();
  }

 private:
  KVLAPSE_DEVICE int64_t at(int rank) const { return static_cast<int64_t>(item_) * args_.n_slots + rank; }
  KVLAPSE_DEVICE int prefix() const { return held_ - args_.window; }

  template <bool kMax>
  KVLAPSE_DEVICE static float warp_reduce(float v) {
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float other = shuffle_xor(v, mask);
      v = kMax ? maximum(v, other) : v + other;
    }
    return v;
  }

  // Importance before the pool, and the mean cosine without what was forgiven, whose largest it returns.
  KVLAPSE_DEVICE float load_means() {
    constexpr int kAtOnce = 8;
    const int64_t row = static_cast<int64_t>(item_) * args_.stride;
    const float scale = 1.0f / static_cast<float>(held_);
    float most = -kFinite;
    for (int i = thread_; i < kRkvBuckets; i += n_threads_) buckets_[i] = 0;
    KVLAPSE_NO_UNROLL
    for (int first = thread_; first < held_; first += kAtOnce * n_threads_) {
      float importance[kAtOnce], projection[kAtOnce];
      uint64_t forgiven[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_;
        const int64_t from = row + (i < held_ ? i : first);
        importance[u] = load_shared_by_device(args_.importance + from);
        projection[u] = load_shared_by_device(args_.projection + from);
        forgiven[u] = load_shared_by_device(args_.forgiven + from);
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_;
        if (i >= held_) break;
        const float sum = static_cast<float>(static_cast<int64_t>(forgiven[u])) * (1.0f / kRkvFixedPoint);
        const float mean = (projection[u] - sum) * scale;
        importance_[i] = importance[u], redundancy_[i] = mean;
        most = maximum(most, mean);
      }
    }
    most = warp_reduce<true>(most);
    if (lane_ == 0) warp_values_[warp_] = most;
    block_sync();
    return warp_reduce<true>(warp_values_[lane_ < n_warps_ ? lane_ : 0]);
  }

  // redundancy = exp of it; the sum in an order that no block's size changes: of 32 ranks, then of those.
  KVLAPSE_DEVICE void weigh(float most) {
    const int groups = (held_ + 31) / 32;
    for (int group = warp_; group < groups; group += n_warps_) {
      const int i = group * 32 + lane_;
      const float weight = i < held_ ? exponential(redundancy_[i] - most) : 0.0f;
      if (i < held_) redundancy_[i] = weight;
      const float sum = warp_reduce<false>(weight);
      if (lane_ == 0) group_sums_[group] = sum;
    }
    block_sync();
    float sum = 0;
    for (int group = lane_; group < groups; group += 32) sum += group_sums_[group];
    inverse_sum_ = 1.0f / warp_reduce<false>(sum);
  }

  // Ascending keys: the highest score first, the lowest rank first among equals.
  KVLAPSE_DEVICE void score() {
    const int n = prefix(), half = args_.kernel / 2;
    float most = -kFinite, least = kFinite;
    for (int i = thread_; i < n; i += n_threads_) {
      float pooled = importance_[i];
      for (int j = i - half > 0 ? i - half : 0; j <= i + half && j < n; ++j)
        pooled = maximum(pooled, importance_[j]);
      const float z = pooled * args_.lambda - redundancy_[i] * inverse_sum_ * (1.0f - args_.lambda);
      if (args_.scores != nullptr) args_.scores[at(i)] = z;
      most = z > most ? z : most;
      least = z < least ? z : least;
      const uint32_t bits = float_bits(z);
      const uint32_t rising = (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
      sorted_[i] = (static_cast<uint64_t>(~rising) << 32) | static_cast<uint32_t>(i);
    }
    most = warp_reduce<true>(most), least = -warp_reduce<true>(-least);
    if (lane_ == 0) warp_values_[warp_] = most, warp_values_[kMaxWarps + warp_] = least;
    block_sync();
    const int from = lane_ < n_warps_ ? lane_ : 0;
    highest_ = warp_reduce<true>(warp_values_[from]);
    bucket_scale_ =
        static_cast<float>(kRkvBuckets - 1) / (highest_ + warp_reduce<true>(-warp_values_[kMaxWarps + from]));
  }

  // Which part of the range of scores a key lies in, from the highest; never falls along the order of keys.
  KVLAPSE_DEVICE int bucket_of(uint64_t key) const {
    const auto falling = static_cast<uint32_t>(key >> 32);
    const float z = bits_float((falling & 0x80000000u) != 0 ? falling : ~falling & 0x7fffffffu);
    const float place = (highest_ - z) * bucket_scale_;
    if (!(place > 0)) return falling >= kNegativeNan ? kRkvBuckets - 1 : 0;
    return place < static_cast<float>(kRkvBuckets - 1) ? static_cast<int>(place) : kRkvBuckets - 1;
  }

  // Keys go to their buckets in any order; in its bucket a key's place is the number of smaller ones. Scores
  // that crowd in few buckets cost time only. No two keys are equal.
  KVLAPSE_DEVICE void sort() {
    const int n = prefix();
    for (int i = thread_; i < n; i += n_threads_) shared_add(buckets_ + bucket_of(sorted_[i]), 1);
    block_sync();
    sum_buckets();
    for (int i = thread_; i < n; i += n_threads_) {
      const uint64_t key = sorted_[i];
      spare_[shared_add(buckets_ + bucket_of(key), 1)] = key;
    }
    block_sync();
    for (int i = thread_; i < n; i += n_threads_) {
      const uint64_t key = spare_[i];
      const int bucket = bucket_of(key), start = bucket == 0 ? 0 : buckets_[bucket - 1],
                end = buckets_[bucket];
      int place = start;
      for (int j = start; j < end; ++j) place += spare_[j] < key ? 1 : 0;
      sorted_[place] = key;
    }
    block_sync();
  }
  // Counts to starts. Each warp its share of the buckets, 32 at a time.
  KVLAPSE_DEVICE void sum_buckets() {
    const int share = kRkvBuckets / n_warps_ / 32, rest = kRkvBuckets / 32 - share * n_warps_;
    const int first = warp_ * share + (warp_ < rest ? warp_ : rest),
              last = first + share + (warp_ < rest ? 1 : 0);
    int total = 0;
    for (int group = first; group < last; ++group) total += buckets_[group * 32 + lane_];
    total = warp_sum(total);
    if (lane_ == 0) totals_[warp_] = total;
    block_sync();
    int start = warp_sum(lane_ < warp_ ? totals_[lane_] : 0);
    for (int group = first; group < last; ++group) {
      const int own = buckets_[group * 32 + lane_];
      int sum = own;
      KVLAPSE_UNROLL
      for (int step = 1; step < 32; step *= 2) {
        const int before = shuffle_from(sum, lane_ >= step ? lane_ - step : lane_);
        sum += lane_ >= step ? before : 0;
      }
      buckets_[group * 32 + lane_] = start + sum - own;
      start += shuffle_from(sum, 31);
    }
    block_sync();
  }
  KVLAPSE_DEVICE static int warp_sum(int v) {
    for (int mask = 16; mask > 0; mask >>= 1) v += shuffle_xor(v, mask);
    return v;
  }

  // New order of the survivors; who moves where.
  KVLAPSE_DEVICE void rearrange() {
    const int n = prefix(), kept = args_.budget - args_.window, drops = held_ - args_.budget;
    int32_t* slots = reinterpret_cast<int32_t*>(spare_);  // of the new ranks
    for (int i = thread_; i < args_.n_slots - args_.budget; i += n_threads_) tail_rank_[i] = -1;
    block_sync();
    constexpr int kAtOnce = 4;
    KVLAPSE_NO_UNROLL
    for (int first = thread_; first < held_;
         first += kAtOnce * n_threads_) {  // survivors, victims, the window
      int slot[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_ < held_ ? first + u * n_threads_ : first;
        slot[u] = args_.order[at(i < n ? static_cast<int>(static_cast<uint32_t>(sorted_[i])) : i)];
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_;
        if (i >= held_) break;
        if (i >= kept && i < n) {
          victims_[i - kept] = slot[u];
          continue;
        }
        const int rank = i < kept ? i : i - drops;
        slots[rank] = slot[u];
        if (slot[u] >= args_.budget) tail_rank_[slot[u] - args_.budget] = rank;
      }
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
    constexpr int kAtOnce = 4;
    const int n = *n_moves_ * kRowChunks;
    KVLAPSE_NO_UNROLL
    for (int first = thread_; first < n; first += kAtOnce * n_threads_) {
      Float4 keys[kAtOnce], values[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_;
        if (i >= n) break;
        const int64_t from = at(movers_[i / kRowChunks]) * kRowChunks + i % kRowChunks;
        keys[u] = k[from], values[u] = v[from];
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * n_threads_;
        if (i >= n) break;
        const int64_t to = at(holes_[i / kRowChunks]) * kRowChunks + i % kRowChunks;
        k[to] = keys[u], v[to] = values[u];
      }
    }
    for (int i = thread_; i < *n_moves_; i += n_threads_) {
      const int64_t from = at(movers_[i]), to = at(holes_[i]);
      if (args_.positions != nullptr) args_.positions[to] = args_.positions[from];
      if (args_.value_l1 != nullptr) args_.value_l1[to] = args_.value_l1[from];
    }
  }

  const RkvArgs& args_;
  const int item_, held_, n_threads_, n_warps_, thread_, warp_, lane_;
  float inverse_sum_ = 0;
  float highest_ = 0, bucket_scale_ = 0;
  uint64_t* const sorted_;   // scores with ranks
  uint64_t* const spare_;    // as many
  float* const importance_;  // in its place until the scores are made
  float* const redundancy_;
  int32_t* tail_rank_;  // new rank of the token in slot budget + i, -1: none
  int32_t* holes_;
  int32_t* movers_;
  int32_t* victims_;  // slots, the lowest score last
  float* group_sums_;
  float* warp_values_;
  int32_t* totals_;
  int32_t* n_moves_;
  int32_t* buckets_;  // how many keys, then where they start, then where they end
};

template <int kHeadDim, class Element>
class RkvRows {
 public:
  using Tile = RkvTile<kHeadDim, Element>;
  using Fragments = RkvFragments<kHeadDim, Element>;

  KVLAPSE_DEVICE RkvRows(const RkvArgs& args, unsigned char* shared)
      : args_(args),
        shared_(shared),
        item_(block_index() / args.row_blocks),
        first_(block_index() % args.row_blocks * args.block_rows),
        thread_(thread_index()),
        warp_(thread_ / 32),
        lane_(thread_ % 32),
        g_(lane_ / 4),
        t_(lane_ % 4),
        first_row_(first_ + warp_ * kRkvWarpRows),
        keys_(smem_address(shared)),
        queries_(keys_ + 2 * kKeysBytes),
        vector_(queries_ + static_cast<uint32_t>(args.window * args.group * Tile::kRowBytes)),
        shares_(vector_ + 3 * Tile::kRowBytes),
        parts_(shares_ + static_cast<uint32_t>(args.block_rows / kRkvWarpRows * kHeadDim * 4)),
        barriers_(parts_ + static_cast<uint32_t>(args.block_rows / kRkvWarpRows * args.window * 8)),
        key_norms_(barriers_ + 32),
        tops_(key_norms_ + 2 * kRkvColumns * 4),
        flags_(tops_ + kRkvColumns * 8) {}

  KVLAPSE_DEVICE void run() {
    allow_next_kernel();
    wait_for_previous_kernel();
    int own[4];
    find_rows(own);
    held_ = args_.count[item_];
    if (held_ < args_.budget) return;
    const bool both = args_.phase == RkvPhase::both;
    if (first_ >= held_) {
      if (both) cluster_arrive(), cluster_wait();
      return;
    }
    const int last_tile = (held_ - 1) / kRkvColumns;
    if (thread_ < 3) mbarrier_init(barriers_ + static_cast<uint32_t>(thread_ * 8), args_.block_threads);
    block_sync();
    int slots[kSlots];
    find_keys(slots, args_.phase == RkvPhase::first ? -1 : last_tile);
    load_rows(own);
    if (args_.phase != RkvPhase::second) copy_queries();
    if (args_.phase != RkvPhase::first) copy_keys(slots, last_tile, 0, false);
    measure();
    if (args_.phase != RkvPhase::second) {
      mbarrier_wait(barriers_ + 16, 0);
      sum_rows();
      block_sync();
      sum_units();
    }
    if (both) cluster_arrive(), cluster_wait();
    if (args_.phase == RkvPhase::first) return;
    gather_sums(last_tile);
    block_sync();
    if (has_rows()) {
      project();
      weigh_rows();
    }
    search(last_tile);
    block_sync();
    if (thread_ == 0) {
      const auto last = static_cast<uint32_t>((held_ - 1) / args_.block_rows);
      smem_store(flags_, count_arrival(args_.arrivals + item_, last) == last ? 1.0f : 0.0f);
    }
    block_sync();
    const bool selects = smem_load(flags_) != 0;
    block_sync();
    if (selects) RkvSelect<kHeadDim, Element>(args_, shared_, item_, held_).run();
  }

 private:
  static constexpr float kNothing = -1e30f;
  static constexpr uint32_t kKeysBytes = kRkvColumns * Tile::kRowBytes;
  // Rows of a tile that a thread copies to: four threads a row.
  static constexpr int kSlots = kRkvColumns / (kRkvRows / 4);

  KVLAPSE_DEVICE int64_t at(int rank) const { return static_cast<int64_t>(item_) * args_.n_slots + rank; }
  KVLAPSE_DEVICE int64_t scratch_at(int rank) const {
    return static_cast<int64_t>(item_) * args_.stride + rank;
  }
  KVLAPSE_DEVICE int64_t unit_at(int unit) const { return static_cast<int64_t>(item_) * args_.units + unit; }
  KVLAPSE_DEVICE bool has_rows() const {
    return warp_ * kRkvWarpRows < args_.block_rows && first_row_ < held_;
  }
  // Rank of row i of a lane's four, and of the one that the lane writes of its quad's.
  KVLAPSE_DEVICE int rank_of(int i) const { return first_row_ + 8 * i + g_; }
  KVLAPSE_DEVICE float own_of(const float (&v)[4]) const {
    return (t_ & 2) != 0 ? ((t_ & 1) != 0 ? v[3] : v[2]) : ((t_ & 1) != 0 ? v[1] : v[0]);
  }
  KVLAPSE_DEVICE const Float4* row_of_slot(int slot) const {
    return static_cast<const Float4*>(args_.k) + at(slot) * Tile::kRowChunks;
  }

  // ---- rows, queries and keys on their way ----
  // Before it is known how many tokens are held: what lies behind them is not used.
  KVLAPSE_DEVICE void find_rows(int (&slots)[4]) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i)
      slots[i] = warp_ * kRkvWarpRows < args_.block_rows && rank_of(i) < args_.n_slots
                     ? args_.order[at(rank_of(i))]
                     : 0;
  }
  // A lane without a row has that of slot 0, which is held, and gives it no weight.
  KVLAPSE_DEVICE void load_rows(const int (&slots)[4]) {
    rows_.load(lane_, [&](int m, int half) {
      const int i = 2 * m + half;
      return row_of_slot(rank_of(i) < held_ ? slots[i] : 0);
    });
  }
  KVLAPSE_DEVICE void copy_queries() const {
    const int b = item_ / args_.n_kv_heads, h = item_ % args_.n_kv_heads,
              n_q_heads = args_.n_kv_heads * args_.group, n = args_.window * args_.group;
    for (int row = thread_ / 4; row < n; row += args_.block_threads / 4) {
      const int query = row / args_.group, head = h * args_.group + row % args_.group;
      const Float4* from =
          static_cast<const Float4*>(args_.q) +
          ((static_cast<int64_t>(b) * args_.window + query) * n_q_heads + head) * Tile::kRowChunks;
      copy_row(queries_, row, from);
    }
    copy_async_arrive(barriers_ + 16);
  }
  KVLAPSE_DEVICE void copy_row(SmemAddress to, int row, const Float4* from) const {
    KVLAPSE_UNROLL
    for (int j = 0; j < Tile::kLaneChunks; ++j)
      copy_async16(Tile::chunk_address(to, row, 4 * j + t_), from + 4 * j + t_, true);
  }
  KVLAPSE_DEVICE void find_keys(int (&slots)[kSlots], int tile) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kSlots; ++i) {
      const int row = thread_ / 4 + i * (args_.block_threads / 4), rank = tile * kRkvColumns + row;
      slots[i] = tile >= 0 && row < kRkvColumns ? args_.order[at(rank < held_ ? rank : 0)] : -1;
    }
  }
  KVLAPSE_DEVICE void copy_keys(const int (&slots)[kSlots], int tile, int buffer, bool with_norms) const {
    if (tile < 0) return;
    KVLAPSE_UNROLL
    for (int i = 0; i < kSlots; ++i)
      if (slots[i] >= 0)
        copy_row(keys_ + static_cast<uint32_t>(buffer) * kKeysBytes,
                 thread_ / 4 + i * (args_.block_threads / 4), row_of_slot(slots[i]));
    if (with_norms && thread_ < kRkvColumns / 4)
      copy_async16(key_norms_ + static_cast<uint32_t>((buffer * kRkvColumns + 4 * thread_) * 4),
                   args_.inverse_norm + scratch_at(tile * kRkvColumns + 4 * thread_), true);
    copy_async_arrive(barriers_ + static_cast<uint32_t>(buffer * 8));
  }

  // ---- phase one ----
  KVLAPSE_DEVICE void measure() {
    rows_.squares(square_, lane_);
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i)
      inverse_[i] = rank_of(i) < held_ ? 1.0f / (square_root(square_[i]) + 1e-8f) : 0.0f;
  }
  KVLAPSE_DEVICE void sum_rows() const {
    if (warp_ * kRkvWarpRows >= args_.block_rows) return;
    rows_.sum_rows(inverse_, shares_ + static_cast<uint32_t>(warp_ * kHeadDim * 4), lane_);
    if (rank_of(t_) < args_.stride) {
      args_.inverse_norm[scratch_at(rank_of(t_))] = own_of(inverse_);
      args_.forgiven[scratch_at(rank_of(t_))] = 0;
    }
    const SmemAddress parts = parts_ + static_cast<uint32_t>(warp_ * args_.window * 8);
    for (int tile = 0; tile * 8 < args_.window; ++tile) {
      float logit[4][2];
      weigh_queries(logit, tile);
      if (has_rows()) {
        Float4* const kept = logits_of(tile);
        kept[0] = Float4{logit[0][0], logit[0][1], logit[1][0], logit[1][1]};
        kept[32] = Float4{logit[2][0], logit[2][1], logit[3][0], logit[3][1]};
      }
      KVLAPSE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float most = kNothing, sum = 0;
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i)
          if (is_before_window(i)) most = maximum(most, logit[i][e]);
        for (int mask = 4; mask < 32; mask *= 2) most = maximum(most, shuffle_xor(most, mask));
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i)
          if (is_before_window(i)) sum += exponential(logit[i][e] - most);
        for (int mask = 4; mask < 32; mask *= 2) sum += shuffle_xor(sum, mask);
        const int query = query_of(tile, e);
        if (g_ != 0 || query < 0) continue;
        smem_store(parts + static_cast<uint32_t>(query * 8), most);
        smem_store(parts + static_cast<uint32_t>(query * 8 + 4), sum);
      }
    }
  }
  // Where a lane finds the logits of its rows again: [2][32 lanes] of four.
  KVLAPSE_DEVICE Float4* logits_of(int tile) const {
    const int tiles = (args_.window + 7) / 8;
    return reinterpret_cast<Float4*>(args_.logits) + (scratch_at(first_row_) / 32 * tiles + tile) * 64 +
           lane_;
  }
  KVLAPSE_DEVICE bool is_before_window(int i) const { return rank_of(i) < held_ - args_.window; }

  // Queries of a column tile: up to eight, and where they are fewer as many heads as fill it.
  KVLAPSE_DEVICE int tile_queries() const {
    return args_.window > 4 ? 8 : args_.window > 2 ? 4 : args_.window;
  }
  // The query that column 2t + e of tile `tile` answers for, -1: none (or a lane before it does).
  KVLAPSE_DEVICE int query_of(int tile, int e) const {
    const int query = tile * 8 + 2 * t_ + e;
    return 2 * t_ + e < tile_queries() && query < args_.window ? query : -1;
  }
  // logit[i][e]: of row i and query_of(tile, e), the most of the group's heads.
  KVLAPSE_DEVICE void weigh_queries(float (&logit)[4][2], int tile) const {
    const int width = tile_queries(), heads = 8 / width;
    KVLAPSE_UNROLL
    for (int i = 0; i < 8; ++i) logit[i / 2][i % 2] = -3.0e38f;
    KVLAPSE_NO_UNROLL
    for (int head = 0; head < args_.group; head += 2 * heads) {
      float c[2][2][4];
      rows_.products(c, queries_, lane_, [&](int n, int column) {
        const int query = tile * 8 + column % width, of = head + n * heads + column / width;
        return (query < args_.window ? query : args_.window - 1) * args_.group +
               (of < args_.group ? of : args_.group - 1);
      });
      KVLAPSE_UNROLL
      for (int i = 0; i < 8; ++i) {
        float& to = logit[i / 2][i % 2];
        to = maximum(to, maximum(c[i / 4][0][i % 4], c[i / 4][1][i % 4]));
      }
    }
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (width == 1) logit[i][0] = logit[i][1] = maximum(logit[i][0], logit[i][1]);
      KVLAPSE_UNROLL
      for (int e = 0; e < 2; ++e) {
        float& v = logit[i][e];
        if (width <= 2) v = maximum(v, shuffle_xor(v, 1));
        if (width <= 4) v = maximum(v, shuffle_xor(v, 2));
        v *= args_.logit_scale;
      }
    }
  }
  // What four warps found, put together.
  KVLAPSE_DEVICE void sum_units() const {
    constexpr int kWarps = kRkvRows / kRkvWarpRows;
    const int unit = thread_ / kRkvRows, i = thread_ % kRkvRows;
    if (unit * kRkvRows >= args_.block_rows || first_ + unit * kRkvRows >= held_) return;
    const int64_t to = unit_at(first_ / kRkvRows + unit);
    if (i < kHeadDim) {
      float sum = 0;
      KVLAPSE_UNROLL
      for (int w = 0; w < kWarps; ++w)
        sum += smem_load(shares_ + static_cast<uint32_t>(((unit * kWarps + w) * kHeadDim + i) * 4));
      args_.partial_sum[to * kHeadDim + i] = sum;
    }
    const int query = kRkvRows - 1 - i;  // by the threads at the end
    if (query >= args_.window) return;
    float most[kWarps], top = kNothing, sum = 0;
    const SmemAddress parts = parts_ + static_cast<uint32_t>((unit * kWarps * args_.window + query) * 8);
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      most[w] = smem_load(parts + static_cast<uint32_t>(w * args_.window * 8));
      top = maximum(most[w], top);
    }
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w)
      sum += smem_load(parts + static_cast<uint32_t>(w * args_.window * 8 + 4)) * exponential(most[w] - top);
    args_.softmax[(to * args_.window + query) * 2] = top;
    args_.softmax[(to * args_.window + query) * 2 + 1] = sum;
  }

  // ---- phase two ----
  KVLAPSE_DEVICE void gather_sums(int last_tile) const {
    const int units = (held_ + kRkvRows - 1) / kRkvRows;
    if (thread_ < kHeadDim) {
      const float* from = args_.partial_sum + unit_at(0) * kHeadDim + thread_;
      float sum = 0;
      KVLAPSE_UNROLL_8
      for (int unit = 0; unit < units; ++unit) sum += load_shared_by_device(from + unit * kHeadDim);
      Fragments::store_vector(vector_, thread_, sum);
    }
    // A warp a query, from the end.
    for (int query = args_.block_threads / 32 - 1 - warp_; query < args_.window;
         query += args_.block_threads / 32) {
      const float* from = args_.softmax + (unit_at(0) * args_.window + query) * 2;
      float most = kNothing, sum = 0;
      for (int unit = lane_; unit < units; unit += 32) {
        const float top = load_shared_by_device(from + unit * args_.window * 2),
                    part = load_shared_by_device(from + unit * args_.window * 2 + 1);
        const float next = maximum(top, most);
        sum = sum * exponential(most - next) + part * exponential(top - next);
        most = next;
      }
      float top = most;
      for (int mask = 16; mask > 0; mask >>= 1) top = maximum(top, shuffle_xor(top, mask));
      sum *= exponential(most - top);
      for (int mask = 16; mask > 0; mask >>= 1) sum += shuffle_xor(sum, mask);
      if (lane_ == 0) {
        smem_store(tops_ + static_cast<uint32_t>(query * 8), top);
        smem_store(tops_ + static_cast<uint32_t>(query * 8 + 4), 1.0f / sum);
      }
    }
    if (thread_ < kRkvColumns)
      smem_store(key_norms_ + static_cast<uint32_t>(thread_ * 4),
                 load_shared_by_device(args_.inverse_norm + scratch_at(last_tile * kRkvColumns + thread_)));
  }

  KVLAPSE_DEVICE void project() const {
    float dot[4];
    rows_.project(dot, vector_, lane_);
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) dot[i] = dot[i] * inverse_[i] - square_[i] * inverse_[i] * inverse_[i];
    if (rank_of(t_) < held_) args_.projection[scratch_at(rank_of(t_))] = own_of(dot);
  }
  KVLAPSE_DEVICE void weigh_rows() const {
    float sum[4] = {0, 0, 0, 0};
    for (int tile = 0; tile * 8 < args_.window; ++tile) {
      const Float4 low = load_shared_by_device(logits_of(tile)),
                   high = load_shared_by_device(logits_of(tile) + 32);
      const float logit[4][2] = {{low.x, low.y}, {low.z, low.w}, {high.x, high.y}, {high.z, high.w}};
      KVLAPSE_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int query = query_of(tile, e);
        if (query < 0) continue;
        const float top = smem_load(tops_ + static_cast<uint32_t>(query * 8)),
                    inverse = smem_load(tops_ + static_cast<uint32_t>(query * 8 + 4));
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i)
          if (is_before_window(i)) sum[i] += exponential(logit[i][e] - top) * inverse;
      }
    }
    Fragments::quad_sum(sum);
    if (rank_of(t_) < held_)
      args_.importance[scratch_at(rank_of(t_))] = own_of(sum) * (1.0f / static_cast<float>(args_.window));
  }

  // Each row's last similar key, and the sum of what keys are forgiven.
  KVLAPSE_DEVICE void search(int last_tile) const {
    uint64_t found[4] = {0, 0, 0, 0};  // (rank + 1) << 32 | bits of the cosine
    bool done = !has_rows();
    int slots[kSlots];
    int buffer = 0, step = 0;
    KVLAPSE_NO_UNROLL
    for (int tile = last_tile;; --tile, ++step, buffer ^= 1) {
      mbarrier_wait(barriers_ + static_cast<uint32_t>(buffer * 8), static_cast<uint32_t>(step / 2 % 2));
      if (!done) done = compare(tile, buffer, found);
      if (tile == 0) break;
      // Two sets of flags: a warp that is ahead writes the other one.
      const SmemAddress flags = flags_ + static_cast<uint32_t>(buffer * kRkvThreads / 32 * 4);
      if (lane_ == 0) smem_store(flags + static_cast<uint32_t>(warp_ * 4), done ? 1.0f : 0.0f);
      block_sync();
      const bool of_warp =
          lane_ >= args_.block_threads / 32 || smem_load(flags + static_cast<uint32_t>(lane_ * 4)) != 0;
      if (warp_ballot(of_warp) == 0xffffffffu) {
        if (step > 0)  // what is on its way must land before the place is used again
          mbarrier_wait(barriers_ + static_cast<uint32_t>((buffer ^ 1) * 8),
                        static_cast<uint32_t>((step + 1) / 2 % 2));
        break;
      }
      if (step == 0) {  // the first tile mostly ends it: only now is there more to fetch
        find_keys(slots, tile - 1);
        copy_keys(slots, tile - 1, 1, true);
        find_keys(slots, tile - 2);
      }
      copy_keys(slots, tile - 2, buffer, true);
      find_keys(slots, tile - 3);
    }
    if (has_rows()) forgive(found);
  }

  // Sixteen keys at a time from the end. Whether every row of the warp has its key.
  KVLAPSE_DEVICE bool compare(int tile, int buffer, uint64_t (&found)[4]) const {
    const SmemAddress keys = keys_ + static_cast<uint32_t>(buffer) * kKeysBytes;
    KVLAPSE_NO_UNROLL
    for (int first = kRkvColumns - 16; first >= 0; first -= 16) {
      const int first_key = tile * kRkvColumns + first;
      if (first_key >= held_) continue;
      float c[2][2][4], key_inverse[4];
      rows_.products(c, keys, lane_, [&](int n, int column) { return first + 8 * n + column; });
      bool any = first_key == 0;  // rank 0 is what a row has that has no other
      KVLAPSE_UNROLL
      for (int k = 0; k < 4; ++k) {
        key_inverse[k] =
            smem_load(key_norms_ + static_cast<uint32_t>(
                                       (buffer * kRkvColumns + first + 8 * (k / 2) + 2 * t_ + k % 2) * 4));
        KVLAPSE_UNROLL
        for (int i = 0; i < 4; ++i)
          any |= c[i / 2][k / 2][i % 2 * 2 + k % 2] * inverse_[i] * key_inverse[k] > args_.threshold;
      }
      if (warp_ballot(any) == 0) continue;
      bool all = true;
      KVLAPSE_UNROLL
      for (int i = 0; i < 4; ++i) {
        int best = -1;  // keys come in rising order: the last one wins
        float best_cosine = 0, first_cosine = 0;
        KVLAPSE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const int key = first_key + 8 * (k / 2) + 2 * t_ + k % 2;
          float cosine = c[i / 2][k / 2][i % 2 * 2 + k % 2] * inverse_[i] * key_inverse[k];
          if (key == rank_of(i)) cosine = 0;  // a row is not like itself
          if (k == 0) first_cosine = cosine;
          if (cosine > args_.threshold && key < held_) best = key, best_cosine = cosine;
        }
        uint64_t packed = best < 0 ? 0 : static_cast<uint64_t>(best + 1) << 32 | float_bits(best_cosine);
        for (int mask = 1; mask < 4; mask *= 2) {
          const uint64_t other = shuffle_xor(packed, mask);
          packed = other > packed ? other : packed;
        }
        if (first_key == 0) {  // rank 0, whose cosine the lane with t = 0 has
          const float of_first = shuffle_from(first_cosine, lane_ & ~3);
          if (packed == 0) packed = uint64_t{1} << 32 | float_bits(of_first);
        }
        if (found[i] == 0) found[i] = packed;
        all = all && (found[i] != 0 || rank_of(i) >= held_);
      }
      if (warp_ballot(all) == 0xffffffffu) return true;
    }
    return false;
  }

  // In integers: sums of cosines in any order. Often a whole warp forgives the same key: its sum is added
  // once.
  KVLAPSE_DEVICE void forgive(const uint64_t (&found)[4]) const {
    const uint64_t own =
        (t_ & 2) != 0 ? ((t_ & 1) != 0 ? found[3] : found[2]) : ((t_ & 1) != 0 ? found[1] : found[0]);
    const bool counts = rank_of(t_) < held_;
    const int target = counts ? static_cast<int>(own >> 32) - 1 : -1;
    int64_t amount =
        counts ? static_cast<int64_t>(bits_float(static_cast<uint32_t>(own)) * kRkvFixedPoint) : 0;
    int common = target;
    for (int mask = 16; mask > 0; mask >>= 1) {
      const int other = shuffle_xor(common, mask);
      common = other > common ? other : common;
    }
    if (warp_ballot(target == common || target < 0) == 0xffffffffu) {
      for (int mask = 16; mask > 0; mask >>= 1) amount += shuffle_xor(amount, mask);
      if (lane_ == 0) device_add(args_.forgiven + scratch_at(common), static_cast<uint64_t>(amount));
    } else if (target >= 0) {
      device_add(args_.forgiven + scratch_at(target), static_cast<uint64_t>(amount));
    }
  }

  const RkvArgs& args_;
  unsigned char* const shared_;
  const int item_, first_, thread_, warp_, lane_, g_, t_, first_row_;
  int held_ = 0;
  const SmemAddress keys_, queries_, vector_, shares_, parts_, barriers_, key_norms_, tops_, flags_;
  Fragments rows_;
  float square_[4], inverse_[4];
};

}  // namespace kvlapse::device
