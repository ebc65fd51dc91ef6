// Logits of a block of steps: every query of a tile of steps against every key before them.
#pragma once

#include "kernels/gpu/replay_common.cuh"

namespace kvlapse::gpu_replay {

// A block: kRows (step, query head of the group) by kColumns tokens; a thread four by eight of them.
// kDim: 0 means any.
template <int kDim>
class Logits {
 public:
  static constexpr int kRows = LogitsArgs::kRows, kColumns = LogitsArgs::kColumns,
                       kThreads = LogitsArgs::kThreads, kR = 4, kC = 8;
  static_assert(kRows == 64 && kColumns == 64 && kThreads == 128);

  KVLAPSE_DEVICE Logits(const LogitsArgs& args, int block, unsigned char* memory)
      : a_(args),
        shape_(args.shape),
        thread_(thread_index()),
        group_(args.shape.group()),
        dim_(kDim > 0 ? kDim : args.shape.dim) {
    const int n_tiles = a_.row_tiles() * a_.column_tiles(), tile = block % n_tiles;
    head_ = block / n_tiles;
    first_row_ = tile / a_.column_tiles() * kRows;
    first_ = tile % a_.column_tiles() * kColumns;
    n_rows_ = least(kRows, (a_.t1 - a_.t0) * group_ - first_row_);
    queries_ = reinterpret_cast<float*>(memory);
    keys_ = queries_ + static_cast<int64_t>(dim_) * kRows;
  }

  KVLAPSE_DEVICE void run() {
    if (first_ > a_.t0 + (first_row_ + n_rows_ - 1) / group_) return;  // behind every step of the block
    stage();
    block_sync();
    // Sums of lanes, combined as the tree of vector_math.h does: l + 8, then + 4, + 2, + 1. Four at a time
    // are a subtree.
    const int row0 = thread_ / 8 * kR, column0 = thread_ % 8 * 4;
    float sum[kR][kC], two[kR][kC] = {}, one[kR][kC] = {};
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int low = (i & 1) * 2 + i / 2;
      float pair[kR][kC], other[kR][kC];
      add_lane(low, 0, row0, column0, pair);
      add_lane(low, 2, row0, column0, other);
      add(pair, other);
      add_lane(low, 1, row0, column0, sum);
      add_lane(low, 3, row0, column0, other);
      add(sum, other);
      add_to(pair, sum);
      if ((i & 1) == 0) {
        copy(sum, two);
      } else {
        add_to(two, sum);
        if (i == 1)
          copy(sum, one);
        else
          add_to(one, sum);
      }
    }
    store(sum, row0, column0);
  }

 private:
  // Component d of row r is at d * 64 + (r with bits 3 and 4 changed by bits 2 and 3 of d): so that both the
  // transposed stores and reading four rows fall on different banks.
  KVLAPSE_DEVICE static int place(int row, int d) { return d * 64 + (row ^ (d / 4 & 3) * 8); }
  // A warp stages 8 rows by 16 components at a time, a lane four of them.
  KVLAPSE_DEVICE void stage() {
    const int warp = thread_ / 32, r = thread_ % 32 / 4, quad = thread_ % 4;
    const bool whole = kDim > 0 || dim_ % 4 == 0;
    KVLAPSE_UNROLL
    for (int part = 0; part < 2; ++part) {
      const int row = (warp + 4 * part) * 8 + r;
      const int step = (first_row_ + row) / group_, g = (first_row_ + row) % group_;
      const float* query = row < n_rows_
                               ? a_.q + (static_cast<int64_t>(step) * shape_.n_q + head_ * group_ + g) * dim_
                               : nullptr;
      const float* key = first_ + row < a_.t1
                             ? a_.k + (static_cast<int64_t>(first_ + row) * shape_.n_kv + head_) * dim_
                             : nullptr;
      KVLAPSE_UNROLL_8
      for (int d = quad * 4; d < dim_; d += 16) {
        const Weights<4> x = part_of(query, d, whole), y = part_of(key, d, whole);
        KVLAPSE_UNROLL
        for (int k = 0; k < 4; ++k) {
          if (kDim == 0 && d + k >= dim_) continue;
          queries_[place(row, d) + k * 64] = x.v[k];
          keys_[place(row, d) + k * 64] = y.v[k];
        }
      }
    }
  }
  KVLAPSE_DEVICE Weights<4> part_of(const float* row, int d, bool whole) const {
    if (row == nullptr) return {};
    if (whole) return Weights<4>::load(row + d);
    Weights<4> w = {};
    KVLAPSE_UNROLL
    for (int k = 0; k < 4; ++k)
      if (d + k < dim_) w.v[k] = row[d + k];
    return w;
  }

  // Of lane 4 * high + low.
  KVLAPSE_DEVICE void add_lane(int low, int high, int row0, int column0, float (&sum)[kR][kC]) const {
    KVLAPSE_UNROLL
    for (int r = 0; r < kR; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kC; ++c) sum[r][c] = 0;
    }
    const float* query = queries_ + (4 * high + low) * 64 + (row0 ^ high * 8);
    const float* key = keys_ + (4 * high + low) * 64 + (column0 ^ high * 8);
    KVLAPSE_UNROLL_8
    for (int m = 0; m < (kDim > 0 ? kDim / 16 : (dim_ + 15) / 16); ++m) {
      if (kDim == 0 && 16 * m + 4 * high + low >= dim_) break;
      const Weights<4> x = Weights<4>::load(query + m * 16 * 64), y0 = Weights<4>::load(key + m * 16 * 64),
                       y1 = Weights<4>::load(key + m * 16 * 64 + 32);
      KVLAPSE_UNROLL
      for (int r = 0; r < kR; ++r) {
        KVLAPSE_UNROLL
        for (int c = 0; c < 4; ++c) {
          sum[r][c] = fmaf(x.v[r], y0.v[c], sum[r][c]);
          sum[r][4 + c] = fmaf(x.v[r], y1.v[c], sum[r][4 + c]);
        }
      }
    }
  }
  KVLAPSE_DEVICE static void add(float (&to)[kR][kC], const float (&b)[kR][kC]) {
    KVLAPSE_UNROLL
    for (int r = 0; r < kR; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kC; ++c) to[r][c] = to[r][c] + b[r][c];
    }
  }
  KVLAPSE_DEVICE static void add_to(const float (&a)[kR][kC], float (&to)[kR][kC]) {
    KVLAPSE_UNROLL
    for (int r = 0; r < kR; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kC; ++c) to[r][c] = a[r][c] + to[r][c];
    }
  }
  KVLAPSE_DEVICE static void copy(const float (&from)[kR][kC], float (&to)[kR][kC]) {
    KVLAPSE_UNROLL
    for (int r = 0; r < kR; ++r) {
      KVLAPSE_UNROLL
      for (int c = 0; c < kC; ++c) to[r][c] = from[r][c];
    }
  }

  KVLAPSE_DEVICE void store(const float (&sum)[kR][kC], int row0, int column0) const {
    const int lanes = shape_.lanes();
    if (row0 >= n_rows_) return;
    KVLAPSE_UNROLL
    for (int c = 0; c < kC; ++c) {
      const int pos = first_ + (c / 4) * 32 + column0 + c % 4;
      if (group_ == 4) {
        float* to = a_.weights + shape_.row((first_row_ + row0) / 4, head_) + static_cast<int64_t>(pos) * 4;
        *reinterpret_cast<Float4*>(to) = Float4{sum[0][c] * a_.factor, sum[1][c] * a_.factor,
                                                sum[2][c] * a_.factor, sum[3][c] * a_.factor};
        continue;
      }
      KVLAPSE_UNROLL
      for (int r = 0; r < kR; ++r) {
        if (row0 + r >= n_rows_) continue;
        const int step = (first_row_ + row0 + r) / group_, g = (first_row_ + row0 + r) % group_;
        float* to = a_.weights + shape_.row(step, head_) + static_cast<int64_t>(pos) * lanes;
        to[g] = sum[r][c] * a_.factor;
        for (int pad = group_; g == group_ - 1 && pad < lanes; ++pad) to[pad] = 0;
      }
    }
  }

  const LogitsArgs& a_;
  const Shape shape_;
  const int thread_, group_, dim_;
  int head_, first_row_, first_, n_rows_;
  float *queries_, *keys_;
};

}  // namespace kvlapse::gpu_replay
