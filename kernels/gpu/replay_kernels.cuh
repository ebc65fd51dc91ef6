// The kernels of a replay on a device, one function a kernel that every thread of a block runs; contract:
// replay_args.h. Written in the operations of kernels/cuda/device_ops.cuh, so that the tests' emulator
// compiles the same text: include these (or the emulator) first. Compiled without contraction of products and
// sums: fused multiply-adds are written where they are meant, so that victims are those of the CPU's replay.
#pragma once

#include <cmath>

#include "core/base/rng.h"
#include "kernels/gpu/replay_args.h"

namespace kvlapse::gpu_replay {

using device::block_sync;
using device::Float4;
using device::shuffle_from;
using device::shuffle_xor;
using device::SmemAddress;
using device::thread_index;
using device::warp_ballot;
using device::warp_largest;

KVLAPSE_DEVICE float infinity() {
  return __builtin_huge_valf();
}
KVLAPSE_DEVICE int least(int a, int b) {
  return a < b ? a : b;
}
KVLAPSE_DEVICE int most(int a, int b) {
  return a > b ? a : b;
}
// Unsigned numbers in the order of the floats (of one zero).
KVLAPSE_DEVICE uint32_t ordered(float v) {
  const uint32_t bits = device::float_bits(v);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}
KVLAPSE_DEVICE float unordered(uint32_t key) {
  return device::bits_float((key & 0x80000000u) != 0 ? key & 0x7fffffffu : ~key);
}

// scalar::exp_one of core/base for x <= 0, with its rounding to integers as a sum with 1.5 * 2^23.
KVLAPSE_DEVICE float exp_negative(float x) {
  constexpr float kRound = 12582912.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  float r = fmaf(n, -0.693359375f, x);
  r = fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = fmaf(p, r, 1.3981999507e-3f);
  p = fmaf(p, r, 8.3334519073e-3f);
  p = fmaf(p, r, 4.1665795894e-2f);
  p = fmaf(p, r, 1.6666665459e-1f);
  p = fmaf(p, r, 5.0000001201e-1f);
  const float y = fmaf(p, r * r, r) + 1.0f;
  const float e = y * device::bits_float((device::float_bits(shifted) + 127u) << 23);
  return x > -87.3f ? e : 0.0f;
}

template <int kLanes>
struct Weights {
  float v[kLanes];
  KVLAPSE_DEVICE static Weights load(const float* from) {
    Weights w;
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i) {
      const Float4 x = *reinterpret_cast<const Float4*>(from + 4 * i);
      w.v[4 * i] = x.x, w.v[4 * i + 1] = x.y, w.v[4 * i + 2] = x.z, w.v[4 * i + 3] = x.w;
    }
    return w;
  }
  KVLAPSE_DEVICE void store(float* to) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i)
      *reinterpret_cast<Float4*>(to + 4 * i) = Float4{v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]};
  }
};

// ---- logits ----
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

// ---- decisions ----
// A lowest score, its slot (as a number that is lower for those that go first) and the next lowest score.
struct Candidate {
  static constexpr uint32_t kNone = ~uint32_t{0};
  uint32_t low = kNone, slot = kNone, next = kNone, unused = 0;
  // Slots come in order; `last_tie` is one where the last of equal ones goes first.
  KVLAPSE_DEVICE void add(uint32_t key, uint32_t of, uint32_t last_tie) {
    const uint32_t behind = key > low ? key : low;
    if (key - last_tie < low) slot = of;
    low = key < low ? key : low;
    next = behind < next ? behind : next;
  }
  KVLAPSE_DEVICE void merge(const Candidate& o) {
    const bool other = o.low < low || (o.low == low && o.slot < slot);
    const uint32_t behind = other ? low : o.low, own = other ? o.next : next;
    next = behind < own ? behind : own;
    if (other) low = o.low, slot = o.slot;
  }
  KVLAPSE_DEVICE Candidate across_warp() const {
    Candidate all;
    all.low = ~warp_largest(~low);
    all.slot = ~warp_largest(low == all.low ? ~slot : 0u);
    all.next = ~warp_largest(~(low == all.low && slot == all.slot ? next : low));
    return all;
  }
};
static_assert(sizeof(Candidate) == 16);
struct alignas(8) Float2 {
  float x, y;
  KVLAPSE_DEVICE void operator+=(const Float2& o) { x += o.x, y += o.y; }
};

// A task on `cluster` blocks. Slot s belongs to the block that has its lane s % 16, so that each block sums
// whole lanes; they exchange maxima, sums of lanes and candidates, each arriving on a barrier of its own:
// none is sent again before every block has told what followed from it. A thread scores the same slots at
// every step, and asks for their next weights once it has.
template <int kLanes, bool kLarge>
class Decide {
 public:
  KVLAPSE_DEVICE Decide(const DecideArgs& args, int block, unsigned char* memory)
      : a_(args),
        index_(block / args.cluster),
        task_(args.tasks[index_]),
        shape_(args.shape),
        rank_(block % args.cluster),
        thread_(thread_index()),
        n_heads_(task_.n_heads),
        group_(args.shape.group()),
        width_(n_heads_ * kLanes),
        slot_floats_(slot_floats(n_heads_, kLanes)),
        own_lanes_(kSumLanes / args.cluster) {
    const DecideLayout layout =
        decide_layout(task_.score, n_heads_, kLanes, task_.capacity, args.cluster, kLarge);
    slots_ = layout.slots;
    const int chains = args.cluster == 1 ? kSumLanes * width_ / 2 : own_lanes_ * width_;
    summers_ = (chains + 31) / 32 * 32;
    if (summers_ * 4 > args.n_threads) summers_ = 0;
    own_shift_ = args.cluster == 1 ? 4 : args.cluster == 2 ? 3 : args.cluster == 4 ? 2 : 1;
    barriers_ = device::smem_address(memory);
    warp_candidates_ = reinterpret_cast<Candidate*>(memory + 64);
    block_candidates_ = warp_candidates_ + 64;
    keys_ = reinterpret_cast<uint32_t*>(block_candidates_ + kMaxCluster);
    maxima_ = keys_ + 2 * width_;
    lane_sums_ = reinterpret_cast<float*>(maxima_ + kMaxCluster * width_);
    inverse_ = lane_sums_ + kSumLanes * width_;
    newest_ = inverse_ + width_;
    newest_norms_ = newest_ + width_;
    positions_ = reinterpret_cast<int32_t*>(memory + layout.positions);
    sums_ = reinterpret_cast<float*>(memory + layout.sums);
    norms_ = reinterpret_cast<float*>(memory + layout.norms);
    if constexpr (kLarge)
      weights_ = task_.scratch + static_cast<int64_t>(rank_) * slots_ * slot_floats_;
    else
      weights_ = reinterpret_cast<float*>(memory + layout.weights);
  }

  KVLAPSE_DEVICE void run() {
    const int begin = most(a_.t0, task_.begin);
    if (begin >= a_.t1) return;
    int count = task_.count, hole = task_.hole;
    int64_t near_ties = task_.near_ties;
    const bool has_attention = attends(task_.score), keeps_sums = accumulates(task_.score),
               has_norms = reads_l1(task_.score);
    if (thread_ == 0) {
      device::mbarrier_init(barriers_, static_cast<uint32_t>(a_.n_threads));
      for (int i = 1; i <= kCandidates; ++i)
        device::mbarrier_init(barriers_ + static_cast<uint32_t>(8 * i), 1);
      for (int i = 0; i < kParts; ++i)
        device::mbarrier_init(part(i), static_cast<uint32_t>((a_.n_threads - summers_) / 32));
      device::fence_barrier_init();
    }
    load(count, keeps_sums, has_norms);
    for (int i = thread_; i < 2 * width_; i += a_.n_threads) keys_[i] = 0;
    float next_norm = 0;
    if (has_norms && thread_ < n_heads_) next_norm = norm_of(thread_, begin);
    bool failed = false, asked = false;
    if (a_.cluster > 1) {
      device::cluster_arrive();
      device::cluster_wait();
    } else {
      block_sync();
    }
    for (int step = begin; step < a_.t1; ++step) {
      const int slot = hole >= 0 ? hole : count++;
      hole = -1;
      newest_own_ = slot % kSumLanes >> own_shift_ == rank_ ? local(slot) : -1;
      const int n = own_count(count);
      const bool due = step >= a_.n_prompt && count > task_.trigger;
      if (has_norms && thread_ < n_heads_) {
        newest_norms_[(step & 1) * n_heads_ + thread_] = next_norm;
        if (step + 1 < shape_.n_tokens) next_norm = norm_of(thread_, step + 1);
      }
      if (has_attention && (due || keeps_sums)) {
        if (!asked) ask(step, n);
        attend(step, n);
        asked = !kLarge && step + 1 < a_.t1;
      } else if (has_norms) {
        block_sync();
      }
      append(step, keeps_sums, has_norms);
      if (!due && !keeps_sums) continue;
      const Candidate found = score(step, n, due, asked);
      if (!due) continue;
      if (found.low == Candidate::kNone || found.low == 0) {
        failed = true;
        if (thread_ == 0) a_.tasks[index_].failed = step;
        break;
      }
      hole = static_cast<int>(task_.last_tie != 0 ? ~found.slot : found.slot);
      if (thread_ == 0) near_ties += near_tie(found);
      if (hole % kSumLanes >> own_shift_ == rank_) {
        const int j = local(hole);
        if (j % a_.n_threads == thread_) {
          const int pos = positions_[j];
          for (int h = 0; h < n_heads_; ++h)
            task_.last[static_cast<int64_t>(task_.head + h) * shape_.n_tokens + pos] = step;
        }
      }
    }
    if (failed && asked) await_weights();
    if (a_.cluster > 1) {  // nobody leaves while others write to it
      device::cluster_arrive();
      device::cluster_wait();
    } else {
      block_sync();
    }
    if (failed) return;
    for (int j = thread_; j < own_count(count); j += a_.n_threads) {
      task_.positions[slot_of(j)] = positions_[j];
      if (!keeps_sums) continue;
      for (int h = 0; h < n_heads_; ++h)
        task_.sums[static_cast<int64_t>(h) * task_.capacity + slot_of(j)] = sums_[h * slots_ + j];
    }
    if (rank_ != 0 || thread_ != 0) return;
    DecideTask& to = a_.tasks[index_];
    to.count = count, to.hole = hole, to.near_ties = near_ties;
  }

 private:
  // Barriers: weights have landed; what the blocks of a cluster tell.
  enum Told { kMaxima = 1, kSums, kCandidates };
  // Parts of the exponentials, each told to those that sum them up.
  static constexpr int kParts = 4;
  KVLAPSE_DEVICE SmemAddress part(int i) const { return barriers_ + static_cast<uint32_t>(8 * (4 + i)); }

  KVLAPSE_DEVICE int local(int slot) const {
    return (slot / kSumLanes << own_shift_) + (slot % kSumLanes & (own_lanes_ - 1));
  }
  KVLAPSE_DEVICE int slot_of(int j) const {
    return (j >> own_shift_) * kSumLanes + (rank_ << own_shift_) + (j & (own_lanes_ - 1));
  }
  KVLAPSE_DEVICE int own_count(int count) const {
    const int rest = count % kSumLanes - (rank_ << own_shift_);
    return (count / kSumLanes << own_shift_) + most(0, least(rest, own_lanes_));
  }
  KVLAPSE_DEVICE float norm_of(int head, int pos) const {
    return task_.value_l1[static_cast<int64_t>(task_.head + head) * shape_.n_tokens + pos];
  }

  KVLAPSE_DEVICE void load(int count, bool keeps_sums, bool has_norms) {
    for (int j = thread_; j < own_count(count); j += a_.n_threads) {
      const int slot = slot_of(j), pos = task_.positions[slot];
      positions_[j] = pos;
      for (int h = 0; h < n_heads_; ++h) {
        if (keeps_sums) sums_[h * slots_ + j] = task_.sums[static_cast<int64_t>(h) * task_.capacity + slot];
        if (has_norms) norms_[h * slots_ + j] = norm_of(h, pos);
      }
    }
  }
  // By the thread that scores the slot.
  KVLAPSE_DEVICE void append(int step, bool keeps_sums, bool has_norms) {
    const int j = newest_own_;
    if (j < 0 || j % a_.n_threads != thread_) return;
    positions_[j] = step;
    for (int h = 0; h < n_heads_; ++h) {
      if (keeps_sums) sums_[h * slots_ + j] = 0;
      if (has_norms) norms_[h * slots_ + j] = newest_norms_[(step & 1) * n_heads_ + h];
    }
  }

  // ---- weights of a step ----
  KVLAPSE_DEVICE const float* row_of(int step, int h) const {
    return a_.weights + shape_.row(step - a_.t0, task_.head + h);
  }
  KVLAPSE_DEVICE void ask_slot(int j, int pos, int step) const {
    ask_heads(row_of(step, 0) + static_cast<int64_t>(pos) * kLanes,
              device::smem_address(weights_ + j * slot_floats_));
  }
  KVLAPSE_DEVICE void ask_heads(const float* from, SmemAddress to) const {
    const int64_t row = static_cast<int64_t>(shape_.stride) * kLanes;
    KVLAPSE_UNROLL_2
    for (int h = 0; h < n_heads_; ++h) {
      ask_head(from, to);
      from += row, to += kLanes * 4;
    }
  }
  KVLAPSE_DEVICE static void ask_head(const float* from, SmemAddress to) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kLanes / 4; ++i)
      device::copy_async16(to + static_cast<uint32_t>(16 * i), from + 4 * i, true);
  }
  // Brings the row behind that of `step` nearer, where the slots are many enough to need most of it.
  KVLAPSE_DEVICE void prefetch_row(int step, int n) const {
    constexpr int kLine = 32;
    const int lines = (step + 1) * kLanes / kLine;
    if (step + 1 >= a_.t1 || n * a_.cluster < lines) return;
    for (int h = rank_; h < n_heads_; h += a_.cluster) {
      const float* row = row_of(step + 1, h);
      for (int i = thread_; i < lines; i += a_.n_threads) device::prefetch_l2(row + i * kLine);
    }
  }
  // The token of `step` itself, whose slot is not known yet, and the end of what this thread asks for.
  KVLAPSE_DEVICE void ask_newest(int step) const {
    for (int i = thread_; i < width_ / 4; i += a_.n_threads) {
      const int h = 4 * i / kLanes;
      device::copy_async16(device::smem_address(newest_ + 4 * i),
                           row_of(step, h) + static_cast<int64_t>(step) * kLanes + 4 * i % kLanes, true);
    }
    device::copy_async_arrive(barriers_);
  }
  KVLAPSE_DEVICE void ask(int step, int n) const {
    if constexpr (!kLarge) {
      for (int j = thread_; j < n; j += a_.n_threads)
        if (j != newest_own_) ask_slot(j, positions_[j], step);
    }
    ask_newest(step);
  }
  KVLAPSE_DEVICE void await_weights() {
    device::mbarrier_wait(barriers_, landed_ & 1);
    ++landed_;
  }

  KVLAPSE_DEVICE void tell(Float4* to, const Float4& v, int rank, int told) const {
    device::remote_store4(device::remote_address(device::smem_address(to), rank), v,
                          device::remote_address(barriers_ + static_cast<uint32_t>(8 * told), rank));
  }
  // Expects `floats` from all blocks together.
  KVLAPSE_DEVICE void expect(int told, int floats) const {
    if (thread_ == 0)
      device::mbarrier_arrive_expect(barriers_ + static_cast<uint32_t>(8 * told),
                                     static_cast<uint32_t>(floats * 4));
  }
  KVLAPSE_DEVICE void hear(int told, uint32_t times) const {
    device::mbarrier_wait_cluster(barriers_ + static_cast<uint32_t>(8 * told), times & 1);
  }

  // Exponentials of the own slots and, in inverse_, one over their sum over all slots, for every query head.
  KVLAPSE_DEVICE void attend(int step, int n) {
    uint32_t* keys = keys_ + (step & 1) * width_;
    uint32_t* cleared = keys_ + (~step & 1) * width_;
    await_weights();
    find_maxima(step, n, keys);
    block_sync();
    if (a_.cluster > 1) {
      expect(kMaxima, a_.cluster * width_);
      const int quads = width_ / 4;
      for (int i = thread_; i < quads * a_.cluster; i += a_.n_threads)
        tell(reinterpret_cast<Float4*>(maxima_ + rank_ * width_) + i % quads,
             reinterpret_cast<const Float4*>(keys)[i % quads], i / quads, kMaxima);
      hear(kMaxima, heard_);
    }
    for (int i = thread_; i < width_; i += a_.n_threads) cleared[i] = 0;
    if (summers_ == 0) {
      exponentials(n, keys);
      block_sync();
    }
    if (thread_ >= summers_ && summers_ > 0)
      exponentials(n, keys);
    else if (a_.cluster == 1)
      sum_alone(n);
    else
      sum_together(n);
    block_sync();
    ++heard_;
  }

  KVLAPSE_DEVICE void find_maxima(int step, int n, uint32_t* keys) {
    const int teams = a_.n_threads / n_heads_, h = thread_ % n_heads_, team = thread_ / n_heads_;
    float largest[kLanes];
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) largest[g] = -infinity();
    if (team < teams) {
      constexpr int kAtOnce = kLanes == 4 ? 4 : 2;
      const float* row = row_of(step, h);
      const int64_t next = step + 1 < a_.t1 ? static_cast<int64_t>(shape_.n_kv) * shape_.stride * kLanes : 0;
      for (int j = team; j < n; j += kAtOnce * teams) {
        Weights<kLanes> w[kAtOnce];
        KVLAPSE_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          const int at = j + k * teams;
          if (at >= n) continue;
          const float* from = at == newest_own_ ? newest_ + h * kLanes
                              : kLarge          ? row + static_cast<int64_t>(positions_[at]) * kLanes
                                                : weights_ + at * slot_floats_ + h * kLanes;
          w[k] = Weights<kLanes>::load(from);
          if (kLarge && at != newest_own_) device::prefetch_l2(from + next);
        }
        KVLAPSE_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          const int at = j + k * teams;
          if (at >= n) continue;
          if (kLarge || at == newest_own_) w[k].store(weights_ + at * slot_floats_ + h * kLanes);
          KVLAPSE_UNROLL
          for (int g = 0; g < kLanes; ++g) largest[g] = fmaxf(largest[g], w[k].v[g]);
        }
      }
    }
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      uint32_t key = ordered(largest[g] + 0.0f);
      bool tells = team < teams;
      if (n_heads_ == 1) {
        key = warp_largest(key);
        tells = thread_ % 32 == 0;
      } else if (32 % n_heads_ == 0) {
        for (int mask = n_heads_; mask < 32; mask *= 2) {
          const uint32_t other = shuffle_xor(key, mask);
          key = other > key ? other : key;
        }
        tells = thread_ % 32 < n_heads_;
      }
      if (tells) device::shared_max(keys + h * kLanes + g, key);
    }
  }

  // By the threads from summers_ on, who go through the slots in order and say how far they are.
  KVLAPSE_DEVICE int teams() const { return (a_.n_threads - summers_) / n_heads_; }
  KVLAPSE_DEVICE int turns_of_part(int n) const {
    const int turns = (n + teams() - 1) / teams();
    return (turns + kParts - 1) / kParts;
  }
  KVLAPSE_DEVICE void exponentials(int n, const uint32_t* keys) {
    const int thread = thread_ - summers_, h = thread % n_heads_, team = thread / n_heads_;
    float largest[kLanes];
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      uint32_t key = a_.cluster == 1 ? keys[h * kLanes + g] : 0;
      for (int r = 0; a_.cluster > 1 && r < a_.cluster; ++r) {
        const uint32_t other = maxima_[r * width_ + h * kLanes + g];
        key = other > key ? other : key;
      }
      largest[g] = unordered(key);
    }
    const int all = teams(), each = turns_of_part(n) * all;
    for (int p = 0; p < kParts; ++p) {
      const int end = team < all ? least(n, (p + 1) * each) : 0;
      KVLAPSE_UNROLL_2
      for (int j = p * each + team; j < end; j += all) {
        float* at = weights_ + j * slot_floats_ + h * kLanes;
        Weights<kLanes> w = Weights<kLanes>::load(at);
        KVLAPSE_UNROLL
        for (int g = 0; g < kLanes; ++g) w.v[g] = g < group_ ? exp_negative(w.v[g] - largest[g]) : 0.0f;
        w.store(at);
      }
      if (summers_ == 0) continue;
      device::warp_sync();
      if (thread % 32 == 0) device::mbarrier_arrive(part(p));
    }
  }
  // Sums every `apart`-th own slot from `first` on, in order, as exponentials come.
  template <class Sum>
  KVLAPSE_DEVICE Sum chain(const float* from, int first, int apart, int n) const {
    constexpr int kAhead = 8;
    const int stride = apart * slot_floats_, each = turns_of_part(n) * teams();
    from += first * slot_floats_;
    Sum sum = {};
    int k = 0;
    for (int p = 0; p < kParts; ++p) {
      int limit = n;
      if (summers_ > 0) {
        device::mbarrier_wait(part(p), heard_ & 1);
        limit = least(n, (p + 1) * each);
      } else if (p > 0) {
        break;
      }
      const int end = (limit - first + apart - 1) / apart;
      if (k + kAhead <= end) {
        Sum ahead[kAhead];
        KVLAPSE_UNROLL
        for (int i = 0; i < kAhead; ++i) ahead[i] = *reinterpret_cast<const Sum*>(from + i * stride);
        KVLAPSE_NO_UNROLL
        for (k += kAhead; k + kAhead <= end; k += kAhead) {
          from += kAhead * stride;
          KVLAPSE_UNROLL
          for (int i = 0; i < kAhead; ++i) {
            sum += ahead[i];
            ahead[i] = *reinterpret_cast<const Sum*>(from + i * stride);
          }
        }
        from += kAhead * stride;
        KVLAPSE_UNROLL
        for (int i = 0; i < kAhead; ++i) sum += ahead[i];
      }
      for (; k < end; ++k) {
        sum += *reinterpret_cast<const Sum*>(from);
        from += stride;
      }
    }
    return sum;
  }

  // A thread sums one lane of two query heads; sixteen neighbours hold the lanes and add them as
  // vector_math.h does: l + 8, then + 4, + 2, + 1.
  KVLAPSE_DEVICE void sum_alone(int n) {
    for (int i = thread_; i < kSumLanes * width_ / 2; i += a_.n_threads) {
      const int lane = i % kSumLanes, pair = i / kSumLanes;
      Float2 sum = chain<Float2>(weights_ + 2 * pair, lane, kSumLanes, n);
      KVLAPSE_UNROLL
      for (int mask = kSumLanes / 2; mask > 0; mask /= 2)
        sum.x += shuffle_xor(sum.x, mask), sum.y += shuffle_xor(sum.y, mask);
      if (lane == 0) inverse_[2 * pair] = 1.0f / sum.x, inverse_[2 * pair + 1] = 1.0f / sum.y;
    }
  }
  KVLAPSE_DEVICE void sum_together(int n) {
    expect(kSums, kSumLanes * width_);
    const int chains = own_lanes_ * width_;
    for (int i = thread_; i < (chains + 31) / 32 * 32; i += a_.n_threads) {
      const int own = least(i, chains - 1) / width_, column = least(i, chains - 1) % width_,
                lane = (rank_ << own_shift_) + own;
      const float sum = chain<float>(weights_ + column, own, own_lanes_, n);
      const int first = thread_ % 32 / 4 * 4;
      const Float4 quad = {shuffle_from(sum, first), shuffle_from(sum, first + 1),
                           shuffle_from(sum, first + 2), shuffle_from(sum, first + 3)};
      for (int r = thread_ % 4; i < chains && r < a_.cluster; r += 4)
        tell(reinterpret_cast<Float4*>(lane_sums_ + lane * width_ + column / 4 * 4), quad, r, kSums);
    }
    hear(kSums, heard_);
    for (int i = thread_; i < width_; i += a_.n_threads) {
      float lanes[kSumLanes];
      KVLAPSE_UNROLL
      for (int l = 0; l < kSumLanes; ++l) lanes[l] = lane_sums_[l * width_ + i];
      KVLAPSE_UNROLL
      for (int w = kSumLanes / 2; w > 0; w /= 2) {
        KVLAPSE_UNROLL
        for (int l = 0; l < w; ++l) lanes[l] += lanes[l + w];
      }
      inverse_[i] = 1.0f / lanes[0];
    }
  }

  // `asks`: for the weights of the next step.
  KVLAPSE_DEVICE Candidate score(int step, int n, bool due, bool asks) {
    if (asks) prefetch_row(step + 1, n);
    const bool by_max = task_.gqa == Reduce::max;
    Candidate own;
    switch (task_.score) {
      case DeviceScore::random: own = score_slots<Kind::random, false>(step, n, due, asks); break;
      case DeviceScore::contribution: own = score_with<Kind::contribution>(step, n, due, asks); break;
      case DeviceScore::accumulated:
        own = by_max ? score_with<Kind::summed_peaks>(step, n, due, asks)
                     : score_with<Kind::summed>(step, n, due, asks);
        break;
      case DeviceScore::accumulated_contribution:
        own = by_max ? score_with<Kind::summed_peaks_by_norm>(step, n, due, asks)
                     : score_with<Kind::summed_by_norm>(step, n, due, asks);
        break;
      default:
        own = by_max && task_.score != DeviceScore::attention_mean
                  ? score_with<Kind::peak>(step, n, due, asks)
                  : score_with<Kind::weight>(step, n, due, asks);
    }
    if (asks) ask_newest(step + 1);
    if (!due) return own;
    own = own.across_warp();
    Candidate* const told = warp_candidates_ + (step & 1) * 32;
    if (thread_ % 32 == 0) told[thread_ / 32] = own;
    block_sync();
    if (a_.cluster == 1 || thread_ < 32) {
      Candidate all;
      if (thread_ % 32 < a_.n_threads / 32) all = told[thread_ % 32];
      own = all.across_warp();
    }
    if (a_.cluster == 1) return own;
    expect(kCandidates, a_.cluster * 4);
    if (thread_ < a_.cluster)
      tell(reinterpret_cast<Float4*>(block_candidates_ + rank_),
           Float4{device::bits_float(own.low), device::bits_float(own.slot), device::bits_float(own.next), 0},
           thread_, kCandidates);
    hear(kCandidates, decided_++);
    own = block_candidates_[0];
    for (int r = 1; r < a_.cluster; ++r) own.merge(block_candidates_[r]);
    return own;
  }

  // What a slot's weights become, as policies of core/policy define it: summed kinds are sums over steps of
  // all query heads or of the largest.
  enum class Kind {
    random,
    weight,
    peak,
    contribution,
    summed,
    summed_peaks,
    summed_by_norm,
    summed_peaks_by_norm
  };
  template <Kind kKind>
  KVLAPSE_DEVICE Candidate score_with(int step, int n, bool due, bool asks) {
    return n_heads_ == 1 ? score_slots<kKind, true>(step, n, due, asks)
                         : score_slots<kKind, false>(step, n, due, asks);
  }
  template <Kind kKind, bool kOneHead>
  KVLAPSE_DEVICE Candidate score_slots(int step, int n, bool due, bool asks) {
    constexpr bool kByNorm = kKind == Kind::summed_by_norm || kKind == Kind::summed_peaks_by_norm,
                   kPeaks = kKind == Kind::summed_peaks || kKind == Kind::summed_peaks_by_norm,
                   kSummed = kPeaks || kByNorm || kKind == Kind::summed, kRandom = kKind == Kind::random,
                   kNorms = kByNorm || kKind == Kind::contribution;
    const uint32_t first_free = static_cast<uint32_t>(task_.first_free),
                   n_free =
                       due ? static_cast<uint32_t>(most(0, step - task_.recent + 1 - task_.first_free)) : 0,
                   last_tie = task_.last_tie != 0 ? 1u : 0u;
    const uint64_t draw = kRandom ? mix64(task_.seed ^ static_cast<uint64_t>(step)) : 0;
    const float share = task_.gqa == Reduce::mean ? 1.0f / static_cast<float>(group_) : 1.0f;
    const float scale = scale_of<kKind>();
    const float* next = asks ? row_of(step + 1, 0) : a_.weights;
    const int64_t row = static_cast<int64_t>(shape_.stride) * kLanes;
    Weights<kLanes> inverse{};
    if constexpr (kOneHead) inverse = Weights<kLanes>::load(inverse_);
    Candidate own;
    uint32_t any_nan = 0;
    KVLAPSE_NO_UNROLL
    for (int j = thread_; j < n; j += a_.n_threads) {
      const int pos = positions_[j];
      float score = kKind == Kind::peak || kKind == Kind::summed_peaks ? -infinity() : 0.0f;
      if constexpr (kRandom) {
        score = unit_float(mix64(draw ^ static_cast<uint64_t>(pos)));
      } else {
        float* weights = weights_ + j * slot_floats_;
        const float* from = next + static_cast<int64_t>(pos) * kLanes;
        float* sums = sums_ + j;
        const float* norms = norms_ + j;
        const float* inverses = inverse_;
        KVLAPSE_UNROLL_2
        for (int h = 0; h < (kOneHead ? 1 : n_heads_); ++h) {
          Weights<kLanes> w = Weights<kLanes>::load(weights);
          if constexpr (!kLarge) {
            if (asks) ask_head(from, device::smem_address(weights));
          }
          if constexpr (!kOneHead) inverse = Weights<kLanes>::load(inverses);
          const float norm = kNorms ? *norms : 0.0f;
          float sum = kSummed ? *sums : 0.0f, peak = 0;
          KVLAPSE_UNROLL
          for (int g = 0; g < kLanes; ++g) {
            const float p = w.v[g] * inverse.v[g];
            if (g >= group_) continue;
            if constexpr (kPeaks)
              peak = p > peak ? p : peak;
            else if constexpr (kSummed)
              sum = fmaf(share, p, sum);
            else if constexpr (kKind == Kind::contribution)
              score = fmaf(p, norm, score);
            else if constexpr (kKind == Kind::peak)
              score = p > score ? p : score;
            else
              score += p;
          }
          if constexpr (kSummed) {
            if constexpr (kPeaks) sum = group_ > 1 ? sum + peak : fmaf(share, w.v[0] * inverse.v[0], sum);
            *sums = sum;
            if constexpr (kByNorm)
              score = fmaf(sum, norm, score);
            else if constexpr (kPeaks)
              score = sum > score ? sum : score;
            else
              score += sum;
          }
          if constexpr (!kOneHead) {
            weights += kLanes, from += row, sums += slots_, norms += slots_, inverses += kLanes;
          }
        }
        if constexpr (kKind == Kind::contribution || kKind == Kind::weight || kKind == Kind::summed)
          score *= scale;
      }
      const bool counts = static_cast<uint32_t>(pos) - first_free < n_free;
      if (counts && score != score) any_nan = 1;
      own.add(counts ? ordered(score + 0.0f) : Candidate::kNone, static_cast<uint32_t>(j), last_tie);
    }
    const int slot = slot_of(static_cast<int>(own.slot));
    own.slot = static_cast<uint32_t>(last_tie != 0 ? ~slot : slot);
    if (own.low == Candidate::kNone) own.slot = Candidate::kNone;
    if (any_nan != 0) own.low = own.slot = 0;  // below every number
    return own;
  }
  // Of a slot's score.
  template <Kind kKind>
  KVLAPSE_DEVICE float scale_of() const {
    if (kKind == Kind::contribution) return task_.scale;
    const bool mean = task_.gqa == Reduce::mean || task_.score == DeviceScore::attention_mean;
    const int voters = kKind == Kind::summed ? n_heads_ : n_heads_ * group_;
    return mean && voters > 1 ? 1.0f / static_cast<float>(voters) : 1.0f;
  }

  KVLAPSE_DEVICE static bool near_tie(const Candidate& found) {
    if (found.next == Candidate::kNone) return false;
    const float low = unordered(found.low), next = unordered(found.next);
    if (next - low > 4e-6f * fmaxf(fabsf(low), fabsf(next))) return false;  // by far
    const double a = low, b = next;
    const double size = (a < 0 ? -a : a) > (b < 0 ? -b : b) ? (a < 0 ? -a : a) : (b < 0 ? -b : b);
    return (a < b ? b - a : a - b) <= 1e-6 * size;
  }

  const DecideArgs& a_;
  const int index_;
  const DecideTask task_;
  const Shape shape_;
  const int rank_, thread_, n_heads_, group_, width_, slot_floats_, own_lanes_;
  int own_shift_, slots_;
  int summers_;  // threads that sum exponentials while the others take them; 0: all, behind one another
  int newest_own_ = -1;  // own number of the slot that this step fills, -1: another's
  uint32_t landed_ = 0, heard_ = 0, decided_ = 0;  // phases of the barriers
  SmemAddress barriers_;
  Candidate *warp_candidates_, *block_candidates_;
  uint32_t *keys_, *maxima_;
  float *lane_sums_, *inverse_, *newest_, *newest_norms_, *sums_, *norms_, *weights_;
  int32_t* positions_;
};

// ---- rows ----
template <int kLanes>
KVLAPSE_DEVICE void run(const RowsArgs& a, int block, unsigned char* memory) {
  constexpr int kThreads = RowsArgs::kThreads, kList = RowsArgs::kList, kShare = kThreads / 32;
  const Shape& shape = a.shape;
  const int group = shape.group(), thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int s = block / shape.n_kv, h = block % shape.n_kv, t = a.t0 + s, n = t + 1;
  if (t < a.begin) return;
  float* row = a.weights + shape.row(s, h);
  float* peaks = reinterpret_cast<float*>(memory);  // [lanes][threads]
  float* totals = peaks + kLanes * kThreads;
  float* products = totals + kLanes * kThreads;
  float* list = products + kLanes * kThreads;  // [group][kList]
  auto* list_pos = reinterpret_cast<int32_t*>(list + kMaxGroup * kList);
  auto* listed = reinterpret_cast<uint32_t*>(list_pos + kMaxGroup * kList);  // [group]
  float* facts = reinterpret_cast<float*>(listed + kMaxGroup);  // [3][group]: max, total, threshold

  // A thread's own maximum, sum of exponentials and of exponential times logit against it.
  float peak[kLanes], total[kLanes], product[kLanes];
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) peak[g] = -infinity(), total[g] = product[g] = 0;
  for (int i = thread; i < n; i += kThreads) {
    const Weights<kLanes> x = Weights<kLanes>::load(row + static_cast<int64_t>(i) * kLanes);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      if (g >= group) continue;
      if (x.v[g] > peak[g]) {
        const float shrink = exp_negative(peak[g] - x.v[g]);
        total[g] *= shrink, product[g] *= shrink, peak[g] = x.v[g];
      }
      const float e = exp_negative(x.v[g] - peak[g]);
      total[g] += e;
      product[g] = fmaf(e, x.v[g], product[g]);
    }
  }
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) {
    peaks[g * kThreads + thread] = peak[g];
    totals[g * kThreads + thread] = total[g];
    products[g * kThreads + thread] = product[g];
  }
  if (thread < kMaxGroup) listed[thread] = 0;
  block_sync();
  if (warp < group) {
    uint32_t own[kShare];
    uint32_t best = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kShare; ++i) {
      own[i] = ordered(peaks[warp * kThreads + lane + 32 * i]);
      best = own[i] > best ? own[i] : best;
    }
    const float highest = unordered(warp_largest(best));
    float sum = 0, dot = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kShare; ++i) {
      const int at = warp * kThreads + lane + 32 * i;
      const float shrink = exp_negative(peaks[at] - highest);
      sum = fmaf(totals[at], shrink, sum);
      dot = fmaf(products[at], shrink, dot);
    }
    KVLAPSE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) {
      sum += shuffle_xor(sum, mask);
      dot += shuffle_xor(dot, mask);
    }
    // The tenth of the threads' maxima is exceeded by ten tokens at least.
    uint32_t threshold = 0;
    KVLAPSE_NO_UNROLL
    for (int k = 0; k < kTop; ++k) {
      threshold = warp_largest(best);
      const uint32_t who = warp_ballot(best == threshold);
      if (device::bits_below(who, lane) == 0 && best == threshold) {
        bool removed = false;
        best = 0;
        KVLAPSE_UNROLL
        for (int i = 0; i < kShare; ++i) {
          if (!removed && own[i] == threshold)
            own[i] = 0, removed = true;
          else
            best = own[i] > best ? own[i] : best;
        }
      }
    }
    if (lane == 0) {
      facts[warp] = highest, facts[kMaxGroup + warp] = sum;
      const float least_top = threshold == 0 ? -infinity() : unordered(threshold);
      facts[2 * kMaxGroup + warp] = least_top == -infinity() ? 0.0f : exp_negative(least_top - highest);
      if (!(sum >= 1.0f) || !(highest < infinity()) || !(highest > -infinity())) *a.failed = t + 1;
      const int64_t at = static_cast<int64_t>(t) * shape.n_q + h * group + warp;
      a.entropy[at] = logf(sum) - (dot / sum - highest);
    }
    // Cosine with the query of the step before.
    const float* q = a.q + (static_cast<int64_t>(s) * shape.n_q + h * group + warp) * shape.dim;
    const float* before = s > 0      ? q - static_cast<int64_t>(shape.n_q) * shape.dim
                          : a.before ? a.before + static_cast<int64_t>(h * group + warp) * shape.dim
                                     : nullptr;
    float cosine = 1;
    if (before) {
      float ab = 0, aa = 0, bb = 0;
      for (int d = lane; d < shape.dim; d += 32) {
        ab = fmaf(q[d], before[d], ab);
        aa = fmaf(q[d], q[d], aa);
        bb = fmaf(before[d], before[d], bb);
      }
      KVLAPSE_UNROLL
      for (int mask = 16; mask > 0; mask /= 2)
        ab += shuffle_xor(ab, mask), aa += shuffle_xor(aa, mask), bb += shuffle_xor(bb, mask);
      const float norms = device::square_root(aa * bb);
      cosine = norms > 0 ? ab / norms : 0.0f;
    }
    if (lane == 0) a.query_cosine[static_cast<int64_t>(t) * shape.n_q + h * group + warp] = cosine;
  }
  block_sync();
  float outside[kLanes] = {};
  for (int i = thread; i < n; i += kThreads) {
    float* at = row + static_cast<int64_t>(i) * kLanes;
    Weights<kLanes> x = Weights<kLanes>::load(at);
    bool hot = false;
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      if (g >= group) continue;
      const float e = exp_negative(x.v[g] - facts[g]), sum = facts[kMaxGroup + g];
      hot |= e > kHot * sum;
      if (e >= facts[2 * kMaxGroup + g]) {
        const uint32_t place = device::shared_append(listed + g);
        if (place < kList) list[g * kList + place] = e, list_pos[g * kList + place] = i;
      }
      x.v[g] = e / sum;
      outside[g] += i >= kSinks ? x.v[g] : 0.0f;
    }
    x.store(at);
    uint64_t packed[kLanes / 4];
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; g += 4) {
      const uint64_t low = device::pack2<device::F16>(x.v[g] * kHalfScale, x.v[g + 1] * kHalfScale),
                     high = device::pack2<device::F16>(x.v[g + 2] * kHalfScale, x.v[g + 3] * kHalfScale);
      packed[g / 4] = low | high << 32;
    }
    auto* half = reinterpret_cast<uint64_t*>(a.half + shape.row(s, h) + static_cast<int64_t>(i) * kLanes);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes / 4; ++g) half[g] = packed[g];
    if (hot && t >= a.begin) device::global_max(a.last_hot + static_cast<int64_t>(h) * shape.n_tokens + i, t);
  }
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) totals[g * kThreads + thread] = outside[g];
  block_sync();
  if (warp < group) {
    RowFacts& out = a.facts[static_cast<int64_t>(s) * shape.n_q + h * group + warp];
    const int wanted = least(n, kTop), found = static_cast<int>(listed[warp]);
    if (found <= kList) {
      for (int i = lane; i < found; i += 32) {
        const float e = list[warp * kList + i];
        const int pos = list_pos[warp * kList + i];
        int rank = 0;
        for (int k = 0; k < found; ++k) {
          const float other = list[warp * kList + k];
          rank += other > e || (other == e && list_pos[warp * kList + k] < pos);
        }
        if (rank < wanted) out.top[rank] = pos;
      }
    } else {  // many are equal: one after the other
      float above = infinity();
      int behind = -1;
      for (int k = 0; k < wanted; ++k) {
        float value = -1;
        int pos = n;
        for (int i = lane; i < n; i += 32) {
          const float p = row[static_cast<int64_t>(i) * kLanes + warp];
          if (p > above || (p == above && i <= behind) || p <= value) continue;
          value = p, pos = i;
        }
        const uint32_t key = warp_largest(ordered(value));
        const uint32_t nearest = ~warp_largest(ordered(value) == key ? ~static_cast<uint32_t>(pos) : 0u);
        above = unordered(key), behind = static_cast<int>(nearest);
        if (lane == 0) out.top[k] = behind;
      }
    }
    float sum = 0;
    for (int i = lane; i < kThreads; i += 32) sum += totals[warp * kThreads + i];
    KVLAPSE_UNROLL
    for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) out.outside = sum, out.n_top = wanted;
  }
  if (warp == 0) {
    float older = 0;
    for (int g = 0; g < group; ++g) {
      float newest = t - lane >= 0 ? row[static_cast<int64_t>(t - lane) * kLanes + g] : 0.0f;
      KVLAPSE_UNROLL
      for (int shift = 1; shift < 32; shift *= 2) {
        const float other = shuffle_from(newest, lane >= shift ? lane - shift : lane);
        if (lane >= shift) newest += other;
      }
      older += newest < 1.0f ? 1.0f - newest : 0.0f;
    }
    a.older[(static_cast<int64_t>(t) * shape.n_kv + h) * kHorizon + lane] = older;
  }
}

// ---- masses ----
// A lane is a configuration, a warp one step. The next tile is on its way in registers while one is summed.
template <int kLanes>
KVLAPSE_DEVICE void run(const MassesArgs& a, int block, unsigned char* memory) {
  constexpr int kSteps = MassesArgs::kSteps, kTokens = MassesArgs::kTokens, kConfigs = MassesArgs::kConfigs,
                kThreads = MassesArgs::kThreads, kOwnWeights = kSteps * kTokens / kThreads,
                kOwnLast = kConfigs * kTokens / kThreads;
  static_assert(kConfigs == 32 && kSteps == kThreads / 32 && kTokens % 32 == 0);
  const Shape& shape = a.shape;
  const int group = shape.group(), thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int h = block % shape.n_kv, config_tile = block / shape.n_kv % a.config_tiles(),
            step_tile = block / shape.n_kv / a.config_tiles();
  const int first = a.t0 + step_tile * kSteps, end = least(a.t1, first + kSteps), t = first + warp;
  if (end <= a.begin) return;
  float* weights = reinterpret_cast<float*>(memory);                             // [steps][tokens][lanes]
  auto* last = reinterpret_cast<int32_t*>(weights + kSteps * kTokens * kLanes);  // [tokens][configs + 1]
  const int config = config_tile * kConfigs + lane;
  Weights<kLanes> next[kOwnWeights];
  int next_last[kOwnLast];
  // A thread's share: one token of every kApart-th step, and of every kApart-th configuration.
  constexpr int kApart = kThreads / kTokens;
  const int own_token = thread % kTokens, own = thread / kTokens;
  const float* from = a.weights + shape.row(first + own - a.t0, h) + static_cast<int64_t>(own_token) * kLanes;
  const int64_t step_floats = kApart * shape.row(1, 0),
                config_tokens = static_cast<int64_t>(kApart) * shape.n_kv * shape.n_tokens;
  const int n_own = most(0, (a.n_configs - config_tile * kConfigs - own + kApart - 1) / kApart);
  const int32_t* from_last =
      a.last + (static_cast<int64_t>(config_tile * kConfigs + own) * shape.n_kv + h) * shape.n_tokens +
      own_token;
  const auto fetch = [&](int token) {
    const int pos = token + own_token;
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) {
      const int at = first + own + k * kApart;
      next[k] = {};
      if (pos <= at && at < end)
        next[k] = Weights<kLanes>::load(from + k * step_floats + static_cast<int64_t>(token) * kLanes);
    }
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnLast; ++k)
      next_last[k] = k < n_own && pos < shape.n_tokens ? from_last[k * config_tokens + token] : kHeld;
  };
  float rest[kLanes] = {}, sinks[kLanes] = {};
  fetch(0);
  for (int token = 0; token < end; token += kTokens) {
    block_sync();
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) next[k].store(weights + (thread + k * kThreads) * kLanes);
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnLast; ++k) {
      const int i = thread + k * kThreads;
      last[i % kTokens * (kConfigs + 1) + i / kTokens] = next_last[k];
    }
    block_sync();
    if (token + kTokens < end) fetch(token + kTokens);
    float part[kLanes] = {};
    KVLAPSE_UNROLL_8
    for (int i = 0; i < kTokens; ++i) {
      const Weights<kLanes> w = Weights<kLanes>::load(weights + (warp * kTokens + i) * kLanes);
      const bool gone = last[i * (kConfigs + 1) + lane] < t;
      KVLAPSE_UNROLL
      for (int g = 0; g < kLanes; ++g) part[g] += gone ? w.v[g] : 0.0f;
    }
    if (token == 0) {
      KVLAPSE_UNROLL
      for (int g = 0; g < kLanes; ++g) part[g] = 0;
      KVLAPSE_NO_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        const bool gone = last[i * (kConfigs + 1) + lane] < t;
        const float* w = weights + (warp * kTokens + i) * kLanes;
        KVLAPSE_UNROLL
        for (int g = 0; g < kLanes; ++g) {
          const float dropped = gone ? w[g] : 0.0f;
          if (i < kSinks)
            sinks[g] += dropped;
          else
            part[g] += dropped;
        }
      }
    }
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) rest[g] += part[g];
  }
  if (config >= a.n_configs || t >= end || t < a.begin) return;
  const int32_t* own_last = a.last + (static_cast<int64_t>(config) * shape.n_kv + h) * shape.n_tokens;
  const int64_t plane = static_cast<int64_t>(a.n_configs) * shape.n_q * shape.n_tokens;
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) {
    if (g >= group) continue;
    const RowFacts& facts = a.facts[static_cast<int64_t>(t - a.t0) * shape.n_q + h * group + g];
    const float missing = rest[g] + sinks[g], outside = facts.outside;
    const float share = outside > 1e-6f ? rest[g] / outside : 0.0f;
    int held = 0;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < facts.n_top; ++i) held += own_last[facts.top[i]] >= t;
    float* to = a.metrics + (static_cast<int64_t>(config) * shape.n_q + h * group + g) * shape.n_tokens + t;
    to[kMissing * plane] = missing < 1.0f ? missing : 1.0f;
    to[kMissingRest * plane] = share < 1.0f ? share : 1.0f;
    to[kTopHeld * plane] = static_cast<float>(held) / static_cast<float>(facts.n_top);
  }
}

// ---- values ----
KVLAPSE_DEVICE void run(const ValuesArgs& a, int block, unsigned char*) {
  const int i = block * ValuesArgs::kThreads + thread_index(), dim = a.shape.dim;
  if (i >= (a.t1 - a.t0) * a.shape.n_kv) return;
  const int t = a.t0 + i / a.shape.n_kv, h = i % a.shape.n_kv;
  const float* v = a.v + (static_cast<int64_t>(t) * a.shape.n_kv + h) * dim;
  const int64_t at = static_cast<int64_t>(h) * a.shape.n_tokens + t;
  uint16_t* half = a.half + at * a.shape.dim_padded();
  for (int d = dim; d < a.shape.dim_padded(); ++d) half[d] = 0;
  float lanes[kSumLanes] = {};
  for (int d = 0; d < dim; d += kSumLanes) {
    KVLAPSE_UNROLL
    for (int l = 0; l < kSumLanes; ++l) {
      if (d + l >= dim) continue;
      const float x = v[d + l], size = fabsf(x);
      lanes[l] += size;
      if (!(size <= kLargestHalf)) *a.beyond = t + 1;
      half[d + l] = device::float_to_half(x);
    }
  }
  KVLAPSE_UNROLL
  for (int w = kSumLanes / 2; w > 0; w /= 2) {
    KVLAPSE_UNROLL
    for (int l = 0; l < w; ++l) lanes[l] += lanes[l + w];
  }
  a.l1[at] = lanes[0];
}

// ---- future ----
KVLAPSE_DEVICE void run(const FutureArgs& a, int block, unsigned char*) {
  const Shape& shape = a.shape;
  const int pos = block % a.token_blocks() * FutureArgs::kThreads + thread_index();
  const int64_t row = block / a.token_blocks();  // config, kv head
  if (pos >= a.t1) return;
  const int32_t last = a.last[row * shape.n_tokens + pos];
  if (last < a.scope_begin || last >= a.t1 - 1) return;
  const int from = most(most(a.t0, a.begin), last + 1), to = least(a.t1, last + kHorizon + 1);
  if (from >= to) return;
  const int lanes = shape.lanes(), group = shape.group(), h = static_cast<int>(row % shape.n_kv);
  float sum = 0;
  for (int t = from; t < to; ++t) {
    const float* w = a.weights + shape.row(t - a.t0, h) + static_cast<int64_t>(pos) * lanes;
    for (int g = 0; g < group; ++g) sum += w[g];
  }
  a.future[row * shape.n_tokens + pos] += sum;
}

KVLAPSE_DEVICE void run(const SumFutureArgs& a, int block, unsigned char* memory) {
  auto* shared = reinterpret_cast<double*>(memory);
  const float* row = a.future + static_cast<int64_t>(block) * a.width;
  double sum = 0;
  for (int i = thread_index(); i < a.width; i += SumFutureArgs::kThreads) sum += static_cast<double>(row[i]);
  shared[thread_index()] = sum;
  block_sync();
  if (thread_index() != 0) return;
  for (int i = 1; i < SumFutureArgs::kThreads; ++i) sum += shared[i];
  a.sums[block] = sum;
}

// ---- outputs ----
// Of x = o~ - o: |x|^2, o.x and |o|^2.
KVLAPSE_DEVICE void errors_of(float x2, float with, float o2, float& error, float& cosine_error) {
  error = o2 > 0 ? device::square_root(x2 / o2) : x2 > 0 ? 1.0f : 0.0f;
  // 1 - cos from sin^2, which does not cancel.
  const float t2 = o2 + 2 * with + x2;
  cosine_error = 0;
  if (o2 > 0 && t2 > 0) {
    const float cosine = (o2 + with) / device::square_root(o2 * t2);
    const float across = o2 * x2 - with * with, sine2 = across > 0 ? across / (o2 * t2) : 0.0f;
    cosine_error = cosine > 0 ? sine2 / (1 + (cosine < 1 ? cosine : 1.0f)) : 1 - cosine;
  }
}

// A warp holds 8 steps x 4 query heads by all columns: its fragments of A come straight from memory, since a
// lane's rows g, g + 8, g + 16, g + 24 are the query heads of one step; its four columns are four tokens
// apart in the list, so that neighbouring lanes read neighbours. Values are staged for the block, 64 tokens
// of the list at a time.
template <int kTiles>
class Outputs {
 public:
  static constexpr int kChunk = OutputsArgs::kChunk, kSegment = OutputsArgs::kSegment,
                       kThreads = OutputsArgs::kThreads, kWarps = kThreads / 32, kHeads = 4,
                       kRowBytes = kTiles * 16 + OutputsArgs::kPad;
  // Share of the weight that held tokens need.
  static constexpr float kLeastDifference = 1.0f / 64, kLeastHalf = 1.0f / 131072;

  KVLAPSE_DEVICE Outputs(const OutputsArgs& args, int block, unsigned char* memory)
      : a_(args), shape_(args.shape), thread_(thread_index()), warp_(thread_ / 32), lane_(thread_ % 32) {
    const int configs = a_.full != 0 ? 1 : a_.n_configs;
    config_ = block % configs;
    head_ = block / configs % shape_.n_kv;
    quad_ = block / configs / shape_.n_kv % a_.quads();
    first_ = a_.t0 + block / configs / shape_.n_kv / a_.quads() * OutputsArgs::kSteps;
    end_ = least(a_.t1, first_ + OutputsArgs::kSteps);
    step_ = first_ + warp_ * 8 + lane_ / 4;
    values_ = device::smem_address(memory);
    list_pos_ = reinterpret_cast<int32_t*>(memory + 2 * kChunk * kRowBytes);
    list_last_ = list_pos_ + kSegment;
    counts_ = list_last_ + kSegment;
    barriers_ = device::smem_address(counts_ + 16);
    row_ = a_.weights + shape_.row(least(step_, a_.t1 - 1) - a_.t0, head_) + quad_ * kHeads;
    sums_dropped_ = a_.full == 0 && end_ - a_.held[config_] <= a_.held[config_];
    last_ = a_.full != 0 ? nullptr
                         : a_.last + (static_cast<int64_t>(config_) * shape_.n_kv + head_) * shape_.n_tokens;
  }

  KVLAPSE_DEVICE void run() {
    if (end_ <= a_.begin) return;
    if (thread_ == 0) {
      device::mbarrier_init(barriers_, kThreads);
      device::mbarrier_init(barriers_ + 8, kThreads);
    }
    block_sync();
    const int n_passes = (shape_.dim_padded() / 8 + kTiles - 1) / kTiles;
    float xx[kHeads] = {}, ox[kHeads] = {}, oo[kHeads] = {};
    for (int pass = 0; pass < n_passes; ++pass) {
      KVLAPSE_UNROLL
      for (int m = 0; m < 2; ++m) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 4; ++j) {
          mass_[m][j] = 0;
          KVLAPSE_UNROLL
          for (int n = 0; n < kTiles; ++n) sum_[m][n][j] = 0;
        }
      }
      for (int segment = 0; segment < end_; segment += kSegment) add_segment(segment, pass);
      if (a_.full != 0)
        store_full(pass);
      else
        compare(pass, xx, ox, oo);
    }
    if (a_.full == 0) close(xx, ox, oo);
  }

 private:
  KVLAPSE_DEVICE bool listed(int pos, int last) const {
    return pos < end_ && (sums_dropped_ ? last < end_ - 1 : last >= first_);
  }
  KVLAPSE_DEVICE int last_of(int pos) const {
    return last_ == nullptr ? kHeld : pos < shape_.n_tokens ? last_[pos] : -1;
  }
  // The tokens of a segment that count at some step, in order; padded to whole chunks with such as never do.
  KVLAPSE_DEVICE int build(int segment) {
    constexpr int kShare = kSegment / kWarps, kAtOnce = 8;
    static_assert(kShare % (32 * kAtOnce) == 0);
    const int from = segment + warp_ * kShare + lane_;
    int last[kAtOnce];
    int own = 0;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kShare; i += 32 * kAtOnce) {
      KVLAPSE_UNROLL
      for (int k = 0; k < kAtOnce; ++k) last[k] = last_of(from + i + 32 * k);
      KVLAPSE_UNROLL
      for (int k = 0; k < kAtOnce; ++k)
        own += device::bits_below(warp_ballot(listed(from + i + 32 * k, last[k])), 32);
    }
    block_sync();  // the list before is read
    if (lane_ == 0) counts_[warp_] = own;
    block_sync();
    int at = 0, n = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_) at += counts_[w];
      n += counts_[w];
    }
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kShare; i += 32 * kAtOnce) {
      KVLAPSE_UNROLL
      for (int k = 0; k < kAtOnce; ++k) last[k] = last_of(from + i + 32 * k);
      KVLAPSE_UNROLL
      for (int k = 0; k < kAtOnce; ++k) {
        const int pos = from + i + 32 * k;
        const uint32_t bits = warp_ballot(listed(pos, last[k]));
        if ((bits >> lane_ & 1u) != 0) {
          const int place = at + device::bits_below(bits, lane_);
          list_pos_[place] = pos, list_last_[place] = last[k];
        }
        at += device::bits_below(bits, 32);
      }
    }
    const int padded = (n + kChunk - 1) / kChunk * kChunk;
    for (int i = n + thread_; i < padded; i += kThreads)
      list_pos_[i] = 0, list_last_[i] = sums_dropped_ ? kHeld : -1;
    block_sync();
    return padded / kChunk;
  }
  // Row of a chunk's value in shared memory: the token of A's column there.
  KVLAPSE_DEVICE static int place_of(int entry) {
    const int in = entry % 16;
    return entry / 16 * 16 + in % 4 * 2 + in / 4 % 2 + in / 8 * 8;
  }
  KVLAPSE_DEVICE void stage(int chunk, int pass) {
    const SmemAddress to = values_ + static_cast<uint32_t>((loads_ & 1) * kChunk * kRowBytes);
    for (int i = thread_; i < kChunk * kTiles; i += kThreads) {
      const int entry = i / kTiles, piece = i % kTiles, column = (pass * kTiles + piece) * 8;
      const int pos = list_pos_[chunk * kChunk + entry];
      const bool inside = column < shape_.dim_padded();
      const uint16_t* from = a_.values +
                             (static_cast<int64_t>(head_) * shape_.n_tokens + pos) * shape_.dim_padded() +
                             (inside ? column : 0);
      device::copy_async16(to + static_cast<uint32_t>(place_of(entry) * kRowBytes + piece * 16), from,
                           inside);
    }
    device::copy_async_arrive(barriers_ + (loads_ & 1) * 8);
    ++loads_;
  }
  KVLAPSE_DEVICE void fetch(int entry, uint64_t (&to)[4]) const {
    KVLAPSE_UNROLL
    for (int e = 0; e < 4; ++e)
      to[e] = *reinterpret_cast<const uint64_t*>(
          row_ + static_cast<int64_t>(list_pos_[entry + 4 * e + lane_ % 4]) * shape_.lanes());
  }

  KVLAPSE_DEVICE void add_segment(int segment, int pass) {
    constexpr int kSlices = kChunk / 16;
    const int n_chunks = build(segment);
    if (n_chunks == 0) return;
    uint64_t ahead[kSlices][4];
    stage(0, pass);
    if (n_chunks > 1) stage(1, pass);
    KVLAPSE_UNROLL
    for (int s = 0; s < kSlices; ++s) fetch(s * 16, ahead[s]);
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      const int buffer = used_ & 1;
      device::mbarrier_wait(barriers_ + buffer * 8, used_ >> 1 & 1);
      ++used_;
      const SmemAddress rows = values_ + static_cast<uint32_t>(buffer * kChunk * kRowBytes);
      KVLAPSE_UNROLL
      for (int s = 0; s < kSlices; ++s) {
        const SmemAddress row =
            rows +
            static_cast<uint32_t>((s * 16 + (lane_ / 8 & 1) * 8 + lane_ % 8) * kRowBytes + lane_ / 16 * 16);
        uint32_t a[2][4], b[2][4];  // the next values on their way
        device::load_matrix4_transposed(b[0], row);
        select(chunk * kChunk + s * 16, ahead[s], a);
        if (chunk + 1 < n_chunks) fetch((chunk + 1) * kChunk + s * 16, ahead[s]);
        KVLAPSE_UNROLL
        for (int n = 0; n < kTiles; n += 2) {
          const uint32_t(&now)[4] = b[n / 2 % 2];
          if (n + 2 < kTiles)
            device::load_matrix4_transposed(b[(n / 2 + 1) % 2], row + static_cast<uint32_t>((n + 2) * 16));
          KVLAPSE_UNROLL
          for (int m = 0; m < 2; ++m) {
            device::multiply_add_16x8x16<device::F16>(sum_[m][n], a[m], now[0], now[1]);
            device::multiply_add_16x8x16<device::F16>(sum_[m][n + 1], a[m], now[2], now[3]);
          }
        }
        KVLAPSE_UNROLL
        for (int m = 0; m < 2; ++m)
          device::multiply_add_16x8x16<device::F16>(mass_[m], a[m], 0x3c003c00u, 0x3c003c00u);
      }
      block_sync();
      if (chunk + 2 < n_chunks) stage(chunk + 2, pass);
    }
  }
  // Weights of the tokens that count at this step, as two fragments of A.
  KVLAPSE_DEVICE void select(int entry, const uint64_t (&weights)[4], uint32_t (&a)[2][4]) const {
    uint32_t low[4], high[4];
    KVLAPSE_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int at = entry + 4 * e + lane_ % 4, last = list_last_[at];
      const bool counts = sums_dropped_ ? last < step_ : last >= step_ && list_pos_[at] <= step_;
      low[e] = counts ? static_cast<uint32_t>(weights[e]) : 0;
      high[e] = counts ? static_cast<uint32_t>(weights[e] >> 32) : 0;
    }
    KVLAPSE_UNROLL
    for (int m = 0; m < 2; ++m) {
      const uint32_t* w = m == 0 ? low : high;
      a[m][0] = (w[0] & 0xffffu) | w[1] << 16;
      a[m][1] = w[0] >> 16 | (w[1] & 0xffff0000u);
      a[m][2] = (w[2] & 0xffffu) | w[3] << 16;
      a[m][3] = w[2] >> 16 | (w[3] & 0xffff0000u);
    }
  }

  KVLAPSE_DEVICE int64_t row_of(int g) const {
    return static_cast<int64_t>(step_ - a_.t0) * shape_.n_q + head_ * shape_.group() + quad_ * kHeads + g;
  }
  KVLAPSE_DEVICE bool has(int g) const {
    return step_ < end_ && step_ >= a_.begin && quad_ * kHeads + g < shape_.group();
  }
  KVLAPSE_DEVICE void store_full(int pass) const {
    KVLAPSE_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      if (!has(g)) continue;
      const float total = mass_[g / 2][g % 2 * 2], inverse = 1.0f / total;
      float* to = a_.outputs + row_of(g) * shape_.dim_padded();
      KVLAPSE_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const int column = (pass * kTiles + n) * 8 + lane_ % 4 * 2;
        if (column >= shape_.dim_padded()) continue;
        to[column] = sum_[g / 2][n][g % 2 * 2] * inverse;
        to[column + 1] = sum_[g / 2][n][g % 2 * 2 + 1] * inverse;
      }
      if (lane_ % 4 == 0 && pass == 0) a_.totals[row_of(g)] = total;
    }
  }
  // x = o~ - o: |x|^2, o.x and |o|^2 over this lane's columns.
  KVLAPSE_DEVICE void compare(int pass, float (&xx)[kHeads], float (&ox)[kHeads], float (&oo)[kHeads]) const {
    KVLAPSE_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      if (!has(g)) continue;
      const float mass = mass_[g / 2][g % 2 * 2], total = a_.totals[row_of(g)];
      const float kept = sums_dropped_ ? total - mass : mass, inverse = kept > 0 ? 1.0f / kept : 0.0f;
      const float of_full = sums_dropped_ ? mass * inverse : -1.0f,
                  of_sum = sums_dropped_ ? -inverse : inverse;
      const float* full = a_.outputs + row_of(g) * shape_.dim_padded();
      KVLAPSE_UNROLL
      for (int n = 0; n < kTiles; ++n) {
        const int column = (pass * kTiles + n) * 8 + lane_ % 4 * 2;
        if (column >= shape_.dim_padded()) continue;
        KVLAPSE_UNROLL
        for (int j = 0; j < 2; ++j) {
          const float o = full[column + j], x = fmaf(o, of_full, of_sum * sum_[g / 2][n][g % 2 * 2 + j]);
          xx[g] = fmaf(x, x, xx[g]);
          ox[g] = fmaf(o, x, ox[g]);
          oo[g] = fmaf(o, o, oo[g]);
        }
      }
    }
  }
  KVLAPSE_DEVICE void close(const float (&xx)[kHeads], const float (&ox)[kHeads],
                            const float (&oo)[kHeads]) const {
    const int64_t plane = static_cast<int64_t>(a_.n_configs) * shape_.n_q * shape_.n_tokens;
    KVLAPSE_UNROLL
    for (int g = 0; g < kHeads; ++g) {
      float sums[3] = {xx[g], ox[g], oo[g]};
      KVLAPSE_UNROLL
      for (int k = 0; k < 3; ++k) {
        sums[k] += shuffle_xor(sums[k], 1);
        sums[k] += shuffle_xor(sums[k], 2);
      }
      if (lane_ % 4 != 0 || !has(g)) continue;
      const int row = config_ * shape_.n_q + head_ * shape_.group() + quad_ * kHeads + g;
      const float mass = mass_[g / 2][g % 2 * 2], total = a_.totals[row_of(g)];
      if (sums_dropped_ ? total - mass < kLeastDifference * total : mass < kLeastHalf * total) {
        a_.repairs[device::global_append(a_.n_repairs)] = {row, step_};
        continue;
      }
      float error, cosine_error;
      errors_of(sums[0], sums[1], sums[2], error, cosine_error);
      float* to = a_.metrics + static_cast<int64_t>(row) * shape_.n_tokens + step_;
      to[kError * plane] = error;
      to[kCosine * plane] = cosine_error;
    }
  }

  const OutputsArgs& a_;
  const Shape shape_;
  const int thread_, warp_, lane_;
  int config_, head_, quad_, first_, end_, step_;
  SmemAddress values_, barriers_;
  int32_t *list_pos_, *list_last_, *counts_;
  const uint16_t* row_;
  const int32_t* last_;
  bool sums_dropped_;
  int loads_ = 0, used_ = 0;
  float sum_[2][kTiles][4], mass_[2][4];
};

// A warp takes every eighth run of 32 tokens; a lane the components lane, lane + 32, ...
KVLAPSE_DEVICE void run(const RepairsArgs& a, int block, unsigned char* memory) {
  constexpr int kWarps = RepairsArgs::kThreads / 32, kOwn = kMaxDim / 32, kAtOnce = 4;
  const Shape& shape = a.shape;
  const int thread = thread_index(), warp = thread / 32, lane = thread % 32, dim = shape.dim;
  const int64_t plane = static_cast<int64_t>(a.n_configs) * shape.n_q * shape.n_tokens;
  float* parts = reinterpret_cast<float*>(memory);  // [warps][dim + 1]
  const auto n = static_cast<int>(*a.n_repairs);
  for (int i = block; i < n; i += a.n_blocks()) {
    const Repair at = a.repairs[i];
    const int q = at.row % shape.n_q, config = at.row / shape.n_q, h = q / shape.group(),
              g = q % shape.group(), t = at.step;
    const int32_t* last = a.last + (static_cast<int64_t>(config) * shape.n_kv + h) * shape.n_tokens;
    const float* weights = a.weights + shape.row(t - a.t0, h) + g;
    float sum[kOwn] = {}, mass = 0;
    for (int token = warp * 32; token <= t; token += kWarps * 32) {
      const int pos = token + lane;
      const float p = pos <= t && last[pos] >= t ? weights[static_cast<int64_t>(pos) * shape.lanes()] : 0.0f;
      uint32_t bits = warp_ballot(p > 0);
      while (bits != 0) {
        float share[kAtOnce];
        const float* v[kAtOnce];
        KVLAPSE_UNROLL
        for (int k = 0; k < kAtOnce; ++k) {
          const int from = bits != 0 ? device::lowest_bit(bits) : 0;
          const float other = shuffle_from(p, from);
          share[k] = bits != 0 ? other : 0.0f;
          v[k] = a.v + (static_cast<int64_t>(token + from) * shape.n_kv + h) * dim;
          bits &= bits - 1;
          mass += share[k];
        }
        KVLAPSE_UNROLL
        for (int j = 0; j < kOwn; ++j) {
          const int d = lane + 32 * j;
          if (d >= dim) continue;
          KVLAPSE_UNROLL
          for (int k = 0; k < kAtOnce; ++k)
            if (share[k] > 0) sum[j] = fmaf(share[k], v[k][d], sum[j]);
        }
      }
    }
    float* part = parts + warp * (dim + 1);
    KVLAPSE_UNROLL
    for (int j = 0; j < kOwn; ++j)
      if (lane + 32 * j < dim) part[lane + 32 * j] = sum[j];
    if (lane == 0) part[dim] = mass;
    block_sync();
    if (warp == 0) {
      mass = 0;
      for (int w = 0; w < kWarps; ++w) mass += parts[w * (dim + 1) + dim];
      const float inverse = mass > 0 ? 1.0f / mass : 0.0f;
      const float* full = a.outputs + (static_cast<int64_t>(t - a.t0) * shape.n_q + q) * shape.dim_padded();
      float xx = 0, ox = 0, oo = 0;
      for (int d = lane; d < dim; d += 32) {
        float held = 0;
        for (int w = 0; w < kWarps; ++w) held += parts[w * (dim + 1) + d];
        const float o = full[d], x = fmaf(held, inverse, -o);
        xx = fmaf(x, x, xx);
        ox = fmaf(o, x, ox);
        oo = fmaf(o, o, oo);
      }
      KVLAPSE_UNROLL
      for (int mask = 16; mask > 0; mask /= 2)
        xx += shuffle_xor(xx, mask), ox += shuffle_xor(ox, mask), oo += shuffle_xor(oo, mask);
      if (lane == 0) {
        float error, cosine_error;
        errors_of(xx, ox, oo, error, cosine_error);
        float* to = a.metrics + static_cast<int64_t>(at.row) * shape.n_tokens + t;
        to[kError * plane] = error;
        to[kCosine * plane] = cosine_error;
      }
    }
    block_sync();
  }
}

// ---- close ----
KVLAPSE_DEVICE void run(const CloseArgs& a, int block, unsigned char* memory) {
  constexpr int kThreads = CloseArgs::kThreads, kBins = sketch_bins::kBins, kSums = 7;
  const Shape& shape = a.shape;
  auto* sums = reinterpret_cast<double*>(memory);  // [threads][kSums]
  auto* bins = reinterpret_cast<uint32_t*>(sums + kThreads * kSums);
  const int thread = thread_index();
  const int64_t head = block, plane = static_cast<int64_t>(a.n_configs) * shape.n_q * shape.n_tokens;
  for (int i = thread; i < 4 * kBins; i += kThreads) bins[i] = 0;
  block_sync();
  double own[kSums] = {};
  for (int b = thread; b < a.n_series; b += kThreads) {
    const auto first =
                   static_cast<int>((static_cast<int64_t>(b) * shape.n_tokens + a.n_series - 1) / a.n_series),
               behind = static_cast<int>((static_cast<int64_t>(b + 1) * shape.n_tokens + a.n_series - 1) /
                                         a.n_series);
    const int from = most(first, a.begin), to = least(behind, a.end);
    double recall_sum = 0, error_sum = 0;
    for (int t = from; t < to; ++t) {
      const float* m = a.metrics + head * shape.n_tokens + t;
      const float missing = m[kMissing * plane], rest = m[kMissingRest * plane], error = m[kError * plane],
                  cosine = m[kCosine * plane];
      const double recall = 1.0 - static_cast<double>(missing);
      recall_sum += recall, error_sum += static_cast<double>(error);
      own[0] += recall < 0.9 ? 1 : 0;
      own[2] += 1.0 - static_cast<double>(rest);
      own[4] += static_cast<double>(cosine);
      own[5] += static_cast<double>(m[kTopHeld * plane]);
      own[6] += static_cast<double>(missing);
      const float sketched[4] = {missing, rest, error, cosine};
      KVLAPSE_UNROLL
      for (int k = 0; k < 4; ++k)
        device::shared_increment(
            bins + k * kBins +
            (sketched[k] > 0 ? sketch_bins::bin_of_bits(device::float_bits(sketched[k])) : 0));
    }
    own[1] += recall_sum, own[3] += error_sum;
    float* series = a.series + head * 2 * a.n_series + b;
    const double n = to - from;
    series[0] = to > from ? static_cast<float>(recall_sum / n) : device::bits_float(0x7fc00000u);
    series[a.n_series] = to > from ? static_cast<float>(error_sum / n) : device::bits_float(0x7fc00000u);
  }
  for (int k = 0; k < kSums; ++k) sums[thread * kSums + k] = own[k];
  block_sync();
  for (int i = thread; i < 4 * kBins; i += kThreads) a.sketches[head * 4 * kBins + i] = bins[i];
  if (thread != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    for (int k = 0; k < kSums; ++k) own[k] += sums[i * kSums + k];
  }
  a.sums[head] = {static_cast<int64_t>(own[0]), own[1], own[2], own[3], own[4], own[5], own[6]};
}

}  // namespace kvlapse::gpu_replay
