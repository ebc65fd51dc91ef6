// The product of a few sequences on the device (contract: kernels/decode/product_args.h). Written in the
// operations of device_ops.cuh only; include that (or the emulator) first.
//
// One warp copies weights through a ring in shared memory; weights are constants, so it begins before the
// kernel in front has ended. Eight warps multiply: weights as the 16 x 16 operand of the matrix instruction,
// sequences as its columns, in chunks that all warps share. Their sums, and those of the other block of a
// cluster, are added in fixed order. One warp adds the squares that the input's norm needs.
#pragma once

#include "kernels/cuda/ring_cursor.cuh"
#include "kernels/decode/product_args.h"

namespace kvlapse::device {

inline constexpr int kProductConsumerBarrier = 1;

// kGroups, kSets: ProductDivision. kBlocks: product_blocks.
template <int kGroups, int kSets, int kBlocks>
class Product {
 public:
  KVLAPSE_DEVICE Product(const ProductArgs& args, unsigned char* shared)
      : args_(args),
        small_(*reinterpret_cast<ProductSmall*>(shared + args.small_offset)),
        warp_(thread_index() / 32),
        lane_(thread_index() % 32),
        shift_(args.cluster - 1),
        rank_(block_index() & shift_),
        first_step_(step_of(rank_)),
        n_steps_(step_of(rank_ + 1) - first_step_),
        shared_(smem_address(shared)) {}

  KVLAPSE_DEVICE void run() {
    if (warp_ == 0) init_barriers();
    block_sync();
    if (args_.cluster > 1) cluster_arrive();
    allow_next_kernel();
    if (warp_ == kProductWarps)
      copy();
    else if (warp_ > kProductWarps)
      add_squares();
    else
      multiply();
    if (args_.cluster > 1 && warp_ >= kProductWarps) cluster_wait();
  }

 private:
  static constexpr int kSlabGroups = kGroups * kSets;
  static constexpr int kParts = kProductWarps / kSets;  // of a chunk's steps
  static constexpr uint32_t kStageBytes = kSlabGroups * kProductGroupBytes;
  static constexpr int kPairs = kProductStepColumns / 32;  // of tiles, in a step
  static_assert(kProductChunkSteps % kParts == 0 && kSets % 2 == 0 && kProductWarps % kBlocks == 0);
  using Sums = float[kGroups][kBlocks][4];

  KVLAPSE_DEVICE int all_steps() const {
    return static_cast<int>(static_cast<uint32_t>(args_.columns) / kProductStepColumns);
  }
  // The first step of a block of the cluster.
  KVLAPSE_DEVICE int step_of(int rank) const { return all_steps() * rank >> shift_; }
  KVLAPSE_DEVICE int part() const { return warp_ % kParts; }
  KVLAPSE_DEVICE int set() const { return warp_ / kParts; }
  KVLAPSE_DEVICE int n_chunks() const { return (n_steps_ + kProductChunkSteps - 1) / kProductChunkSteps; }
  KVLAPSE_DEVICE int first_slab() const { return block_index() >> shift_; }
  KVLAPSE_DEVICE int next_slab(int slab) const { return slab + (block_count() >> shift_); }
  KVLAPSE_DEVICE SmemAddress bar(const uint64_t& b) const { return smem_address(&b); }
  KVLAPSE_DEVICE SmemAddress stage_address(int stage) const {
    return shared_ + static_cast<uint32_t>(stage) * kStageBytes;
  }

  // A lane a stage and a chunk.
  KVLAPSE_DEVICE void init_barriers() {
    static_assert(kProductMostStages <= 32 && kProductMostChunks <= 32);
    if (lane_ < args_.n_stages) {
      mbarrier_init(bar(small_.full[lane_]), 1);
      mbarrier_init(bar(small_.empty[lane_]), kSets);
    }
    if (lane_ < args_.n_chunks) {
      mbarrier_init(bar(small_.input_full[lane_]), kProductWarps * 32);
      mbarrier_init(bar(small_.input_empty[lane_]), kProductWarps);
    }
    if (lane_ == 0) {
      mbarrier_init(bar(small_.factors_full), 1);
      mbarrier_init(bar(small_.sums_full), 1);
    }
    fence_barrier_init();
    // From the other block: what its warps have summed of half of the sets.
    if (lane_ == 0 && args_.cluster > 1)
      mbarrier_arrive_expect(bar(small_.sums_full), kProductWarps / 2 * kGroups * kBlocks * 512);
  }

  // ---- weights ----
  KVLAPSE_DEVICE void copy() {
    if (lane_ != 0) return;
    const uint64_t policy = evict_first_policy();
    constexpr int64_t step_elements = kStageBytes / 2;
    RingCursor ring, landed;
    int n_landed = -args_.copies_at_once;
    KVLAPSE_NO_UNROLL
    for (int slab = first_slab(); slab < args_.n_slabs; slab = next_slab(slab)) {
      const uint16_t* from =
          args_.weights + (static_cast<int64_t>(slab) * all_steps() + first_step_) * step_elements;
      KVLAPSE_NO_UNROLL
      for (int step = 0; step < n_steps_; ++step, from += step_elements) {
        if (n_landed++ >= 0) {
          mbarrier_wait(bar(small_.full[landed.stage]), landed.phase);
          landed.step(1, args_.n_stages);
        }
        const SmemAddress full = bar(small_.full[ring.stage]);
        mbarrier_wait(bar(small_.empty[ring.stage]), ring.phase ^ 1u);
        mbarrier_arrive_expect(full, kStageBytes);
        bulk_load(stage_address(ring.stage), from, kStageBytes, full, policy);
        ring.step(1, args_.n_stages);
      }
    }
  }

  // ---- the input's norm ----
  KVLAPSE_DEVICE void add_squares() {
    if (args_.squares == nullptr) return;
    wait_for_previous_kernel();
    // Eight lanes a block's sums, four sequences each.
    constexpr int kLoads = 16;
    const int first = lane_ / 8;
    const float* from = args_.squares + first * kProductMostRows + lane_ % 8 * 4;
    Float4 sum{0, 0, 0, 0};
    KVLAPSE_NO_UNROLL
    for (int i = first; i < args_.n_squares; i += 4 * kLoads, from += 4 * kLoads * kProductMostRows) {
      Float4 part[kLoads];
      KVLAPSE_UNROLL
      for (int k = 0; k < kLoads; ++k)
        part[k] =
            i + 4 * k < args_.n_squares
                ? load_shared_by_device(reinterpret_cast<const Float4*>(from + 4 * k * kProductMostRows))
                : Float4{0, 0, 0, 0};
      KVLAPSE_UNROLL
      for (int k = 0; k < kLoads; ++k) add(sum, part[k]);
    }
    float own = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      float v = i == 0 ? sum.x : i == 1 ? sum.y : i == 2 ? sum.z : sum.w;
      v += shuffle_xor(v, 8);
      v += shuffle_xor(v, 16);
      if (i == first) own = v;  // of sequence lane % 8 * 4 + first
    }
    small_.factors[lane_ % 8 * 4 + first] =
        inverse_square_root(own / static_cast<float>(args_.columns) + args_.eps);
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.factors_full));
  }

  KVLAPSE_DEVICE static void add(Float4& a, const Float4& b) {
    a.x += b.x, a.y += b.y, a.z += b.z, a.w += b.w;
  }

  // ---- activations ----
  // Chunks of all slabs in turn, by all warps that multiply: the copy engine takes a row's part of a chunk at
  // a time, which is too short for it.
  KVLAPSE_DEVICE SmemAddress input_address(int buffer) const {
    return shared_ + static_cast<uint32_t>(args_.input_offset + buffer * kBlocks * 8 * kProductInputStride);
  }
  KVLAPSE_DEVICE void copy_input(int chunk, int buffer) const {
    static_assert(kProductChunkSteps * kProductStepColumns == 32 * 8);  // of a row: 16 bytes a lane
    const int first = chunk * kProductChunkSteps;
    if (lane_ < (n_steps_ - first) * (kProductStepColumns / 8)) {
      const uint16_t* from = args_.input + (first_step_ + first) * kProductStepColumns + lane_ * 8;
      const SmemAddress to = input_address(buffer) + static_cast<uint32_t>(lane_ * 16);
      KVLAPSE_UNROLL
      for (int k = 0; k < kBlocks; ++k) {
        const int b = k * 8 + warp_;
        if (b < args_.n_rows)
          copy_async16(to + static_cast<uint32_t>(b * kProductInputStride),
                       from + static_cast<int64_t>(b) * args_.columns, true);
      }
    }
    copy_async_arrive(bar(small_.input_full[buffer]));
  }

  // ---- the multiplying warps ----
  KVLAPSE_DEVICE void multiply() {
    wait_for_previous_kernel();
    float squares[2] = {};
    KVLAPSE_NO_UNROLL
    for (int slab = first_slab(); slab < args_.n_slabs; slab = next_slab(slab)) {
      start_input();
      if (args_.cluster > 1) cluster_wait();  // the other block's barriers are there
      Sums sums = {};
      multiply_slab(sums);
      Old old = read_old(slab, first_group());    // on its way while sums are handed over
      if (slab != first_slab()) consumer_sync();  // the last slab's sums are read
      hand_over(sums);
      write(slab, old, squares);
    }
    if (args_.scaled != nullptr) write_squares(squares);
  }
  KVLAPSE_DEVICE void consumer_sync() { named_barrier(kProductConsumerBarrier, kProductWarps * 32); }

  // The slab's first chunks, as many as there is room for beside the one that is multiplied.
  KVLAPSE_DEVICE int chunks_ahead() const {
    return args_.n_chunks - 1 < n_chunks() ? args_.n_chunks - 1 : n_chunks();
  }
  KVLAPSE_DEVICE void start_input() const {
    RingCursor to = input_;
    KVLAPSE_NO_UNROLL
    for (int chunk = 0; chunk < chunks_ahead(); ++chunk) {
      copy_input(chunk, to.stage);
      to.step(1, args_.n_chunks);
    }
  }
  KVLAPSE_DEVICE void multiply_slab(Sums& sums) {
    const int ahead = chunks_ahead();
    RingCursor next = input_;  // where chunk + ahead goes
    next.step(ahead, args_.n_chunks);
    KVLAPSE_NO_UNROLL
    for (int chunk = 0; chunk < n_chunks(); ++chunk) {
      multiply_chunk(chunk, sums);
      if (chunk + ahead < n_chunks()) {
        mbarrier_wait(bar(small_.input_empty[next.stage]), next.phase ^ 1u);  // the chunk before this one
        copy_input(chunk + ahead, next.stage);
      }
      next.step(1, args_.n_chunks);
    }
  }
  KVLAPSE_DEVICE void multiply_chunk(int chunk, Sums& sums) {
    const int first = chunk * kProductChunkSteps;
    mbarrier_wait(bar(small_.input_full[input_.stage]), input_.phase);
    RingCursor at = ring_;
    at.step(part(), args_.n_stages);
    KVLAPSE_UNROLL
    for (int i = 0; i < kProductChunkSteps; i += kParts) {
      if (first + i + part() >= n_steps_) break;
      multiply_step(i + part(), at, sums);
      at.step(kParts, args_.n_stages);
    }
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.input_empty[input_.stage]));
    input_.step(1, args_.n_chunks);
    ring_.step(n_steps_ - first < kProductChunkSteps ? n_steps_ - first : kProductChunkSteps, args_.n_stages);
  }

  // A step of a chunk.
  KVLAPSE_DEVICE void multiply_step(int step, const RingCursor& at, Sums& sums) const {
    const SmemAddress input =
        input_address(input_.stage) + static_cast<uint32_t>(lane_ / 4 * kProductInputStride +
                                                            step * kProductStepColumns * 2 + lane_ % 4 * 16);
    Float4 x[kPairs][kBlocks];  // eight columns of a sequence each
    KVLAPSE_UNROLL
    for (int p = 0; p < kPairs; ++p) {
      KVLAPSE_UNROLL
      for (int k = 0; k < kBlocks; ++k)
        x[p][k] = smem_load4(input + static_cast<uint32_t>(k * 8 * kProductInputStride + p * 64));
    }
    // The stage's turn before ours may still be under way, and a wait by parity would take its end for ours.
    mbarrier_wait(bar(small_.empty[at.stage]), at.phase ^ 1u);
    mbarrier_wait(bar(small_.full[at.stage]), at.phase);
    const SmemAddress weights =
        stage_address(at.stage) + static_cast<uint32_t>(set() * kGroups * kProductGroupBytes + lane_ * 16);
    KVLAPSE_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      uint32_t w[kProductStepTiles][4];
      KVLAPSE_UNROLL
      for (int i = 0; i < kProductStepTiles; ++i) {
        const Float4 v =
            smem_load4(weights + static_cast<uint32_t>(j * kProductGroupBytes + i * kChainTileBytes));
        w[i][0] = float_bits(v.x), w[i][1] = float_bits(v.y), w[i][2] = float_bits(v.z),
        w[i][3] = float_bits(v.w);
      }
      KVLAPSE_UNROLL
      for (int p = 0; p < kPairs; ++p) {
        KVLAPSE_UNROLL
        for (int k = 0; k < kBlocks; ++k) {
          const Float4& v = x[p][k];
          multiply_add_16x8x16<Bf16>(sums[j][k], w[2 * p], float_bits(v.x), float_bits(v.y));
          multiply_add_16x8x16<Bf16>(sums[j][k], w[2 * p + 1], float_bits(v.z), float_bits(v.w));
        }
      }
    }
    warp_sync();
    if (lane_ == 0) mbarrier_arrive(bar(small_.empty[at.stage]));
  }

  // ---- sums ----
  // Of the groups that this block writes, in the order in which they are added: by block of the cluster, then
  // by part. A lane has rows g and g + 8 of a group, sequences 8k + 2t and the next.
  KVLAPSE_DEVICE int own_groups() const { return kSlabGroups >> shift_; }
  KVLAPSE_DEVICE SmemAddress sums_address(int source, int part, int group, int block) const {
    const int at = ((source * kParts + part) * own_groups() + group) * kBlocks + block;
    return shared_ + static_cast<uint32_t>(args_.sums_offset + (at * 32 + lane_) * 16);
  }
  KVLAPSE_DEVICE void hand_over(const Sums& sums) {
    const int owner = set() * args_.cluster / kSets, first = set() * kGroups - owner * own_groups();
    KVLAPSE_UNROLL
    for (int j = 0; j < kGroups; ++j) {
      KVLAPSE_UNROLL
      for (int k = 0; k < kBlocks; ++k) {
        const SmemAddress to = sums_address(rank_, part(), first + j, k);
        const Float4 v{sums[j][k][0], sums[j][k][1], sums[j][k][2], sums[j][k][3]};
        if (owner == rank_)
          smem_store4(to, v);
        else
          remote_store4(remote_address(to, owner), v, remote_address(bar(small_.sums_full), owner));
      }
    }
    consumer_sync();
    if (args_.cluster > 1) mbarrier_wait(bar(small_.sums_full), 0);
    if (args_.squares != nullptr) mbarrier_wait(bar(small_.factors_full), 0);
  }
  KVLAPSE_DEVICE Float4 total(int group, int block) const {
    Float4 sum{0, 0, 0, 0};
    KVLAPSE_NO_UNROLL
    for (int source = 0; source < args_.cluster; ++source) {
      Float4 parts[kParts];
      KVLAPSE_UNROLL
      for (int part = 0; part < kParts; ++part)
        parts[part] = smem_load4(sums_address(source, part, group, block));
      KVLAPSE_UNROLL
      for (int part = 0; part < kParts; ++part) add(sum, parts[part]);
    }
    return sum;
  }

  // ---- outputs ----
  KVLAPSE_DEVICE int own_block() const { return warp_ % kBlocks; }  // of sequences, that this warp writes
  KVLAPSE_DEVICE int sequence() const { return own_block() * 8 + lane_ % 4 * 2; }  // and the next
  KVLAPSE_DEVICE int first_group() const { return warp_ / kBlocks; }
  KVLAPSE_DEVICE int rank_of(int slab, int group) const {
    return slab * kSlabGroups + rank_ * own_groups() + group;
  }
  KVLAPSE_DEVICE int row_of(int slab, int group) const {
    return rank_of(slab, group) * kChainTileRows + lane_ / 4;
  }
  KVLAPSE_DEVICE int64_t output_index(int row) const {
    return static_cast<int64_t>(sequence()) * args_.n_outputs + row;
  }
  // What a lane's outputs of a group meet. Values i are of row g + i / 2 * 8, sequence() + i % 2.
  struct Old {
    float values[4];   // that they are added to
    float weights[2];  // of the next norm
  };
  KVLAPSE_DEVICE Old read_old(int slab, int group) const {
    Old old{};
    if (!args_.add || group >= own_groups()) return old;
    const int row = row_of(slab, group);
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i)
      if (writes(row, i)) old.values[i] = load_shared_by_device(args_.out + output_index(row) + place(i));
    if (args_.scaled == nullptr) return old;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i)
      if (row + i * 8 < args_.n_outputs) old.weights[i] = args_.next_norm[row + i * 8];
    return old;
  }
  KVLAPSE_DEVICE void write(int slab, Old& old, float (&squares)[2]) {
    float factors[2] = {1, 1};
    if (args_.squares != nullptr)
      factors[0] = small_.factors[sequence()], factors[1] = small_.factors[sequence() + 1];
    KVLAPSE_NO_UNROLL
    for (int group = first_group(); group < own_groups(); group += kProductWarps / kBlocks) {
      const Float4 v = total(group, own_block());
      const float values[4] = {v.x * factors[0], v.y * factors[1], v.z * factors[0], v.w * factors[1]};
      if (args_.gated != nullptr)
        write_gated(rank_of(slab, group) * 8 + lane_ / 4, values);
      else
        write_sums(row_of(slab, group), values, old, squares);
      old = read_old(slab, group + kProductWarps / kBlocks);
    }
  }
  KVLAPSE_DEVICE void write_sums(int row, const float (&values)[4], const Old& old, float (&squares)[2]) {
    const int64_t at = output_index(row);
    float now[4];
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      now[i] = old.values[i] + values[i];
      if (writes(row, i)) args_.out[at + place(i)] = now[i];
    }
    if (args_.scaled == nullptr) return;
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool there = writes(row, i);
      if (there) squares[i % 2] += now[i] * now[i];
      const float scaled = now[i] * old.weights[i / 2], next = shuffle_xor(scaled, 4);  // of row ^ 1
      if (there && row % 2 == 0) store_bits(args_.scaled + at + place(i), pack2<Bf16>(scaled, next));
    }
  }
  KVLAPSE_DEVICE int64_t place(int i) const {
    return static_cast<int64_t>(i % 2) * args_.n_outputs + i / 2 * 8;
  }
  KVLAPSE_DEVICE bool writes(int row, int i) const {
    return row + i / 2 * 8 < args_.n_outputs && sequence() + i % 2 < args_.n_rows;
  }
  KVLAPSE_DEVICE void write_gated(int row, const float (&v)[4]) {
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float value = v[i] * reciprocal_approximate(1.0f + exponential(-v[i])) * v[i + 2];
      const float next = shuffle_xor(value, 4);  // of row ^ 1
      if (row % 2 == 0 && row < args_.n_outputs && sequence() + i < args_.n_rows)
        store_bits(args_.gated + static_cast<int64_t>(sequence() + i) * args_.n_outputs + row,
                   pack2<Bf16>(value, next));
    }
  }
  KVLAPSE_DEVICE void write_squares(float (&squares)[2]) {
    KVLAPSE_UNROLL
    for (int mask = 4; mask < 32; mask <<= 1) {
      squares[0] += shuffle_xor(squares[0], mask);
      squares[1] += shuffle_xor(squares[1], mask);
    }
    if (lane_ < 4)
      small_.squares[warp_][lane_ * 2] = squares[0], small_.squares[warp_][lane_ * 2 + 1] = squares[1];
    consumer_sync();
    const int b = thread_index();
    if (b >= kBlocks * 8) return;
    float sum = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kProductWarps; w += kBlocks) sum += small_.squares[b / 8 + w][b % 8];
    args_.next_squares[block_index() * kProductMostRows + b] = sum;
  }

  const ProductArgs& args_;
  ProductSmall& small_;
  const int warp_, lane_;
  const int shift_;                        // log2 of the cluster
  const int rank_, first_step_, n_steps_;  // of the cluster; of this block
  const SmemAddress shared_;
  RingCursor ring_, input_;  // of a chunk's first step, and of the chunk
};

// Calls run<groups, sets, blocks>() of the kernel that a plan has.
template <int kBlocks, class Run>
void with_product_division(int slab_groups, Run run) {
  switch (slab_groups) {
    case 2: return run.template operator()<1, 2, kBlocks>();
    case 4: return run.template operator()<2, 2, kBlocks>();
    case 6: return run.template operator()<3, 2, kBlocks>();
    case 8: return run.template operator()<2, 4, kBlocks>();
    default: return run.template operator()<3, 4, kBlocks>();
  }
}
template <class Run>
void with_product(const ProductArgs& args, Run run) {
  switch (product_blocks(args.n_rows)) {
    case 1: return with_product_division<1>(args.slab_groups, run);
    case 2: return with_product_division<2>(args.slab_groups, run);
    default: return with_product_division<4>(args.slab_groups, run);
  }
}

}  // namespace kvlapse::device
