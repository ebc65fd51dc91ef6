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

// A block has a tile of steps x 4 query heads by 8 * kTiles columns, a warp a quarter of the rows by half of
// the columns. Weights and values of the tokens that count come by chunks into shared memory, some ahead.
// Those that count at every step of the tile come first; chunks with others are masked there.
template <int kTiles, bool kFull>
class Outputs {
 public:
  static constexpr int kChunk = kFull ? OutputsArgs::kFullChunk : OutputsArgs::kChunk,
                       kBuffers = kFull ? OutputsArgs::kFullBuffers : OutputsArgs::kBuffers,
                       kSegment = OutputsArgs::kSegment, kThreads = OutputsArgs::kThreads,
                       kWarps = kThreads / 32, kHeads = 4, kSteps = OutputsArgs::kSteps,
                       kRows = kSteps * kHeads, kM = kRows / 64,  // tiles of 16 rows a warp
      kN = kTiles / 2,                                            // tiles of 8 columns a warp
      kWeightBytes = kSteps * 8 + OutputsArgs::kPad, kValueBytes = kTiles * 16 + OutputsArgs::kPad,
                       kBufferBytes = kChunk * (kWeightBytes + kValueBytes),
                       kShare = kSegment / kThreads;  // positions of a segment a lane looks at
  static_assert(kWarps == 8 && kShare == 16 && kM % 2 == 0 && kN % 2 == 0 && kChunk % kWarps == 0 &&
                kSteps == 32);
  // Share of the weight that held tokens need.
  static constexpr float kLeastDifference = 1.0f / 64, kLeastHalf = 1.0f / 131072;

  KVLAPSE_DEVICE Outputs(const OutputsArgs& args, int block, unsigned char* memory)
      : a_(args), shape_(args.shape), thread_(thread_index()), warp_(thread_ / 32), lane_(thread_ % 32) {
    const int configs = kFull ? 1 : a_.n_configs;
    config_ = block % configs;
    head_ = block / configs % shape_.n_kv;
    quad_ = block / configs / shape_.n_kv % a_.quads();
    first_ = a_.t0 + block / configs / shape_.n_kv / a_.quads() * kSteps;
    end_ = least(a_.t1, first_ + kSteps);
    memory_ = memory;
    buffers_ = device::smem_address(memory);
    list_ = reinterpret_cast<uint16_t*>(memory + kBuffers * kBufferBytes);
    counts_ = reinterpret_cast<uint32_t*>(list_ + kSegment);
    barriers_ = device::smem_address(counts_ + kWarps);
    errors_ = reinterpret_cast<float*>(counts_ + 32);
    sums_dropped_ = !kFull && end_ - a_.held[config_] <= a_.held[config_];
    units_ = static_cast<uint32_t>(shape_.n_kv) * shape_.stride * a_.quads();
    weights_ = a_.weights + shape_.row(first_ - a_.t0, head_) + quad_ * kHeads;
    values_ = a_.values + static_cast<int64_t>(head_) * shape_.n_tokens * shape_.dim_padded();
    last_ =
        kFull ? nullptr : a_.last + (static_cast<int64_t>(config_) * shape_.n_kv + head_) * shape_.n_tokens;
  }

  KVLAPSE_DEVICE void run() {
    if (end_ <= a_.begin) return;
    if (thread_ == 0) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kBuffers; ++i) device::mbarrier_init(barriers_ + i * 8, kThreads);
    }
    block_sync();
    const int n_passes = (shape_.dim_padded() / 8 + kTiles - 1) / kTiles;
    KVLAPSE_NO_UNROLL
    for (int pass = 0; pass < n_passes; ++pass) {
      KVLAPSE_UNROLL
      for (int m = 0; m < kM; ++m) {
        KVLAPSE_UNROLL
        for (int n = 0; n < kN; ++n) {
          KVLAPSE_UNROLL
          for (int j = 0; j < 4; ++j) sum_[m][n][j] = 0;
        }
      }
      KVLAPSE_UNROLL
      for (int m = 0; m < kM / 2; ++m) {
        KVLAPSE_UNROLL
        for (int j = 0; j < 4; ++j) mass_[m][j] = 0;
      }
      KVLAPSE_NO_UNROLL
      for (segment_ = 0; segment_ < end_; segment_ += kSegment) add_segment(pass, pass + 1 == n_passes);
      if constexpr (kFull)
        store_full(pass);
      else
        compare(pass);
    }
    if constexpr (!kFull) close();
  }

 private:
  // ---- the list of a segment ----
  // Counts at some step of the tile, at every one.
  KVLAPSE_DEVICE bool listed(int last) const { return sums_dropped_ ? last < end_ - 1 : last >= first_; }
  KVLAPSE_DEVICE bool always(int pos, int last) const {
    return sums_dropped_ ? last < first_ : last >= end_ - 1 && pos <= first_;
  }
  // In order: those that always count, then the others.
  KVLAPSE_DEVICE void build() {
    if constexpr (kFull) {
      n_listed_ = least(kSegment, end_ - segment_);
      n_always_ = most(0, least(n_listed_, first_ + 1 - segment_));
    } else {
      build_list();
    }
  }
  KVLAPSE_DEVICE void build_list() {
    const int from = segment_ + warp_ * kShare * 32 + lane_;
    int last[kShare];
    KVLAPSE_UNROLL
    for (int k = 0; k < kShare; ++k)
      last[k] = from + 32 * k < end_ ? last_[from + 32 * k] : sums_dropped_ ? kHeld : -1;
    uint32_t own = 0;    // and those that always count, above
    uint32_t kinds = 0;  // two bits a position: counts; always counts
    KVLAPSE_UNROLL
    for (int k = 0; k < kShare; ++k)
      kinds |= (listed(last[k]) ? 1u : 0u) << 2 * k | (always(from + 32 * k, last[k]) ? 2u : 0u) << 2 * k;
    KVLAPSE_NO_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const uint32_t kind = kinds >> 2 * k;
      own += static_cast<uint32_t>(device::bits_below(warp_ballot((kind & 1) != 0), 32)) +
             (static_cast<uint32_t>(device::bits_below(warp_ballot((kind & 2) != 0), 32)) << 16);
    }
    if (lane_ == 0) counts_[warp_] = own;
    block_sync();
    uint32_t before = 0, all = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp_) before += counts_[w];
      all += counts_[w];
    }
    n_listed_ = static_cast<int>(all & 0xffffu), n_always_ = static_cast<int>(all >> 16);
    int first_always = static_cast<int>(before >> 16),
        first_other = n_always_ + static_cast<int>(before & 0xffffu) - first_always;
    KVLAPSE_NO_UNROLL
    for (int k = 0; k < kShare; ++k) {
      const bool in = (kinds >> 2 * k & 1) != 0, constant = (kinds >> 2 * k & 2) != 0;
      const uint32_t bits = warp_ballot(constant), others = warp_ballot(in && !constant);
      if (in)
        list_[constant ? first_always + device::bits_below(bits, lane_)
                       : first_other + device::bits_below(others, lane_)] =
            static_cast<uint16_t>(from + 32 * k - segment_);
      first_always += device::bits_below(bits, 32);
      first_other += device::bits_below(others, 32);
    }
    const int padded = (n_listed_ + kChunk - 1) / kChunk * kChunk;
    if (n_listed_ + thread_ < padded) list_[n_listed_ + thread_] = 0;
    block_sync();
  }
  KVLAPSE_DEVICE int pos_of(int entry) const { return segment_ + (kFull ? entry : list_[entry]); }

  // ---- chunks ----
  // A token's weights at the tile's steps, turned: in quads of numbers.
  KVLAPSE_DEVICE uint64_t* steps_of(int pos) const {
    return reinterpret_cast<uint64_t*>(weights_) + static_cast<uint32_t>(pos) % kSteps * units_ +
           static_cast<uint32_t>(pos) / kSteps * kSteps * static_cast<uint32_t>(a_.quads());
  }
  KVLAPSE_DEVICE void stage(int chunk, int pass, int buffer) const {
    const SmemAddress weights = buffers_ + static_cast<uint32_t>(buffer * kBufferBytes),
                      values = weights + kChunk * kWeightBytes;
    constexpr int kOwn = kChunk / kWarps, kHalf = kOwn / 2,
                  kAtOnce = 32 / kTiles;  // tokens whose values a warp copies at a time
    const int own0 = warp_ * kOwn, entry0 = chunk * kChunk + own0;
    const int piece = lane_ % kTiles, column = (pass * kTiles + piece) * 8;
    const bool inside = column < shape_.dim_padded();
    const uint16_t* const from = values_ + (inside ? column : 0);
    const auto put_values = [&](int token, int pos) {
      const bool valid = inside && (!kFull || pos < end_);
      device::copy_async16(
          values + static_cast<uint32_t>((own0 + token) * kValueBytes + piece * 16),
          from + static_cast<uint64_t>(static_cast<uint32_t>(valid ? pos : 0)) * shape_.dim_padded(), valid);
    };
    if constexpr (kFull) {
      const int token = own0 + lane_ % kOwn, pos = pos_of(chunk * kChunk + token);
      KVLAPSE_UNROLL
      for (int step = lane_ / kOwn; step < kSteps; step += 32 / kOwn) {
        const bool valid = first_ + step < a_.t1;
        device::copy_async8(weights + static_cast<uint32_t>(token * kWeightBytes + step * 8),
                            reinterpret_cast<const uint64_t*>(weights_) +
                                static_cast<uint32_t>(valid ? step : 0) * units_ +
                                static_cast<uint32_t>(pos * a_.quads()),
                            valid);
      }
    } else if (a_.quads() == 1) {
      int pos[kHalf];
      KVLAPSE_UNROLL
      for (int i = 0; i < kHalf; ++i) pos[i] = pos_of(entry0 + 2 * i + lane_ / 16);
      KVLAPSE_UNROLL
      for (int i = 0; i < kHalf; ++i) {
        const int token = 2 * i + lane_ / 16;
        device::copy_async16(weights + static_cast<uint32_t>((own0 + token) * kWeightBytes + lane_ % 16 * 16),
                             steps_of(pos[i]) + lane_ % 16 * 2, true);
        if (kAtOnce == 2) put_values(token, pos[i]);
      }
    } else {
      KVLAPSE_UNROLL
      for (int i = 0; i < kOwn; ++i)
        device::copy_async8(weights + static_cast<uint32_t>((own0 + i) * kWeightBytes + lane_ * 8),
                            steps_of(pos_of(entry0 + i)) + lane_ * a_.quads(), true);
    }
    if (kFull || kAtOnce != 2 || a_.quads() != 1) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kOwn; i += kAtOnce)
        put_values(i + lane_ / kTiles, pos_of(entry0 + i + lane_ / kTiles));
    }
    device::copy_async_arrive(barriers_ + static_cast<uint32_t>(buffer * 8));
  }
  // Clears weights of the steps at which a token does not count.
  KVLAPSE_DEVICE void mask(int chunk, int buffer) const {
    constexpr int kParts = kThreads / kChunk, kOwn = kSteps / kParts;
    const int token = thread_ % kChunk, entry = chunk * kChunk + token, pos = pos_of(entry);
    const int last = entry >= n_listed_ ? sums_dropped_ ? kHeld : -1 : kFull ? kHeld : last_[pos];
    const SmemAddress at = buffers_ + static_cast<uint32_t>(buffer * kBufferBytes + token * kWeightBytes);
    KVLAPSE_UNROLL
    for (int i = 0; i < kOwn; ++i) {
      const int own = thread_ / kChunk * kOwn + i, step = first_ + own;
      const bool counts = sums_dropped_ ? last < step : last >= step && pos <= step;
      if (!counts) device::smem_store_u64(at + static_cast<uint32_t>(own * 8), 0);
    }
  }
  // The chunk's weights back to memory, by token.
  KVLAPSE_DEVICE void turn(int chunk, int buffer) const {
    constexpr int kOwn = kChunk / kWarps;
    const unsigned char* weights = memory_ + buffer * kBufferBytes;
    const int token0 = warp_ * kOwn, pos0 = segment_ + chunk * kChunk + token0;
    if (a_.quads() == 1) {
      KVLAPSE_UNROLL
      for (int i = lane_ / 16; i < kOwn; i += 2)
        *reinterpret_cast<Float4*>(steps_of(pos0 + i) + lane_ % 16 * 2) =
            *reinterpret_cast<const Float4*>(weights + (token0 + i) * kWeightBytes + lane_ % 16 * 16);
    } else {
      KVLAPSE_UNROLL
      for (int i = 0; i < kOwn; ++i)
        steps_of(pos0 + i)[lane_ * a_.quads()] =
            *reinterpret_cast<const uint64_t*>(weights + (token0 + i) * kWeightBytes + lane_ * 8);
    }
  }

  KVLAPSE_DEVICE void add_segment(int pass, bool last_pass) {
    build();
    const int n_chunks = (n_listed_ + kChunk - 1) / kChunk;
    if (n_chunks == 0) return;
    int ahead = buffer_;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kBuffers - 1; ++i) {
      if (i < n_chunks) stage(i, pass, ahead);
      if (++ahead == kBuffers) ahead = 0;
    }
    KVLAPSE_NO_UNROLL
    for (int chunk = 0; chunk < n_chunks; ++chunk) {
      device::mbarrier_wait(barriers_ + static_cast<uint32_t>(buffer_ * 8), parity_);
      block_sync();  // the chunk before is read
      if (chunk + kBuffers - 1 < n_chunks) stage(chunk + kBuffers - 1, pass, ahead);
      if ((chunk + 1) * kChunk > n_always_) {
        mask(chunk, buffer_);
        block_sync();
      }
      multiply(buffer_);
      if (kFull && last_pass) turn(chunk, buffer_);
      if (++buffer_ == kBuffers) buffer_ = 0, parity_ ^= 1;
      if (++ahead == kBuffers) ahead = 0;
    }
  }
  // A warp's tiles of rows: those whose weights it sums come first.
  KVLAPSE_DEVICE int side() const { return warp_ % 2; }
  KVLAPSE_DEVICE int first_row(int m) const { return warp_ / 2 * (kM * 16) + (m ^ side() * (kM / 2)) * 16; }
  KVLAPSE_DEVICE void multiply(int buffer) {
    const SmemAddress weights = buffers_ + static_cast<uint32_t>(buffer * kBufferBytes),
                      values = weights + kChunk * kWeightBytes;
    const int token = lane_ / 16 * 8 + lane_ % 8, other = (lane_ / 8 & 1) * 8 + lane_ % 8;
    SmemAddress rows[kM];
    KVLAPSE_UNROLL
    for (int m = 0; m < kM; ++m)
      rows[m] =
          weights + static_cast<uint32_t>(token * kWeightBytes + (first_row(m) + (lane_ / 8 & 1) * 8) * 2);
    const SmemAddress columns =
        values + static_cast<uint32_t>(other * kValueBytes + side() * kN * 16 + lane_ / 16 * 16);
    KVLAPSE_UNROLL
    for (int s = 0; s < kChunk / 16; ++s) {
      uint32_t a[kM][4], b[2][4];  // the next values on their way
      const SmemAddress column = columns + static_cast<uint32_t>(s * 16 * kValueBytes);
      device::load_matrix4_transposed(b[0], column);
      KVLAPSE_UNROLL
      for (int m = 0; m < kM; ++m)
        device::load_matrix4_transposed(a[m], rows[m] + static_cast<uint32_t>(s * 16 * kWeightBytes));
      KVLAPSE_UNROLL
      for (int n = 0; n < kN; n += 2) {
        const uint32_t(&now)[4] = b[n / 2 % 2];
        if (n + 2 < kN)
          device::load_matrix4_transposed(b[(n / 2 + 1) % 2], column + static_cast<uint32_t>((n + 2) * 16));
        KVLAPSE_UNROLL
        for (int m = 0; m < kM; ++m) {
          device::multiply_add_16x8x16<device::F16>(sum_[m][n], a[m], now[0], now[1]);
          device::multiply_add_16x8x16<device::F16>(sum_[m][n + 1], a[m], now[2], now[3]);
        }
      }
      KVLAPSE_UNROLL
      for (int m = 0; m < kM / 2; ++m)
        device::multiply_add_16x8x16<device::F16>(mass_[m], a[m], 0x3c003c00u, 0x3c003c00u);
    }
  }

  // ---- results ----
  // From here on a lane has a row, of a warp's 32: step by step, the heads of one side by side.
  static constexpr int kRowFloats = kTiles * 8 + 8, kOwnRows = kRows / kWarps;
  KVLAPSE_DEVICE float* sums() const { return reinterpret_cast<float*>(memory_); }  // [rows][kRowFloats]
  KVLAPSE_DEVICE float* masses() const { return reinterpret_cast<float*>(list_); }  // [rows]
  KVLAPSE_DEVICE int own_row() const { return warp_ * kOwnRows + lane_ % kOwnRows; }
  KVLAPSE_DEVICE bool has(int row) const {
    const int step = first_ + row / kHeads;
    return step < end_ && step >= a_.begin && quad_ * kHeads + row % kHeads < shape_.group();
  }
  KVLAPSE_DEVICE int64_t query_of(int row) const {
    return static_cast<int64_t>(first_ - a_.t0 + row / kHeads) * shape_.n_q + head_ * shape_.group() +
           quad_ * kHeads + row % kHeads;
  }
  // Sums and masses into shared memory, where chunks and the list were.
  KVLAPSE_DEVICE void share() const {
    static_assert(kRows * kRowFloats * 4 <= kBuffers * kBufferBytes && kRows * 4 <= kSegment * 2);
    block_sync();
    KVLAPSE_UNROLL
    for (int m = 0; m < kM; ++m) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int row = first_row(m) + 8 * j + lane_ / 4;
        const SmemAddress to =
            buffers_ + static_cast<uint32_t>((row * kRowFloats + side() * kN * 8 + lane_ % 4 * 2) * 4);
        KVLAPSE_UNROLL
        for (int n = 0; n < kN; ++n)
          device::smem_store_u64(to + static_cast<uint32_t>(n * 32),
                                 static_cast<uint64_t>(device::float_bits(sum_[m][n][2 * j + 1])) << 32 |
                                     device::float_bits(sum_[m][n][2 * j]));
        if (m < kM / 2 && lane_ % 4 == 0) masses()[row] = mass_[m][2 * j];
      }
    }
    block_sync();
  }
  KVLAPSE_DEVICE void store_full(int pass) const {
    share();
    const float total = masses()[own_row()], inverse = 1.0f / total;
    if (lane_ < kOwnRows && has(own_row())) a_.totals[query_of(own_row())] = total;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kOwnRows; ++i) {
      const int row = warp_ * kOwnRows + i;
      const float scale = shuffle_from(inverse, i);
      const int column = pass * kTiles * 8 + lane_ * 4;
      if (!has(row) || lane_ * 4 >= kTiles * 8 || column >= shape_.dim_padded()) continue;
      Weights<4> w = Weights<4>::load(sums() + row * kRowFloats + lane_ * 4);
      KVLAPSE_UNROLL
      for (int k = 0; k < 4; ++k) w.v[k] *= scale;
      w.store(a_.outputs + query_of(row) * shape_.dim_padded() + column);
    }
    block_sync();  // chunks and lists to come
  }
  // Of x = o~ - o adds |x|^2, o.x and |o|^2 of these columns.
  KVLAPSE_DEVICE void compare(int pass) const {
    share();
    const bool own = has(own_row());
    const float mass = masses()[own_row()], total = own ? a_.totals[query_of(own_row())] : 1.0f;
    const float kept = sums_dropped_ ? total - mass : mass, inverse = own && kept > 0 ? 1.0f / kept : 0.0f;
    const float of_full = sums_dropped_ ? mass * inverse : -1.0f, of_sum = sums_dropped_ ? -inverse : inverse;
    float errors[3] = {};
    // Four rows at a time, eight lanes a row.
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < kOwnRows; i += 4) {
      const int own_i = i + lane_ / 8, row = warp_ * kOwnRows + own_i;
      const float full_share = shuffle_from(of_full, own_i), sum_share = shuffle_from(of_sum, own_i);
      float of_row[3] = {};
      Weights<4> o[kTiles / 4];
      KVLAPSE_UNROLL
      for (int j = 0; j < kTiles / 4; ++j) {
        const int column = pass * kTiles * 8 + j * 32 + lane_ % 8 * 4;
        o[j] = {};
        if (column < shape_.dim_padded() && has(row))
          o[j] = Weights<4>::load(a_.outputs + query_of(row) * shape_.dim_padded() + column);
      }
      KVLAPSE_UNROLL
      for (int j = 0; j < kTiles / 4; ++j) {
        const Weights<4> w = Weights<4>::load(sums() + row * kRowFloats + j * 32 + lane_ % 8 * 4);
        KVLAPSE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float x = fmaf(o[j].v[k], full_share, sum_share * w.v[k]);
          of_row[0] = fmaf(x, x, of_row[0]);
          of_row[1] = fmaf(o[j].v[k], x, of_row[1]);
          of_row[2] = fmaf(o[j].v[k], o[j].v[k], of_row[2]);
        }
      }
      KVLAPSE_UNROLL
      for (int k = 0; k < 3; ++k) {
        KVLAPSE_UNROLL
        for (int mask = 4; mask > 0; mask /= 2) of_row[k] += shuffle_xor(of_row[k], mask);
        const float own_row = shuffle_from(of_row[k], lane_ % 4 * 8);
        if (lane_ / 4 * 4 == i) errors[k] += own_row;
      }
    }
    if (lane_ < kOwnRows) {
      KVLAPSE_UNROLL
      for (int k = 0; k < 3; ++k) {
        float& sum = errors_[k * kRows + own_row()];
        sum = (pass > 0 ? sum : 0.0f) + errors[k];
      }
    }
    block_sync();  // chunks and lists to come
  }
  KVLAPSE_DEVICE void close() const {
    const int row = own_row(), step = first_ + row / kHeads;
    if (lane_ >= kOwnRows || !has(row)) return;
    const float mass = masses()[row];
    const int64_t plane = static_cast<int64_t>(a_.n_configs) * shape_.n_q * shape_.n_tokens;
    const int q = config_ * shape_.n_q + head_ * shape_.group() + quad_ * kHeads + row % kHeads;
    const float total = a_.totals[query_of(row)];
    if (sums_dropped_ ? total - mass < kLeastDifference * total : mass < kLeastHalf * total) {
      a_.repairs[device::global_append(a_.n_repairs)] = {q, step};
      return;
    }
    float error, cosine_error;
    errors_of(errors_[row], errors_[kRows + row], errors_[2 * kRows + row], error, cosine_error);
    float* to = a_.metrics + static_cast<int64_t>(q) * shape_.n_tokens + step;
    to[kError * plane] = error;
    to[kCosine * plane] = cosine_error;
  }

  const OutputsArgs& a_;
  const Shape shape_;
  const int thread_, warp_, lane_;
  int config_, head_, quad_, first_, end_;
  uint32_t units_;     // quads of numbers of a step
  uint16_t* weights_;  // of the tile's first step
  const uint16_t* values_;
  unsigned char* memory_;
  SmemAddress buffers_, barriers_;
  uint16_t* list_;
  uint32_t* counts_;
  float* errors_;  // [3][rows]
  const int32_t* last_;
  bool sums_dropped_;
  int segment_ = 0, n_listed_ = 0, n_always_ = 0;
  int buffer_ = 0;  // the next to be read
  uint32_t parity_ = 0;
  float sum_[kM][kN][4], mass_[kM / 2][4];
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
