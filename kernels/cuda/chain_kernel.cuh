// The product chain on the device (contract: kernels/decode/chain_args.h). Written in the operations of
// device_ops.cuh only; include that (or the emulator) first.
//
// One block a multiprocessor, all resident. One warp copies the block's groups of all phases through a ring
// in shared memory and waits for nobody but the ring: weights are constants, so they arrive while a phase
// waits for its input, and before the kernel in front has ended. Eight warps multiply: a chunk of a group's
// columns each, weights as the 16 x 16 operand of the matrix instruction, activations as the other. One warp
// sums the eight warps' parts of a group in fixed order and writes outputs.
//
// Columns of the matrix instruction: 2b and 2b + 1 are the two bf16 parts of sequence b's activations (the
// second is zero for bf16 inputs), so that lane (g, t) of a result holds rows g and g + 8 of sequence t.
#pragma once

#include "kernels/cuda/ring_cursor.cuh"
#include "kernels/decode/chain_args.h"

namespace kvlapse::device {

inline constexpr int kChainConsumerBarrier = 1;

class ProductChain {
 public:
  KVLAPSE_DEVICE ProductChain(const ChainArgs& args, unsigned char* shared)
      : args_(args),
        small_(*reinterpret_cast<ChainSmall*>(shared + args.small_offset)),
        ring_(smem_address(shared)),
        input_(ring_ + static_cast<uint32_t>(args.input_offset)),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32) {}

  KVLAPSE_DEVICE void run() {
    if (thread_index() == 0) init_barriers();
    block_sync();
    allow_next_kernel();
    if (warp_ == kChainWarps)
      copy();
    else if (warp_ > kChainWarps)
      finish();
    else
      multiply();
  }

 private:
  struct Groups {
    int begin, end;
  };
  // Tiles ahead of the matrix instruction, in registers.
  static constexpr int kAhead = 8;

  KVLAPSE_DEVICE static Groups groups_of(const ChainPhase& phase) {
    return {block_index() * phase.n_groups / block_count(),
            (block_index() + 1) * phase.n_groups / block_count()};
  }
  KVLAPSE_DEVICE static int tiles_of(const ChainPhase& phase) { return phase.columns / kChainTileColumns; }
  KVLAPSE_DEVICE static int chunks_of(const ChainPhase& phase) {
    return (tiles_of(phase) + kChainChunkTiles - 1) / kChainChunkTiles;
  }
  KVLAPSE_DEVICE static uint32_t plane_bytes(const ChainPhase& phase) {
    return static_cast<uint32_t>(phase.columns * 2 + kChainPlanePad);
  }
  KVLAPSE_DEVICE SmemAddress bar(const uint64_t& b) const { return smem_address(&b); }

  KVLAPSE_DEVICE void init_barriers() {
    for (int i = 0; i < args_.n_stages; ++i) {
      mbarrier_init(bar(small_.full[i]), 1);
      mbarrier_init(bar(small_.empty[i]), 1);
    }
    for (int i = 0; i < 2; ++i) {
      mbarrier_init(bar(small_.sums_full[i]), kChainWarps);
      mbarrier_init(bar(small_.sums_empty[i]), 1);
    }
    fence_barrier_init();
  }

  // ---- the copying warp ----
  KVLAPSE_DEVICE void copy() {
    if (lane_ != 0) return;
    const uint64_t policy = evict_first_policy();
    RingCursor ring, landed;
    int n_landed = -kChainCopiesAtOnce;
    KVLAPSE_NO_UNROLL
    for (int p = 0; p < args_.n_phases; ++p) {
      const ChainPhase& phase = args_.phases[p];
      const Groups mine = groups_of(phase);
      const int tiles = tiles_of(phase);
      const uint16_t* from = phase.weights + static_cast<int64_t>(mine.begin) * tiles * kChainTileElements;
      KVLAPSE_NO_UNROLL
      for (int group = mine.begin; group < mine.end; ++group) {
        KVLAPSE_NO_UNROLL
        for (int tile = 0; tile < tiles; tile += kChainChunkTiles) {
          const int n = tiles - tile < kChainChunkTiles ? tiles - tile : kChainChunkTiles;
          if (n_landed++ >= 0) {
            mbarrier_wait(bar(small_.full[landed.stage]), landed.phase);
            landed.advance(1, args_.n_stages);
          }
          mbarrier_wait(bar(small_.empty[ring.stage]), ring.phase ^ 1u);
          mbarrier_arrive_expect(bar(small_.full[ring.stage]), static_cast<uint32_t>(n * kChainTileBytes));
          bulk_load(stage_address(ring.stage), from, static_cast<uint32_t>(n * kChainTileBytes),
                    bar(small_.full[ring.stage]), policy);
          from += n * kChainTileElements;
          ring.advance(1, args_.n_stages);
        }
      }
    }
  }
  KVLAPSE_DEVICE SmemAddress stage_address(int stage) const {
    return ring_ + static_cast<uint32_t>(stage) * kChainStageBytes;
  }

  // ---- the multiplying warps ----
  KVLAPSE_DEVICE void multiply() {
    RingCursor ring;
    int sent = 0;
    KVLAPSE_NO_UNROLL
    for (int p = 0; p < args_.n_phases; ++p) {
      const ChainPhase& phase = args_.phases[p];
      const Groups mine = groups_of(phase);
      if (mine.begin == mine.end) {
        if (p == 0) wait_for_previous_kernel();
        continue;
      }
      // Parts of the input come from other blocks before all warps of this one have done with the last.
      if (p > 0) named_barrier(kChainConsumerBarrier, kChainWarps * 32);
      const bool normed = phase.norm_weight != nullptr;
      if (normed)
        load_normed(p, phase);
      else
        load_rows(p, phase);
      named_barrier(kChainConsumerBarrier, kChainWarps * 32);

      // This lane's column of activations.
      const int column = lane_ / 4, sequence = column / 2;
      const bool has_column = sequence < args_.n_rows && (normed || column % 2 == 0);
      const SmemAddress activations = input_ +
                                      static_cast<uint32_t>(normed ? column : sequence) * plane_bytes(phase) +
                                      static_cast<uint32_t>(lane_ % 4 * 8);
      const int tiles = tiles_of(phase), chunks = chunks_of(phase);
      KVLAPSE_NO_UNROLL
      for (int group = mine.begin; group < mine.end; ++group) {
        float sums[2][4] = {};
        RingCursor at = ring;
        at.advance(warp_, args_.n_stages);
        KVLAPSE_NO_UNROLL
        for (int chunk = warp_; chunk < chunks; chunk += kChainWarps) {
          const int first = chunk * kChainChunkTiles;
          const SmemAddress from = activations + static_cast<uint32_t>(first * 32);
          const SmemAddress weights = stage_address(at.stage) + static_cast<uint32_t>(lane_ * 16);
          // Copies arrive in any order: this stage's turn before ours may still be under way, and a wait by
          // parity would take it for ours finished. It is over once its warp has emptied the stage.
          mbarrier_wait(bar(small_.empty[at.stage]), at.phase ^ 1u);
          mbarrier_wait(bar(small_.full[at.stage]), at.phase);
          if (tiles - first >= kChainChunkTiles) {
            multiply_tiles(weights, from, has_column, sums);
            multiply_tiles(weights + kAhead * kChainTileBytes, from + kAhead * 32, has_column, sums);
          } else {
            KVLAPSE_NO_UNROLL
            for (int i = 0; i < tiles - first; ++i)
              multiply_tile(weights + static_cast<uint32_t>(i * kChainTileBytes),
                            from + static_cast<uint32_t>(i * 32), has_column, sums[0]);
          }
          warp_sync();
          if (lane_ == 0) mbarrier_arrive(bar(small_.empty[at.stage]));
          at.advance(kChainWarps, args_.n_stages);
        }
        ring.advance(chunks, args_.n_stages);
        send(sent++, sums);
      }
    }
  }

  KVLAPSE_DEVICE static void load_weights(uint32_t (&w)[4], SmemAddress at) {
    const Float4 v = smem_load4(at);
    w[0] = float_bits(v.x), w[1] = float_bits(v.y), w[2] = float_bits(v.z), w[3] = float_bits(v.w);
  }
  KVLAPSE_DEVICE static void multiply_tile(SmemAddress weights, SmemAddress activations, bool has_column,
                                           float (&sums)[4]) {
    uint32_t w[4];
    load_weights(w, weights);
    const uint64_t x = has_column ? smem_load_u64(activations) : 0;
    multiply_add_16x8x16<Bf16>(sums, w, static_cast<uint32_t>(x), static_cast<uint32_t>(x >> 32));
  }
  KVLAPSE_DEVICE static void multiply_tiles(SmemAddress weights, SmemAddress activations, bool has_column,
                                            float (&sums)[2][4]) {
    uint32_t w[kAhead][4];
    uint64_t x[kAhead] = {};
    KVLAPSE_UNROLL
    for (int i = 0; i < kAhead; ++i) load_weights(w[i], weights + static_cast<uint32_t>(i * kChainTileBytes));
    if (has_column) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kAhead; ++i) x[i] = smem_load_u64(activations + static_cast<uint32_t>(i * 32));
    }
    KVLAPSE_UNROLL
    for (int i = 0; i < kAhead; ++i)
      multiply_add_16x8x16<Bf16>(sums[i % 2], w[i], static_cast<uint32_t>(x[i]),
                                 static_cast<uint32_t>(x[i] >> 32));
  }

  // This warp's part of a group, to the finishing warp: rows g and g + 8 of sequence t.
  KVLAPSE_DEVICE void send(int turn, const float (&sums)[2][4]) {
    const int buffer = turn & 1;
    mbarrier_wait(bar(small_.sums_empty[buffer]), static_cast<uint32_t>(turn >> 1 & 1) ^ 1u);
    float* to = small_.sums[buffer][warp_][lane_];
    to[0] = (sums[0][0] + sums[1][0]) + (sums[0][1] + sums[1][1]);
    to[1] = (sums[0][2] + sums[1][2]) + (sums[0][3] + sums[1][3]);
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.sums_full[buffer]));
  }

  // ---- a phase's input ----
  // Behind the launch before this one its values are plain; those of this launch come as words
  // (chain_args.h), in pairs that are asked for until all are there.
  static constexpr int kPairs = 8;  // asked for at once by a thread
  static constexpr int kPairStep = kChainWarps * 32;
  // Calls prepare(i, pair), then use(i, pair, values) with i < kPairs known when compiled.
  template <class Prepare, class Use>
  KVLAPSE_DEVICE void take_words(const uint64_t* words, int n_pairs, uint32_t tag, Prepare prepare, Use use) {
    KVLAPSE_NO_UNROLL
    for (int first = thread_index(); first < n_pairs; first += kPairs * kPairStep) {
      const uint64_t* at = words + 2 * static_cast<int64_t>(first);
      TaggedPair found[kPairs];
      uint32_t missing = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < kPairs; ++i)
        if (first + i * kPairStep < n_pairs) {
          missing |= 1u << i;
          prepare(i, first + i * kPairStep);
        }
      do {
        KVLAPSE_UNROLL
        for (int i = 0; i < kPairs; ++i)
          if ((missing >> i & 1) != 0) found[i] = load_tagged(at + 2 * i * kPairStep, tag);
        KVLAPSE_UNROLL
        for (int i = 0; i < kPairs; ++i)
          if ((missing >> i & 1) != 0 && found[i].tags[0] == tag && found[i].tags[1] == tag)
            missing &= ~(1u << i);
      } while (missing != 0);
      KVLAPSE_UNROLL
      for (int i = 0; i < kPairs; ++i)
        if (first + i * kPairStep < n_pairs) use(i, first + i * kPairStep, found[i].values);
    }
  }
  // Columns 2i and 2i + 1 of a row: a lane t of the matrix instruction takes columns 2t, 2t + 1, 2t + 8 and
  // 2t + 9 of a tile at once.
  KVLAPSE_DEVICE static void store_pair(SmemAddress plane, int i, uint32_t pair) {
    smem_store(plane + static_cast<uint32_t>(i / 8 * 32 + i % 4 * 8 + i / 4 % 2 * 4), bits_float(pair));
  }

  // x times the norm's weights, in two parts; 1 / rms is a factor of the product. Its squares go to the
  // finishing warp.
  struct alignas(8) Scale {
    float low, high;
  };
  KVLAPSE_DEVICE void load_normed(int p, const ChainPhase& phase) {
    const int n_pairs = phase.columns / 2;
    const Scale* weights = reinterpret_cast<const Scale*>(phase.norm_weight);
    if (p == 0) wait_for_previous_kernel();
    KVLAPSE_NO_UNROLL
    for (int b = 0; b < args_.n_rows; ++b) {
      const int64_t row = static_cast<int64_t>(b) * phase.columns;
      const SmemAddress high = input_ + static_cast<uint32_t>(2 * b) * plane_bytes(phase),
                        low = high + plane_bytes(phase);
      float squares = 0;
      const auto use = [&](int pair, float v, float w, const Scale& scale) {
        squares += v * v + w * w;
        uint32_t parts[2];
        split(v * scale.low, w * scale.high, parts[0], parts[1]);
        store_pair(high, pair, parts[0]);
        store_pair(low, pair, parts[1]);
      };
      if (p == 0) {
        KVLAPSE_NO_UNROLL
        for (int pair = thread_index(); pair < n_pairs; pair += kPairStep) {
          const uint64_t bits =
              load_shared_by_device(reinterpret_cast<const uint64_t*>(args_.x + row) + pair);
          use(pair, bits_float(static_cast<uint32_t>(bits)), bits_float(static_cast<uint32_t>(bits >> 32)),
              weights[pair]);
        }
      } else {
        Scale scale[kPairs];
        take_words(
            args_.x_words + row, n_pairs, tag_of(p - 1), [&](int i, int pair) { scale[i] = weights[pair]; },
            [&](int i, int pair, const uint32_t(&v)[2]) {
              use(pair, bits_float(v[0]), bits_float(v[1]), scale[i]);
            });
      }
      KVLAPSE_UNROLL
      for (int mask = 16; mask > 0; mask >>= 1) squares += shuffle_xor(squares, mask);
      if (lane_ == 0) small_.squares[b][warp_] = squares;
    }
  }
  // Each as the sum of two bf16 values.
  KVLAPSE_DEVICE static void split(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack2<Bf16>(a, b);
    float high_a, high_b;
    unpack2<Bf16>(high, high_a, high_b);
    low = pack2<Bf16>(a - high_a, b - high_b);
  }

  KVLAPSE_DEVICE void load_rows(int p, const ChainPhase& phase) {
    if (p == 0) wait_for_previous_kernel();
    KVLAPSE_NO_UNROLL
    for (int b = 0; b < args_.n_rows; ++b) {
      const int64_t row = static_cast<int64_t>(b) * phase.columns;
      const SmemAddress plane = input_ + static_cast<uint32_t>(b) * plane_bytes(phase);
      if (p == 0) {
        constexpr int kAtOnce = 4;
        const uint64_t* from = reinterpret_cast<const uint64_t*>(phase.input + row);
        KVLAPSE_NO_UNROLL
        for (int first = thread_index(); first < phase.columns / 4; first += kAtOnce * kPairStep) {
          uint64_t bits[kAtOnce];
          KVLAPSE_UNROLL
          for (int i = 0; i < kAtOnce; ++i)
            if (first + i * kPairStep < phase.columns / 4)
              bits[i] = load_shared_by_device(from + first + i * kPairStep);
          KVLAPSE_UNROLL
          for (int i = 0; i < kAtOnce; ++i) {
            const int four = first + i * kPairStep;
            if (four >= phase.columns / 4) continue;
            store_pair(plane, 2 * four, static_cast<uint32_t>(bits[i]));
            store_pair(plane, 2 * four + 1, static_cast<uint32_t>(bits[i] >> 32));
          }
        }
      } else {
        take_words(
            args_.act_words + row / 2, phase.columns / 4, tag_of(p - 1), [](int, int) {},
            [&](int, int four, const uint32_t(&v)[2]) {
              store_pair(plane, 2 * four, v[0]);
              store_pair(plane, 2 * four + 1, v[1]);
            });
      }
    }
  }
  KVLAPSE_DEVICE uint32_t tag_of(int p) const {
    return static_cast<uint32_t>(args_.number * kChainMostPhases + p);
  }

  // ---- the finishing warp ----
  KVLAPSE_DEVICE void finish() {
    wait_for_previous_kernel();
    int received = 0;
    KVLAPSE_NO_UNROLL
    for (int p = 0; p < args_.n_phases; ++p) {
      const ChainPhase& phase = args_.phases[p];
      const Groups mine = groups_of(phase);
      float factor = 1;
      uint64_t best = 0;
      KVLAPSE_NO_UNROLL
      for (int group = mine.begin; group < mine.end; ++group) {
        Residual residual;
        if (phase.output == ChainOutput::residual) residual = read_residual(phase, group);
        float sums[2];
        receive(received++, sums);
        if (group == mine.begin && phase.norm_weight != nullptr) factor = norm_factor(phase);
        sums[0] *= factor, sums[1] *= factor;
        write(phase, group, sums, residual, tag_of(p), best);
      }
      if (phase.output == ChainOutput::logits) write_best(best);
    }
  }
  // Rows g and g + 8 of a group, sequence t.
  struct Residual {
    float old[2] = {};
  };
  KVLAPSE_DEVICE int sequence() const { return lane_ % 4; }
  KVLAPSE_DEVICE int row_of(int group, int i) const { return group * kChainTileRows + lane_ / 4 + 8 * i; }
  KVLAPSE_DEVICE bool writes(const ChainPhase& phase, int row) const {
    return sequence() < args_.n_rows && row < phase.n_outputs;
  }
  KVLAPSE_DEVICE int64_t output_index(const ChainPhase& phase, int row) const {
    return static_cast<int64_t>(sequence()) * phase.n_outputs + row;
  }

  KVLAPSE_DEVICE Residual read_residual(const ChainPhase& phase, int group) const {
    Residual r;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i)
      if (writes(phase, row_of(group, i)))
        r.old[i] = load_shared_by_device(args_.x + output_index(phase, row_of(group, i)));
    return r;
  }
  KVLAPSE_DEVICE void receive(int turn, float (&sums)[2]) {
    const int buffer = turn & 1;
    mbarrier_wait(bar(small_.sums_full[buffer]), static_cast<uint32_t>(turn >> 1 & 1));
    sums[0] = sums[1] = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kChainWarps; ++w) {
      sums[0] += small_.sums[buffer][w][lane_][0];
      sums[1] += small_.sums[buffer][w][lane_][1];
    }
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.sums_empty[buffer]));
  }
  KVLAPSE_DEVICE float norm_factor(const ChainPhase& phase) const {
    if (sequence() >= args_.n_rows) return 0;
    float squares = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kChainWarps; ++w) squares += small_.squares[sequence()][w];
    return inverse_square_root(squares / static_cast<float>(phase.columns) + args_.eps);
  }

  KVLAPSE_DEVICE void write(const ChainPhase& phase, int group, const float (&sums)[2],
                            const Residual& residual, uint32_t tag, uint64_t& best) {
    if (phase.output == ChainOutput::gated) {
      const int row = group * 8 + lane_ / 4;
      const float value = sums[0] / (1.0f + exponential(-sums[0])) * sums[1];
      const float next = shuffle_xor(value, 4);  // of row ^ 1
      if (row % 2 == 0 && writes(phase, row))
        store_tagged(args_.act_words + output_index(phase, row) / 2, pack2<Bf16>(value, next), tag);
      return;
    }
    float* out = phase.output == ChainOutput::residual ? args_.x
                 : phase.output == ChainOutput::heads  ? args_.qkv
                                                       : args_.logits;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const int row = row_of(group, i);
      if (!writes(phase, row)) continue;
      const float value = residual.old[i] + sums[i];
      if (phase.output == ChainOutput::residual)
        store_tagged(args_.x_words + output_index(phase, row), float_bits(value), tag);
      out[output_index(phase, row)] = value;
      if (phase.output != ChainOutput::logits) continue;
      const uint64_t key = logit_key(float_bits(sums[i]), static_cast<uint32_t>(row));
      best = key > best ? key : best;
    }
    if (phase.output == ChainOutput::heads) arrive_at_head(phase, group);
  }
  KVLAPSE_DEVICE void write_best(uint64_t best) {
    KVLAPSE_UNROLL
    for (int mask = 4; mask < 32; mask <<= 1) {
      const uint64_t other = shuffle_xor(best, mask);
      best = other > best ? other : best;
    }
    if (lane_ < args_.n_rows && best > 0) global_max(args_.best + lane_, best);
  }

  // The last of a head's groups, in whatever block it is, finishes the head.
  KVLAPSE_DEVICE void arrive_at_head(const ChainPhase& phase, int group) {
    const int head = group * kChainTileRows / args_.head_dim;
    const auto last = static_cast<uint32_t>(args_.head_dim / kChainTileRows - 1);
    warp_sync();
    uint32_t before = 0;
    if (lane_ == 0) before = count_arrival(args_.head_arrivals + head, last);
    if (shuffle_from(before, 0) != last) return;
    KVLAPSE_NO_UNROLL
    for (int b = 0; b < args_.n_rows; ++b) finish_head(phase, head, b);
  }
  static constexpr int kHeadPairs = 4;  // of a lane: head_dim up to 256
  KVLAPSE_DEVICE void finish_head(const ChainPhase& phase, int head, int b) {
    const int dim = args_.head_dim, half = dim / 2;
    const bool is_q = head < args_.n_q_heads, is_v = head >= args_.n_q_heads + args_.n_kv_heads;
    const float* from = args_.qkv + static_cast<int64_t>(b) * phase.n_outputs + head * dim;
    const float* bias = args_.bias != nullptr ? args_.bias + head * dim : nullptr;
    const float* norm = is_q ? args_.q_norm : is_v ? nullptr : args_.k_norm;
    const float* rope = args_.rope + static_cast<int64_t>(args_.pos[b]) * dim;
    const int n_heads = is_q ? args_.n_q_heads : args_.n_kv_heads;
    const int first = is_q ? 0 : is_v ? args_.n_q_heads + args_.n_kv_heads : args_.n_q_heads;
    uint16_t* to = (is_q   ? args_.q
                    : is_v ? args_.v
                           : args_.k) +
                   (static_cast<int64_t>(b) * n_heads + head - first) * dim;
    float low[kHeadPairs], high[kHeadPairs], squares = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kHeadPairs; ++i) {
      const int d = lane_ + 32 * i;
      low[i] = d < half ? load_shared_by_device(from + d) : 0;
      high[i] = d < half ? load_shared_by_device(from + d + half) : 0;
      if (bias != nullptr && d < half) low[i] += bias[d], high[i] += bias[d + half];
      squares += low[i] * low[i] + high[i] * high[i];
    }
    KVLAPSE_UNROLL
    for (int mask = 16; mask > 0; mask >>= 1) squares += shuffle_xor(squares, mask);
    const float factor =
        norm != nullptr ? inverse_square_root(squares / static_cast<float>(dim) + args_.eps) : 1.0f;
    KVLAPSE_UNROLL
    for (int i = 0; i < kHeadPairs; ++i) {
      const int d = lane_ + 32 * i;
      if (d >= half) continue;
      float x = low[i], y = high[i];
      if (norm != nullptr) x *= factor * norm[d], y *= factor * norm[d + half];
      const float c = is_v ? 1.0f : rope[d], s = is_v ? 0.0f : rope[half + d];
      const uint32_t pair = pack2<Bf16>(x * c - y * s, y * c + x * s);
      to[d] = static_cast<uint16_t>(pair & 0xffffu);
      to[d + half] = static_cast<uint16_t>(pair >> 16);
    }
  }

  const ChainArgs& args_;
  ChainSmall& small_;
  const SmemAddress ring_, input_;
  const int warp_, lane_;
};

}  // namespace kvlapse::device
