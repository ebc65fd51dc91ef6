// Logits of a block of steps: every query of a tile of steps against every key before them.
#pragma once

#include "kernels/gpu/replay_common.cuh"

namespace kvlapse::gpu_replay {

// A block: kRows (step, query head of the group), whose queries stay in shared memory, by a walk over tiles
// of kColumns tokens, the next of which comes while one is multiplied. A warp has 16 rows of a tile. The 16
// lanes of a sum are dealt to four threads, lanes l % 4 each, which add up 8 rows by 8 columns; then each
// gets a quarter of them from the others. kDim: 0 means any.
template <int kDim>
class Logits {
 public:
  static constexpr int kRows = LogitsArgs::kRows, kColumns = LogitsArgs::kColumns,
                       kThreads = LogitsArgs::kThreads, kBuffers = LogitsArgs::kBuffers,
                       kWarps = kThreads / 32, kOwn = 8;
  static_assert(kRows == kWarps * 16 && kColumns == 32 && kBuffers == 2);

  KVLAPSE_DEVICE Logits(const LogitsArgs& args, int block, unsigned char* memory)
      : a_(args),
        shape_(args.shape),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        group_(args.shape.group()),
        dim_(kDim > 0 ? kDim : args.shape.dim) {
    first_row_ = block % a_.row_tiles() * kRows;
    head_ = block / a_.row_tiles() % shape_.n_kv;
    first_ = block / a_.row_tiles() / shape_.n_kv * LogitsArgs::kWalk;
    n_rows_ = least(kRows, (a_.t1 - a_.t0) * group_ - first_row_);
    queries_ = reinterpret_cast<float*>(memory);
    keys_ = queries_ + dim_ * kRows;
    barriers_ = device::smem_address(keys_ + kBuffers * dim_ * kColumns);
  }

  KVLAPSE_DEVICE void run() {
    // Up to the last step of the block.
    const int end = least(first_ + LogitsArgs::kWalk, a_.t0 + (first_row_ + n_rows_ - 1) / group_ + 1),
              n_tiles = (end - first_ + kColumns - 1) / kColumns;
    if (n_tiles <= 0) return;
    if (thread_index() == 0) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kBuffers; ++i) device::mbarrier_init(barriers_ + i * 8, kThreads);
    }
    block_sync();
    stage_queries();
    stage_keys(0, 0);
    if (n_tiles > 1) stage_keys(1, 1);
    for (int tile = 0; tile < n_tiles; ++tile) {
      const int buffer = tile % kBuffers;
      device::mbarrier_wait(barriers_ + buffer * 8, static_cast<uint32_t>(tile / kBuffers & 1));
      multiply(tile, buffer);
      if (tile + kBuffers >= n_tiles) continue;
      block_sync();  // the tile is read
      stage_keys(tile + kBuffers, buffer);
    }
  }

 private:
  // Shared memory has a row per component, of units of four (step, head) or tokens. Units of component d are
  // moved by `shuffled(d)`, so that both eight components of a copy and those that a warp reads at a time
  // fall on different banks.
  KVLAPSE_DEVICE static int shuffled(int d) { return (d & 1) << 2 | (d & 2) | (d >> 2 & 1); }
  // A warp copies eight components of four rows at a time, a lane always the same row of a unit.
  KVLAPSE_DEVICE void copy(float* to, int width, int unit, const float* row, bool valid) const {
    const int first = lane_ / 4;
    const SmemAddress at =
        device::smem_address(to) +
        static_cast<uint32_t>((first * width + (unit ^ shuffled(first)) * 4 + lane_ % 4) * 4);
    KVLAPSE_UNROLL
    for (int d = 0; d < (kDim > 0 ? kDim : kMaxDim); d += 8)
      if (kDim > 0 || d + first < dim_)
        device::copy_async4(at + static_cast<uint32_t>(d * width * 4), row + d + first, valid);
  }
  KVLAPSE_DEVICE void stage_queries() const {
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kRows / 4 / kWarps; ++i) {
      const int unit = warp_ * (kRows / 4 / kWarps) + i, row = unit * 4 + lane_ % 4;
      const bool valid = row < n_rows_;
      const int step = (first_row_ + row) / group_, g = (first_row_ + row) % group_;
      copy(queries_, kRows, unit,
           valid ? a_.q + (static_cast<int64_t>(step) * shape_.n_q + head_ * group_ + g) * dim_ : a_.q,
           valid);
    }
  }
  // Columns of a tile are in an order that lets the eight threads of a step store neighbours.
  KVLAPSE_DEVICE static int column_of(int unit, int i) { return i * 8 + unit % 2 * 4 + unit / 2; }
  KVLAPSE_DEVICE void stage_keys(int tile, int buffer) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kColumns / 4 / kWarps; ++i) {
      const int unit = warp_ * (kColumns / 4 / kWarps) + i,
                pos = first_ + tile * kColumns + column_of(unit, lane_ % 4);
      const bool valid = pos < a_.t1;
      copy(keys_ + buffer * dim_ * kColumns, kColumns, unit,
           a_.k + (valid ? (static_cast<int64_t>(pos) * shape_.n_kv + head_) * dim_ : 0), valid);
    }
    device::copy_async_arrive(barriers_ + buffer * 8);
  }

  // A thread's units of queries are 2 * of_row + {0, 1} and of keys 2 * of_column + {0, 1}; that which it
  // keeps comes first.
  KVLAPSE_DEVICE int of_row() const { return lane_ % 2; }
  KVLAPSE_DEVICE int of_column() const { return lane_ / 2 % 4; }
  KVLAPSE_DEVICE int own_lanes() const { return lane_ / 8; }
  KVLAPSE_DEVICE int row_unit() const { return warp_ * 4 + of_row() * 2 + own_lanes() / 2; }
  KVLAPSE_DEVICE int column_unit() const { return of_column() * 2 + own_lanes() % 2; }

  KVLAPSE_DEVICE void multiply(int tile, int buffer) const {
    const float* keys = keys_ + buffer * dim_ * kColumns;
    // As the tree of vector_math.h: lanes l + 8, then + 4 of the thread's own; + 2, + 1 of others.
    float sum[kOwn][kOwn], pair[kOwn][kOwn], other[kOwn][kOwn];
    KVLAPSE_NO_UNROLL
    for (int high = 0; high < 2; ++high) {
      add_lane(keys, high, pair);
      add_lane(keys, high + 2, other);
      KVLAPSE_UNROLL
      for (int r = 0; r < kOwn; ++r) {
        KVLAPSE_UNROLL
        for (int c = 0; c < kOwn; ++c) {
          const float both = pair[r][c] + other[r][c];
          sum[r][c] = high == 0 ? both : sum[r][c] + both;
        }
      }
    }
    float kept[kOwn / 2][kOwn / 2];
    KVLAPSE_UNROLL
    for (int r = 0; r < kOwn / 2; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kOwn; ++c) sum[r][c] += shuffle_xor(sum[r + kOwn / 2][c], 16);
      KVLAPSE_UNROLL
      for (int c = 0; c < kOwn / 2; ++c) kept[r][c] = sum[r][c] + shuffle_xor(sum[r][c + kOwn / 2], 8);
    }
    store(tile, kept);
    store_peaks(tile, kept);
  }
  // Of lane 4 * high + own_lanes().
  KVLAPSE_DEVICE void add_lane(const float* keys, int high, float (&sum)[kOwn][kOwn]) const {
    KVLAPSE_UNROLL
    for (int r = 0; r < kOwn; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kOwn; ++c) sum[r][c] = 0;
    }
    const int d = 4 * high + own_lanes(), moved = shuffled(d);
    const float *query0 = queries_ + d * kRows + (row_unit() ^ moved) * 4,
                *query1 = queries_ + d * kRows + (row_unit() ^ 1 ^ moved) * 4,
                *key0 = keys + d * kColumns + (column_unit() ^ moved) * 4,
                *key1 = keys + d * kColumns + (column_unit() ^ 1 ^ moved) * 4;
    KVLAPSE_UNROLL_8
    for (int m = 0; m < (kDim > 0 ? kDim / 16 : (dim_ + 15) / 16); ++m) {
      if (kDim == 0 && 16 * m + d >= dim_) break;
      const Weights<4> x0 = Weights<4>::load(query0 + m * 16 * kRows),
                       x1 = Weights<4>::load(query1 + m * 16 * kRows),
                       y0 = Weights<4>::load(key0 + m * 16 * kColumns),
                       y1 = Weights<4>::load(key1 + m * 16 * kColumns);
      KVLAPSE_UNROLL
      for (int r = 0; r < 4; ++r) {
        KVLAPSE_UNROLL
        for (int c = 0; c < 4; ++c) {
          sum[r][c] = fmaf(x0.v[r], y0.v[c], sum[r][c]);
          sum[r][4 + c] = fmaf(x0.v[r], y1.v[c], sum[r][4 + c]);
          sum[4 + r][c] = fmaf(x1.v[r], y0.v[c], sum[4 + r][c]);
          sum[4 + r][4 + c] = fmaf(x1.v[r], y1.v[c], sum[4 + r][4 + c]);
        }
      }
    }
  }

  KVLAPSE_DEVICE void store(int tile, const float (&sum)[kOwn / 2][kOwn / 2]) const {
    const int lanes = shape_.lanes(), row0 = row_unit() * 4;
    if (row0 >= n_rows_) return;
    KVLAPSE_UNROLL
    for (int c = 0; c < kOwn / 2; ++c) {
      const int pos = first_ + tile * kColumns + column_of(column_unit(), c);
      if (group_ == 4) {
        float* to = a_.weights + shape_.row((first_row_ + row0) / 4, head_) + static_cast<int64_t>(pos) * 4;
        *reinterpret_cast<Float4*>(to) = Float4{sum[0][c] * a_.factor, sum[1][c] * a_.factor,
                                                sum[2][c] * a_.factor, sum[3][c] * a_.factor};
        continue;
      }
      KVLAPSE_UNROLL
      for (int r = 0; r < kOwn / 2; ++r) {
        if (row0 + r >= n_rows_) continue;
        const int step = (first_row_ + row0 + r) / group_, g = (first_row_ + row0 + r) % group_;
        float* to = a_.weights + shape_.row(step, head_) + static_cast<int64_t>(pos) * lanes;
        to[g] = sum[r][c] * a_.factor;
        KVLAPSE_NO_UNROLL
        for (int pad = group_; g == group_ - 1 && pad < lanes; ++pad) to[pad] = 0;
      }
    }
  }

  // The largest of the tile up to a row's step, among eight threads whose rows are the same.
  KVLAPSE_DEVICE void store_peaks(int tile, const float (&sum)[kOwn / 2][kOwn / 2]) const {
    static_assert(kColumns == kRun && kOwn == 8);
    const int row0 = row_unit() * 4, first = first_ + tile * kColumns;
    float best[4];
    KVLAPSE_UNROLL
    for (int r = 0; r < 4; ++r) {
      const int step = a_.t0 + (first_row_ + row0 + (group_ == 4 ? 0 : r)) / (group_ == 4 ? 4 : group_);
      best[r] = -infinity();
      KVLAPSE_UNROLL
      for (int c = 0; c < 4; ++c)
        best[r] =
            first + column_of(column_unit(), c) <= step ? fmaxf(best[r], sum[r][c] * a_.factor) : best[r];
    }
    // Every thread is left with one row.
    const bool upper = (lane_ & 2) != 0, odd = (lane_ & 4) != 0;
    float pair[2];
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i)
      pair[i] = fmaxf(upper ? best[2 + i] : best[i], shuffle_xor(upper ? best[i] : best[2 + i], 2));
    float peak = fmaxf(odd ? pair[1] : pair[0], shuffle_xor(odd ? pair[0] : pair[1], 4));
    peak = fmaxf(peak, shuffle_xor(peak, 8));
    const int row = row0 + (upper ? 2 : 0) + (odd ? 1 : 0);
    if ((lane_ & 8) != 0 || row >= n_rows_) return;
    const int step = (first_row_ + row) / group_, g = (first_row_ + row) % group_;
    a_.peaks[shape_.row(step, head_) / kRun + first / kRun * shape_.lanes() + g] = peak;
  }

  const LogitsArgs& a_;
  const Shape shape_;
  const int warp_, lane_, group_, dim_;
  int head_, first_row_, first_, n_rows_;
  float *queries_, *keys_;
  SmemAddress barriers_;
};

}  // namespace kvlapse::gpu_replay
