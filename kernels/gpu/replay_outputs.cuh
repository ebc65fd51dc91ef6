// Errors of the outputs: products of half precision of the smaller side, and rows that need fp32.
#pragma once

#include "kernels/gpu/replay_common.cuh"

namespace kvlapse::gpu_replay {

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

}  // namespace kvlapse::gpu_replay
