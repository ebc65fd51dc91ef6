// An R-KV compaction (contract: kernels/decode/rkv_args.h) in one kernel, written in the operations of
// device_ops.cuh and rkv_ops.cuh only, so that the CPU emulator of the tests compiles the same text; include
// those (or the emulator) first. A cluster of blocks, or one, has a head:
//   measure: K once, in the order of slots, 16 rows a warp, from device memory straight into the registers
//   that multiply them: norms, sum of unit keys, the window's softmax, and whether a row is like one of the
//   last keys.
//   search: rows that found no such key, packed anew, meet the other keys from the end, as many at once as
//   shared memory holds.
//   weigh: K again, last rows first (they are still in registers): importance and projections on the sum.
//   select (the first block of the head): pool, softmax, scores, order, moves.
#pragma once

#include <type_traits>

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

// 16 rows of a warp in registers. Lane (g, t) = (lane / 4, lane % 4) has chunks of 16 bytes 4 j + t of rows
// 8 i + g. As the columns of a product they are operands of mma as they lie in registers and memory: a
// product sums over components in any order that both sides agree on. What they are multiplied with lies in
// shared memory in groups of 16 rows, in the order in which lanes take it.
template <int kHeadDim, class Element>
class RkvFragments {
 public:
  static constexpr int kElementBytes = RkvElement<Element>::kBytes;
  static constexpr int kRowBytes = kHeadDim * kElementBytes;
  static constexpr int kRowChunks = kRowBytes / 16;
  static constexpr int kLaneChunks = kRowChunks / 4;
  static constexpr int kValues = 16 / kElementBytes;  // of a chunk
  static constexpr int kGroupBytes = 16 * kRowBytes;
  static constexpr int kBytes = kRkvTileRows * kRowBytes;
  static constexpr int kRows = kRkvTileRows / 8;  // of a lane
  static_assert(kRows == 2);

  // row(i): row 8 i + g in chunks; read(p): *p.
  template <class Row, class Read>
  KVLAPSE_DEVICE void load(int lane, Row row, Read read) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const Float4* const from = row(i) + lane % 4;
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) chunks_[i][j] = read(from + 4 * j);
    }
  }
  // Into kBytes of shared memory and back, by the same lane.
  KVLAPSE_DEVICE void save(SmemAddress to, int lane) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRows * kLaneChunks; ++i)
      smem_store4(to + static_cast<uint32_t>((i * 32 + lane) * 16),
                  chunks_[i / kLaneChunks][i % kLaneChunks]);
  }
  KVLAPSE_DEVICE void restore(SmemAddress from, int lane) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRows * kLaneChunks; ++i)
      chunks_[i / kLaneChunks][i % kLaneChunks] =
          smem_load4(from + static_cast<uint32_t>((i * 32 + lane) * 16));
  }

  KVLAPSE_DEVICE static void values_of(const Float4& chunk, float (&v)[kValues]) {
    const float words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
    KVLAPSE_UNROLL
    for (int i = 0; i < 4; ++i) {
      if constexpr (kElementBytes == 4)
        v[i] = words[i];
      else
        unpack2<Element>(float_bits(words[i]), v[2 * i], v[2 * i + 1]);
    }
  }

  // A chunk of row `row` of the groups at `to`.
  KVLAPSE_DEVICE static void store_operand(SmemAddress to, int row, int chunk, const Float4& v) {
    if constexpr (kElementBytes == 4) {
      smem_store4(to + static_cast<uint32_t>(row * kRowBytes + chunk * 16), v);
    } else {
      const SmemAddress first = operand_word(to, row, chunk, 0);
      smem_store(first, v.x), smem_store(first + 8, v.y);
      smem_store(first + 512, v.z), smem_store(first + 520, v.w);
    }
  }
  // Component d of a vector, by the lanes of a warp in a row. Three parts add up to it; a chunk times a chunk
  // is one product of words 0 and 2, as the upper rows, with columns 0 to 2, and of 1 and 3 with columns 4
  // to 6.
  static constexpr int kParts = kElementBytes == 4 ? 1 : 3;
  KVLAPSE_DEVICE static void store_vector(SmemAddress to, int d, float value) {
    if constexpr (kElementBytes == 4) {
      smem_store(to + static_cast<uint32_t>(d * 4), value);
    } else {
      float rest[2] = {value, shuffle_xor(value, 1)};
      KVLAPSE_UNROLL
      for (int part = 0; part < kParts; ++part) {
        const uint32_t packed = pack2<Element>(rest[0], rest[1]);
        float low, high;
        unpack2<Element>(packed, low, high);
        rest[0] -= low, rest[1] -= high;
        const int chunk = d / 8, word = d / 2 % 4, column = word % 2 * 4 + part;
        if (d % 2 == 0)
          smem_store(
              to + static_cast<uint32_t>(chunk / 4 * 256 + (column * 4 + chunk % 4) * 8 + word / 2 * 4),
              bits_float(packed));
      }
    }
  }
  // Row 8 t + g times such a vector, in lanes t < kRows.
  KVLAPSE_DEVICE float dot(SmemAddress vector, int lane) const {
    const int g = lane / 4, t = lane % 4;
    float sum[kRows];
    if constexpr (kElementBytes == 4) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i] = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        const Float4 other = smem_load4(vector + static_cast<uint32_t>((4 * j + t) * 16));
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& own = chunks_[i][j];
          sum[i] += own.x * other.x + own.y * other.y + own.z * other.z + own.w * other.w;
        }
      }
    } else {
      float c[kRows][4];
      KVLAPSE_UNROLL
      for (int i = 0; i < 4 * kRows; ++i) c[i / 4][i % 4] = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        uint64_t other = 0;
        if (g % 4 < kParts) other = smem_load_u64(vector + static_cast<uint32_t>(j * 256 + lane * 8));
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          multiply_add_16x8x16<Element>(c[i],
                                        {float_bits(v.x), float_bits(v.y), float_bits(v.z), float_bits(v.w)},
                                        static_cast<uint32_t>(other), static_cast<uint32_t>(other >> 32));
        }
      }
      KVLAPSE_UNROLL
      for (int i = 0; i < kRows; ++i) sum[i] = t < 2 ? c[i][0] + c[i][1] : c[i][2] + c[i][3];
    }
    quad_sum(sum);
    return own_of(sum, t);
  }

  // c[i] = group x rows 8 i .. 8 i + 7 in the layout of mma's C: lane (g, t) has rows g and g + 8 of the
  // group, columns 2t, + 1.
  KVLAPSE_DEVICE void products(float (&c)[kRows][4], SmemAddress group, int lane) const {
    KVLAPSE_UNROLL
    for (int i = 0; i < 4 * kRows; ++i) c[i / 4][i % 4] = 0;
    if constexpr (kElementBytes == 4) {
      const int g = lane / 4, t = lane % 4;
      KVLAPSE_NO_UNROLL
      for (int half = 0; half < 2; ++half) {
        KVLAPSE_NO_UNROLL
        for (int column = 0; column < 8; ++column) {
          float dot[kRows] = {};
          KVLAPSE_UNROLL
          for (int j = 0; j < kLaneChunks; ++j) {
            const Float4 other =
                smem_load4(group + static_cast<uint32_t>((half * 8 + column) * kRowBytes + (4 * j + t) * 16));
            KVLAPSE_UNROLL
            for (int i = 0; i < kRows; ++i) {
              const Float4& own = chunks_[i][j];
              dot[i] += own.x * other.x + own.y * other.y + own.z * other.z + own.w * other.w;
            }
          }
          quad_sum(dot);
          KVLAPSE_UNROLL
          for (int i = 0; i < kRows; ++i) {
            const float low = shuffle_from(dot[i], 8 * t), high = shuffle_from(dot[i], 8 * t + 4);
            if (g != column) continue;
            c[i][0] = half == 0 ? low : c[i][0], c[i][1] = half == 0 ? high : c[i][1];
            c[i][2] = half == 0 ? c[i][2] : low, c[i][3] = half == 0 ? c[i][3] : high;
          }
        }
      }
    } else {
      const SmemAddress own = group + static_cast<uint32_t>(lane * 16);
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        const Float4 first = smem_load4(own + static_cast<uint32_t>(j * 1024)),
                     second = smem_load4(own + static_cast<uint32_t>(j * 1024 + 512));
        const uint32_t a[4] = {float_bits(first.x), float_bits(first.y), float_bits(first.z),
                               float_bits(first.w)},
                       b[4] = {float_bits(second.x), float_bits(second.y), float_bits(second.z),
                               float_bits(second.w)};
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          multiply_add_16x8x16<Element>(c[i], a, float_bits(v.x), float_bits(v.y));
        }
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          multiply_add_16x8x16<Element>(c[i], b, float_bits(v.z), float_bits(v.w));
        }
      }
    }
  }

  // Of row 8 t + g, in lanes t < kRows.
  KVLAPSE_DEVICE float square(int lane) const {
    const int g = lane / 4, t = lane % 4;
    float square[kRows];
    if constexpr (kElementBytes == 4) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kRows; ++i) square[i] = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          square[i] += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
        }
      }
      quad_sum(square);
    } else {
      // The diagonals of words x words: as the upper and the lower rows of a product two words of a chunk lie
      // where they must.
      float c[kRows][2][4];
      KVLAPSE_UNROLL
      for (int i = 0; i < 8 * kRows; ++i) c[i / 8][i / 4 % 2][i % 4] = 0;
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          multiply_add_16x8x8<Element>(c[i][0], float_bits(v.x), float_bits(v.y), float_bits(v.x));
          multiply_add_16x8x8<Element>(c[i][1], float_bits(v.x), float_bits(v.y), float_bits(v.y));
        }
        KVLAPSE_UNROLL
        for (int i = 0; i < kRows; ++i) {
          const Float4& v = chunks_[i][j];
          multiply_add_16x8x8<Element>(c[i][0], float_bits(v.z), float_bits(v.w), float_bits(v.z));
          multiply_add_16x8x8<Element>(c[i][1], float_bits(v.z), float_bits(v.w), float_bits(v.w));
        }
      }
      KVLAPSE_UNROLL
      for (int i = 0; i < kRows; ++i)
        square[i] =
            shuffle_from(g % 2 == 0 ? c[i][0][0] + c[i][1][2] : c[i][0][1] + c[i][1][3], lane - t + g / 2);
    }
    return own_of(square, t);
  }

  // add(component, sum over rows of value x factor(row)), once a component.
  template <class Factor, class Add>
  KVLAPSE_DEVICE void sum_rows(int lane, Factor factor, Add add) const {
    if constexpr (std::is_same_v<Element, Bf16>)
      multiply_rows(lane, factor, add);
    else
      add_rows(lane, factor, add);
  }

  // Of values for rows 8 i + 2t + e, [2 i + e]: their combination over g, for the row that own_row() is of a
  // lane; two lanes have the same.
  template <class T, class Combine>
  KVLAPSE_DEVICE static T over_groups(T (&v)[2 * kRows], int lane, Combine combine) {
    KVLAPSE_UNROLL
    for (int step = 0; step < 2; ++step) {
      const int mask = 16 >> step, n = kRows >> step;
      const bool upper = (lane & mask) != 0;
      KVLAPSE_UNROLL
      for (int e = 0; e < n; ++e) {
        const T sent = upper ? v[e] : v[e + n], kept = upper ? v[e + n] : v[e];
        v[e] = combine(kept, shuffle_xor(sent, mask));
      }
    }
    return combine(v[0], shuffle_xor(v[0], 4));
  }
  KVLAPSE_DEVICE static int own_row(int lane) { return lane / 16 * 8 + lane % 4 * 2 + lane / 8 % 2; }
  // Of the lanes with the same row one counts.
  KVLAPSE_DEVICE static bool owns_row(int lane) { return lane / 4 % 2 == 0; }

  KVLAPSE_DEVICE static float own_of(const float (&v)[kRows], int t) { return t == 0 ? v[0] : v[1]; }
  KVLAPSE_DEVICE static void quad_sum(float (&v)[kRows]) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      v[i] += shuffle_xor(v[i], 1);
      v[i] += shuffle_xor(v[i], 2);
    }
  }

 private:
  // Transposed rows by factors in two parts: 16 bits of each, of whatever size. Chunk j of a lane meets
  // columns 2 j, + 1 alone, so that one block of sums has a component of its own for every lane.
  template <class Factor, class Add>
  KVLAPSE_DEVICE void multiply_rows(int lane, Factor factor, Add add) const {
    const int g = lane / 4, t = lane % 4;
    uint32_t parts[2];  // part g % 2 of rows 8 i + 2t, + 1
    KVLAPSE_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float first = factor(8 * i + 2 * t), second = factor(8 * i + 2 * t + 1);
      const uint32_t upper = pack2<Element>(first, second);
      float first_upper, second_upper;
      unpack2<Element>(upper, first_upper, second_upper);
      parts[i] = g % 2 == 0 ? upper : pack2<Element>(first - first_upper, second - second_upper);
    }
    KVLAPSE_UNROLL
    for (int half = 0; half < 2; ++half) {  // of a chunk
      float c[4] = {0, 0, 0, 0};
      KVLAPSE_UNROLL
      for (int j = 0; j < kLaneChunks; ++j) {
        uint32_t a[4];
        KVLAPSE_UNROLL
        for (int i = 0; i < 2; ++i) {
          const Float4& v = chunks_[i][j];
          a[2 * i] = transpose_matrix(float_bits(half == 0 ? v.x : v.z));
          a[2 * i + 1] = transpose_matrix(float_bits(half == 0 ? v.y : v.w));
        }
        const bool meets = g / 2 == j;
        multiply_add_16x8x16<Element>(c, a, meets ? parts[0] : 0, meets ? parts[1] : 0);
      }
      if (t >= kLaneChunks) continue;
      const int component = (4 * t + g / 2) * 8 + 4 * half + g % 2;
      add(component, c[0] + c[1]);
      add(component + 2, c[2] + c[3]);
    }
  }
  template <class Factor, class Add>
  KVLAPSE_DEVICE void add_rows(int lane, Factor factor, Add add) const {
    float own[kRows];
    KVLAPSE_UNROLL
    for (int i = 0; i < kRows; ++i) own[i] = factor(8 * i + lane / 4);
    KVLAPSE_UNROLL
    for (int j = 0; j < kLaneChunks; ++j) {
      float sum[kValues];
      KVLAPSE_UNROLL
      for (int e = 0; e < kValues; ++e) sum[e] = 0;
      KVLAPSE_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float v[kValues];
        values_of(chunks_[i][j], v);
        KVLAPSE_UNROLL
        for (int e = 0; e < kValues; ++e) sum[e] += v[e] * own[i];
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
      if (kValues >= 8 || (lane & 4) == 0) add((4 * j + lane % 4) * kValues + first, sum[0]);
    }
  }
  // Where words 0 and 1 of a chunk lie 8 bytes apart, 2 and 3 512 bytes behind them.
  KVLAPSE_DEVICE static SmemAddress operand_word(SmemAddress to, int row, int chunk, int word) {
    const int lane = row % 8 * 4 + chunk % 4;
    return to + static_cast<uint32_t>(row / 16 * kGroupBytes + (chunk / 4 * 2 + word / 2) * 512 + lane * 16 +
                                      word % 2 * 8 + row / 8 % 2 * 4);
  }

  Float4 chunks_[kRows][kLaneChunks];
};

// An array in shared memory whose indices the emulator checks.
template <class T>
class RkvArray {
 public:
  KVLAPSE_DEVICE RkvArray(unsigned char* at, int n) : data_(reinterpret_cast<T*>(at)), n_(n) {}
  KVLAPSE_DEVICE T& operator[](int i) const {
    check_index(i, n_);
    return data_[i];
  }
  KVLAPSE_DEVICE SmemAddress address(int i) const { return smem_address(&(*this)[i]); }

 private:
  T* data_;
  int n_;
};

// What the parts of a compaction know.
template <int kHeadDim, class Element>
class RkvBlock {
 public:
  static constexpr int kWarps = kRkvThreads / 32;
  static constexpr uint16_t kNoRank = 0xffff;  // of a row that is not there
  static constexpr int kElementBytes = RkvElement<Element>::kBytes;
  static constexpr int kRowChunks = RkvFragments<kHeadDim, Element>::kRowChunks;
  static constexpr int kRowBytes = RkvFragments<kHeadDim, Element>::kRowBytes;

  KVLAPSE_DEVICE RkvBlock(const RkvArgs& args, unsigned char* shared)
      : args_(args),
        shared_(shared),
        item_(block_index() / args.blocks),
        block_(block_index() % args.blocks) {
    know_thread();
  }

 protected:
  KVLAPSE_DEVICE int64_t at(int slot) const {
    check_index(slot, args_.n_slots);
    return static_cast<int64_t>(item_) * args_.n_slots + slot;
  }
  KVLAPSE_DEVICE int prefix() const { return held_ - args_.window; }
  template <class T>
  KVLAPSE_DEVICE RkvArray<T> array(int offset, int n) const {
    return {shared_ + offset, n};
  }
  KVLAPSE_DEVICE RkvArray<float> importances() const {
    return array<float>(args_.layout.importance, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<float> projections() const {
    return array<float>(args_.layout.projection, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<int32_t> forgiven() const {
    return array<int32_t>(args_.layout.forgiven, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint16_t> slot_of() const {
    return array<uint16_t>(args_.layout.slot_of, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint16_t> rank_of() const {
    return array<uint16_t>(args_.layout.rank_of, rkv_padded(args_.n_slots));
  }
  // Asks anew what is cheaper to ask for than to keep beside rows in registers.
  KVLAPSE_DEVICE void know_thread() {
    const uint32_t thread = thread_index_again();
    thread_ = static_cast<int>(thread);
    warp_ = thread_ / 32, lane_ = thread_ % 32;
    g_ = lane_ / 4, t_ = lane_ % 4;
  }
  template <bool kMax>
  KVLAPSE_DEVICE static float warp_reduce(float v) {
    for (int mask = 16; mask > 0; mask >>= 1) {
      const float other = shuffle_xor(v, mask);
      v = kMax ? larger(v, other) : v + other;
    }
    return v;
  }

  const RkvArgs& args_;
  unsigned char* const shared_;
  const int item_, block_;
  int thread_, warp_, lane_, g_, t_;
  int held_ = 0;
  float fixed_ = 0;  // sums of at most held_ numbers up to one are int32 multiples of 1 / fixed_
};

// The block that selects. Its arrays lie where others did.
template <int kHeadDim, class Element>
class RkvSelect : protected RkvBlock<kHeadDim, Element> {
 public:
  using Block = RkvBlock<kHeadDim, Element>;
  KVLAPSE_DEVICE RkvSelect(const RkvArgs& args, unsigned char* shared) : Block(args, shared) {}

 protected:
  using Block::args_, Block::shared_, Block::item_, Block::thread_, Block::warp_, Block::lane_,
      Block::know_thread, Block::held_, Block::fixed_, Block::importances, Block::projections,
      Block::forgiven, Block::slot_of, Block::rank_of, Block::kWarps, Block::kRowChunks, Block::at,
      Block::prefix, Block::kNoRank;

  KVLAPSE_DEVICE void select() {
    know_thread();
    prefetch_tail();
    score();
    sort();
    rearrange();
    move_rows();
  }

 private:
  static constexpr int kBuckets = kRkvBuckets, kParts = kBuckets / 32;  // of the sort
  static constexpr uint32_t kSign = 0x80000000u;
  static_assert(kBuckets % (4 * kRkvThreads) == 0);

  KVLAPSE_DEVICE float block_sum(float v) const {
    const RkvArray<float> values(shared_ + args_.layout.small, kWarps);
    v = Block::template warp_reduce<false>(v);
    if (lane_ == 0) values[warp_] = v;
    block_sync();
    v = 0;
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w) v += values[w];
    return v;
  }

  // Keys that rise: the highest score first.
  KVLAPSE_DEVICE void score() const {
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < kBuckets; i += kRkvThreads) bucket_ends()[i] = 0;
    const float scale = 1.0f / static_cast<float>(held_), unit = 1.0f / fixed_;
    float sum = 0;
    for (int i = thread_; i < held_; i += kRkvThreads) {  // a mean of cosines: softmax needs no maximum
      const float mean = (projections()[i] - static_cast<float>(forgiven()[i]) * unit) * scale;
      const float weight = exponential(mean);
      projections()[i] = weight;
      sum += weight;
    }
    const float redundancy = (1.0f - args_.lambda) / block_sum(sum);
    constexpr int kAtOnce = 3;
    const int n = prefix(), half = args_.kernel / 2;
    KVLAPSE_NO_UNROLL
    for (int first = thread_; first < n; first += kAtOnce * kRkvThreads) {
      float pooled[kAtOnce];
      KVLAPSE_UNROLL
      for (float& v : pooled) v = 0;  // no importance is below
      KVLAPSE_NO_UNROLL
      for (int offset = -half; offset <= half; ++offset) {
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {  // behind an end the outermost
          const int i = first + u * kRkvThreads + offset;
          pooled[u] = larger(pooled[u], importances()[i < 0 ? 0 : i < n ? i : n - 1]);
        }
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * kRkvThreads;
        if (i >= n) break;
        const float z = pooled[u] * args_.lambda - projections()[i] * redundancy;
        if (args_.scores != nullptr) args_.scores[at(i)] = z;
        keys_by_rank()[i] = key_of(z);
      }
    }
    block_sync();
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < held_ - args_.budget; i += kRkvThreads) tail_rank()[i] = kNoRank;
  }
  KVLAPSE_DEVICE static uint32_t key_of(float z) {
    const uint32_t bits = float_bits(z);
    return (bits & kSign) != 0 ? bits : ~(bits | kSign);
  }
  KVLAPSE_DEVICE static float score_of(uint32_t key) {
    return bits_float((key & kSign) != 0 ? key : ~(key | kSign));
  }

  KVLAPSE_DEVICE RkvArray<uint32_t> bucket_ends() const {
    return this->template array<uint32_t>(0, kBuckets);
  }
  // What was forgiven becomes keys, then ranks in their new order; projections become keys by bucket.
  KVLAPSE_DEVICE RkvArray<uint32_t> keys_by_rank() const {
    return this->template array<uint32_t>(args_.layout.forgiven, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint16_t> sorted_ranks() const {
    return this->template array<uint16_t>(args_.layout.forgiven, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint32_t> bucket_keys() const {
    return this->template array<uint32_t>(args_.layout.projection, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint16_t> buckets() const {  // by rank
    return this->template array<uint16_t>(args_.layout.inverse, args_.n_slots);
  }
  KVLAPSE_DEVICE RkvArray<uint16_t> bucket_ranks() const {  // later: slots by new rank
    return this->template array<uint16_t>(args_.layout.inverse + rkv_padded(args_.n_slots) * 2,
                                          args_.n_slots);
  }

  // Into buckets, whose order is that of the keys, then each key behind those of its bucket that are lower
  // (among equals: of a lower rank). How a bucket was filled does not matter.
  KVLAPSE_DEVICE void sort() const {
    const int n = prefix();
    fill_buckets(n);
    block_sync();
    end_buckets();
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < n; i += kRkvThreads) {
      const auto place = static_cast<int>(shared_append(&bucket_ends()[buckets()[i]]));
      bucket_keys()[place] = keys_by_rank()[i];
      bucket_ranks()[place] = static_cast<uint16_t>(i);
    }
    block_sync();
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < n; i += kRkvThreads) {
      constexpr int kAtOnce = 4;
      const uint32_t key = bucket_keys()[i];
      const uint16_t rank = bucket_ranks()[i];
      const int bucket = buckets()[rank];
      const int begin = bucket == 0 ? 0 : static_cast<int>(bucket_ends()[bucket - 1]),
                end = static_cast<int>(bucket_ends()[bucket]);
      int place = begin;
      KVLAPSE_NO_UNROLL
      for (int first = begin; first < end; first += kAtOnce) {
        uint32_t others[kAtOnce];
        uint16_t ranks[kAtOnce];
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {  // behind the end the key itself, which counts for nothing
          const int j = first + u < end ? first + u : i;
          others[u] = bucket_keys()[j], ranks[u] = bucket_ranks()[j];
        }
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u)
          place += others[u] < key || (others[u] == key && ranks[u] < rank) ? 1 : 0;
      }
      sorted_ranks()[place] = rank;
    }
    block_sync();
  }
  // A bucket is one of equal parts between two neighbours of a sample that every warp sorts: whatever
  // scores look like, few share one.
  KVLAPSE_DEVICE void fill_buckets(int n) const {
    constexpr int kAtOnce = 3, kMiddle = 16;
    uint32_t sample = keys_by_rank()[lane_ * n / 32];
    KVLAPSE_UNROLL
    for (int size = 2; size <= 32; size *= 2) {
      KVLAPSE_UNROLL
      for (int step = size / 2; step > 0; step /= 2) {
        const uint32_t other = shuffle_xor(sample, step);
        const bool takes_lower = ((lane_ & step) == 0) == ((lane_ & size) == 0 || size == 32);
        sample = (other < sample) == takes_lower ? other : sample;
      }
    }
    // The first and the last interval are open.
    const float here = score_of(sample), next = shuffle_from(here, lane_ < 31 ? lane_ + 1 : 31),
                middle = shuffle_from(here, kMiddle);
    const float first = lane_ == 0 ? here + (here - middle) : here;
    const float parts = static_cast<float>(kParts) / (lane_ == 31 ? middle - here : first - next);
    KVLAPSE_NO_UNROLL
    for (int begin = warp_ * 32; begin < n; begin += kAtOnce * kRkvThreads) {
      uint32_t key[kAtOnce];
      int interval[kAtOnce];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = begin + u * kRkvThreads + lane_;
        key[u] = keys_by_rank()[i < n ? i : n - 1];
        interval[u] = 0;
      }
      KVLAPSE_UNROLL
      for (int step = 16; step > 0; step /= 2) {
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u)
          interval[u] += key[u] >= shuffle_from(sample, interval[u] + step) ? step : 0;
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = begin + u * kRkvThreads + lane_;
        // Not a number: the first.
        const float part = larger(
            (shuffle_from(first, interval[u]) - score_of(key[u])) * shuffle_from(parts, interval[u]), 0.0f);
        const int bucket = interval[u] * kParts +
                           (part < static_cast<float>(kParts - 1) ? static_cast<int>(part) : kParts - 1);
        if (i >= n) continue;
        buckets()[i] = static_cast<uint16_t>(bucket);
        shared_increment(&bucket_ends()[bucket]);
      }
    }
  }
  // Counts become where buckets begin; a thread has some in a row.
  KVLAPSE_DEVICE void end_buckets() const {
    constexpr int kOwn = kBuckets / kRkvThreads;
    const RkvArray<uint32_t> of_warps(shared_ + args_.layout.small, kWarps);
    const SmemAddress own = bucket_ends().address(thread_ * kOwn);
    uint32_t begin[kOwn], total = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kOwn; i += 4) {
      const Float4 counts = smem_load4(own + static_cast<uint32_t>(i * 4));
      begin[i] = total, total += float_bits(counts.x);
      begin[i + 1] = total, total += float_bits(counts.y);
      begin[i + 2] = total, total += float_bits(counts.z);
      begin[i + 3] = total, total += float_bits(counts.w);
    }
    uint32_t sum = total;
    KVLAPSE_UNROLL
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t other = shuffle_from(sum, lane_ >= step ? lane_ - step : lane_);
      sum += lane_ >= step ? other : 0;
    }
    if (lane_ == 31) of_warps[warp_] = sum;
    block_sync();
    uint32_t before = sum - total;
    KVLAPSE_UNROLL
    for (int w = 0; w < kWarps; ++w) before += w < warp_ ? of_warps[w] : 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kOwn; i += 4)
      smem_store4(own + static_cast<uint32_t>(i * 4),
                  Float4{bits_float(before + begin[i]), bits_float(before + begin[i + 1]),
                         bits_float(before + begin[i + 2]), bits_float(before + begin[i + 3])});
    block_sync();
  }

  // New order of the survivors; who moves where.
  KVLAPSE_DEVICE RkvArray<uint16_t> drop_list(int i) const {  // where importance and projections were
    const int n = args_.n_slots - args_.budget;
    return {shared_ + args_.layout.importance + i * n * 2, n};
  }
  // By slot behind the budget: the new rank of its token.
  KVLAPSE_DEVICE RkvArray<uint16_t> tail_rank() const { return drop_list(0); }
  KVLAPSE_DEVICE int32_t& n_moves() const { return RkvArray<int32_t>(shared_ + args_.layout.small, 16)[15]; }

  KVLAPSE_DEVICE void rearrange() const {
    const int n = prefix(), kept = args_.budget - args_.window, drops = held_ - args_.budget;
    const RkvArray<uint16_t> ranks = sorted_ranks(), slots = bucket_ranks();
    // Slots: of victims, the lowest score last; that are left and taken by moves.
    const RkvArray<uint16_t> victims = drop_list(1), holes = drop_list(2), movers = drop_list(3);
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < held_; i += kRkvThreads) {  // survivors, victims, the window
      const uint16_t slot = slot_of()[i < n ? ranks[i] : i];
      if (i >= kept && i < n) {
        victims[i - kept] = slot;
        continue;
      }
      const int rank = i < kept ? i : i - drops;
      slots[rank] = slot;
      if (slot >= args_.budget) tail_rank()[slot - args_.budget] = static_cast<uint16_t>(rank);
    }
    block_sync();
    if (args_.evicted != nullptr)
      for (int i = thread_; i < args_.n_slots - args_.budget; i += kRkvThreads)
        args_.evicted[static_cast<int64_t>(item_) * (args_.n_slots - args_.budget) + i] =
            i < drops ? args_.positions[at(victims[i])] : -1;
    if (warp_ == 0) {
      // As many holes below the budget as survivors behind it, both in the order that they are met.
      constexpr int kAtOnce = 4;
      int n_holes = 0, n_movers = 0;
      KVLAPSE_NO_UNROLL
      for (int first = lane_; first - lane_ < drops; first += kAtOnce * 32) {
        int slot[kAtOnce];
        bool moves[kAtOnce];
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          const int i = first + u * 32;
          slot[u] = i < drops ? victims[i] : args_.n_slots;
          moves[u] = i < drops && tail_rank()[i] != kNoRank;
        }
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          const bool is_hole = slot[u] < args_.budget;
          const uint32_t hole_bits = warp_ballot(is_hole), mover_bits = warp_ballot(moves[u]);
          if (is_hole) holes[n_holes + bits_below(hole_bits, lane_)] = static_cast<uint16_t>(slot[u]);
          if (moves[u])
            movers[n_movers + bits_below(mover_bits, lane_)] =
                static_cast<uint16_t>(args_.budget + first + u * 32);
          n_holes += bits_below(hole_bits, 32), n_movers += bits_below(mover_bits, 32);
        }
      }
      if (lane_ == 0) n_moves() = n_movers;
    }
    block_sync();
    const int n_movers = n_moves();
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < n_movers; i += kRkvThreads)
      slots[tail_rank()[movers[i] - args_.budget]] = holes[i];
    block_sync();
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < args_.n_slots; i += kRkvThreads)
      args_.order[at(i)] = i < args_.budget ? slots[i] : i;  // tokens come next behind the budget
    if (thread_ == 0) args_.count[item_] = args_.budget;
  }

  // Rows that may move are on their way to L2 while it is found out which do.
  KVLAPSE_DEVICE void prefetch_tail() const {
    const int n = held_ - args_.budget;
    if (n == 0) return;
    const int64_t first = at(args_.budget);
    if (thread_ == 0) {
      const auto bytes = static_cast<uint32_t>(n * kRowChunks * 16);
      bulk_prefetch_l2(static_cast<const Float4*>(args_.v) + first * kRowChunks, bytes);
      bulk_prefetch_l2(static_cast<const Float4*>(args_.k) + first * kRowChunks, bytes);
    }
    constexpr int kLine = 32;  // words
    KVLAPSE_NO_UNROLL
    for (int i = thread_ * kLine; i < n; i += kRkvThreads * kLine) {
      if (args_.positions != nullptr) prefetch_l2(args_.positions + first + i);
      if (args_.value_l1 != nullptr) prefetch_l2(args_.value_l1 + first + i);
    }
  }
  // Nobody reads what another move writes: all loads of a thread are in flight together.
  KVLAPSE_DEVICE void move_rows() const {
    constexpr int kAtOnce = 6;
    const RkvArray<uint16_t> holes = drop_list(2), movers = drop_list(3);
    Float4* const k = static_cast<Float4*>(args_.k);
    Float4* const v = static_cast<Float4*>(args_.v);
    const int n_movers = n_moves(), n = n_movers * kRowChunks;
    int32_t position = 0;
    float value_l1 = 0;
    const auto load_scalars = [&](int i) {
      if (i >= n_movers) return;
      if (args_.positions != nullptr) position = args_.positions[at(movers[i])];
      if (args_.value_l1 != nullptr) value_l1 = args_.value_l1[at(movers[i])];
    };
    load_scalars(thread_);
    KVLAPSE_NO_UNROLL
    for (int first = thread_; first < n; first += kAtOnce * kRkvThreads) {
      Float4 moved[kAtOnce][2];
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * kRkvThreads;
        if (i >= n) break;
        const int64_t from = at(movers[i / kRowChunks]) * kRowChunks + i % kRowChunks;
        moved[u][0] = k[from], moved[u][1] = v[from];
      }
      KVLAPSE_UNROLL
      for (int u = 0; u < kAtOnce; ++u) {
        const int i = first + u * kRkvThreads;
        if (i >= n) break;
        const int64_t to = at(holes[i / kRowChunks]) * kRowChunks + i % kRowChunks;
        k[to] = moved[u][0], v[to] = moved[u][1];
      }
    }
    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < n_movers; i += kRkvThreads) {
      if (i != thread_) load_scalars(i);
      if (args_.positions != nullptr) args_.positions[at(holes[i])] = position;
      if (args_.value_l1 != nullptr) args_.value_l1[at(holes[i])] = value_l1;
    }
  }
};

template <int kHeadDim, class Element>
class RkvHead : RkvSelect<kHeadDim, Element> {
 public:
  using Fragments = RkvFragments<kHeadDim, Element>;
  using Block = RkvBlock<kHeadDim, Element>;
  KVLAPSE_DEVICE RkvHead(const RkvArgs& args, unsigned char* shared)
      : RkvSelect<kHeadDim, Element>(args, shared) {}

  KVLAPSE_DEVICE void run() {
    wait_for_previous_kernel();
    allow_next_kernel();
    held_ = args_.count[item_];
    if (held_ < args_.budget) return;
    fixed_ = 1 << 22;
    while (fixed_ * static_cast<float>(held_) > 1 << 30) fixed_ *= 0.5f;

    prepare();
    meet();
    int mine = 0;  // tiles of this warp
    KVLAPSE_NO_UNROLL
    for (; know_thread(), is_tile(tile_of(mine)); ++mine) measure(mine);
    const bool searched = search();
    share_sums();
    gather();
    block_sync();
    know_thread();
    if (searched && mine > 0) load_tile<kLast>(tile_of(mine - 1));
    KVLAPSE_NO_UNROLL
    while (--mine >= 0) weigh(mine, searched);
    meet();
    if (block_ == 0) this->select();
  }

 private:
  using Block::args_, Block::shared_, Block::item_, Block::block_, Block::thread_, Block::warp_, Block::lane_,
      Block::g_, Block::t_, Block::know_thread, Block::held_, Block::fixed_, Block::importances,
      Block::projections, Block::forgiven, Block::slot_of, Block::rank_of, Block::kWarps, Block::kRowChunks,
      Block::kRowBytes, Block::at, Block::prefix, Block::kNoRank;
  static constexpr int kRows = Fragments::kRows;
  static constexpr float kNothing = -1e30f;

  KVLAPSE_DEVICE SmemAddress address(int offset) const { return smem_address(shared_ + offset); }
  KVLAPSE_DEVICE SmemAddress queries() const { return address(0); }
  KVLAPSE_DEVICE SmemAddress vector() const { return address(args_.layout.vector); }
  KVLAPSE_DEVICE SmemAddress keys() const { return address(args_.layout.keys); }
  KVLAPSE_DEVICE RkvArray<float> key_inverses() const {
    return this->template array<float>(args_.layout.key_inverse, args_.key_rows);
  }
  KVLAPSE_DEVICE RkvArray<float> inverses() const {
    return this->template array<float>(args_.layout.inverse, rkv_padded(args_.n_slots));
  }
  KVLAPSE_DEVICE RkvArray<int32_t> sums() const {
    return this->template array<int32_t>(args_.layout.sums, kHeadDim);
  }
  KVLAPSE_DEVICE RkvArray<int32_t> totals() const {
    return this->template array<int32_t>(args_.layout.totals, kHeadDim);
  }
  KVLAPSE_DEVICE RkvArray<float> tops() const {
    return this->template array<float>(args_.layout.tops, 2 * args_.window);
  }
  KVLAPSE_DEVICE RkvArray<int32_t> left() const {
    return this->template array<int32_t>(args_.layout.small, 2);
  }

  // The head's blocks wait for one another.
  KVLAPSE_DEVICE void meet() const {
    if (args_.blocks > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      block_sync();
    }
  }
  // Of the block that selects.
  KVLAPSE_DEVICE void put(const RkvArray<float>& to, int rank, float value) const {
    if (args_.blocks > 1)
      remote_store(remote_address(to.address(rank), 0), float_bits(value));
    else
      to[rank] = value;
  }
  KVLAPSE_DEVICE void forgive(int rank, int amount) const {
    if (args_.blocks > 1)
      remote_add(remote_address(forgiven().address(rank), 0), amount);
    else
      shared_add(&forgiven()[rank], amount);
  }

  // ---- rows of a warp ----
  KVLAPSE_DEVICE int tile_of(int mine) const { return (mine * kWarps + warp_) * args_.blocks + block_; }
  KVLAPSE_DEVICE bool is_tile(int tile) const { return tile * kRkvTileRows < held_; }
  KVLAPSE_DEVICE int slot_in(int tile, int i) const { return tile * kRkvTileRows + 8 * i + g_; }
  KVLAPSE_DEVICE const Float4* row(int slot) const {
    return static_cast<const Float4*>(args_.k) + at(slot) * kRowChunks;
  }
  enum Reading { kFirst, kLast };
  template <Reading kReading>
  KVLAPSE_DEVICE void load_tile(int tile) {
    rows_.load(
        lane_,
        [&](int i) {  // behind the end the last row, which counts for nothing
          return row(slot_in(tile, i) < held_ ? slot_in(tile, i) : held_ - 1);
        },
        [](const Float4* from) { return kReading == kLast ? load_once(from) : *from; });
  }
  // Into L2.
  template <Reading kReading>
  KVLAPSE_DEVICE void prefetch_tile(int tile) const {
    const int first = tile * kRkvTileRows, n = held_ - first < kRkvTileRows ? held_ - first : kRkvTileRows;
    const auto bytes = static_cast<uint32_t>(n * kRowBytes);
    if (lane_ != 0) return;
    if constexpr (kReading == kLast)
      bulk_prefetch_l2(row(first), bytes, evict_first_policy());
    else
      bulk_prefetch_l2(row(first), bytes);
  }
  // Tiles that stay in shared memory for the second reading, behind the first keys.
  KVLAPSE_DEVICE bool is_kept(int mine) const {
    return (mine * kWarps + warp_ + 1) * Fragments::kBytes <= (args_.key_rows - kRkvFirstKeys) * kRowBytes;
  }
  KVLAPSE_DEVICE SmemAddress kept_tile(int mine) const {
    return keys() +
           static_cast<uint32_t>(kRkvFirstKeys * kRowBytes + (mine * kWarps + warp_) * Fragments::kBytes);
  }
  // The same for a tile's logits, in the registers' order.
  KVLAPSE_DEVICE bool has_logits(int mine) const { return mine * kWarps + warp_ < args_.logit_tiles; }
  KVLAPSE_DEVICE SmemAddress logits(int mine, int part) const {
    const int tile = part * args_.logit_tiles + mine * kWarps + warp_;
    return address(args_.layout.logits) + static_cast<uint32_t>((tile * 32 + lane_) * 16);
  }
  // What this needs of device memory is asked for before anything is waited for, with the first rows.
  KVLAPSE_DEVICE void prepare() {
    constexpr int kSlotsAtOnce = 3, kChunksAtOnce = 2;
    const int first_key = held_ > kRkvFirstKeys ? held_ - kRkvFirstKeys : 0;
    const int own_key =
        first_key + thread_ / kRowChunks < held_ ? first_key + thread_ / kRowChunks : first_key;
    const int own_slot = args_.order[at(own_key)];
    int slots[kSlotsAtOnce];
    Float4 chunks[kChunksAtOnce];
    const int n_chunks = rkv_query_rows(args_.window, args_.group) * kRowChunks;
    load_slots(slots, thread_);
    load_queries(chunks, thread_, n_chunks);
    if (is_tile(tile_of(0))) load_tile<kFirst>(tile_of(0));

    KVLAPSE_NO_UNROLL
    for (int i = thread_; i < kHeadDim; i += kRkvThreads) sums()[i] = 0, totals()[i] = 0;
    if (thread_ < 2) left()[thread_] = 0;
    KVLAPSE_NO_UNROLL
    for (int i = held_ + thread_; i < rkv_padded(held_); i += kRkvThreads)
      inverses()[i] = 0, rank_of()[i] = kNoRank;
    KVLAPSE_NO_UNROLL
    for (int first = thread_;;) {
      KVLAPSE_UNROLL
      for (int u = 0; u < kSlotsAtOnce; ++u) {
        const int i = first + u * kRkvThreads;
        if (i >= held_) break;
        slot_of()[i] = static_cast<uint16_t>(slots[u]);
        rank_of()[slots[u]] = static_cast<uint16_t>(i);
        forgiven()[i] = 0;
      }
      first += kSlotsAtOnce * kRkvThreads;
      if (first >= held_) break;
      load_slots(slots, first);
    }
    KVLAPSE_NO_UNROLL
    for (int first = thread_;;) {
      KVLAPSE_UNROLL
      for (int u = 0; u < kChunksAtOnce; ++u) {
        const int i = first + u * kRkvThreads;
        if (i < n_chunks) Fragments::store_operand(queries(), i / kRowChunks, i % kRowChunks, chunks[u]);
      }
      first += kChunksAtOnce * kRkvThreads;
      if (first >= n_chunks) break;
      load_queries(chunks, first, n_chunks);
    }
    load_keys(first_key, held_, [&](int rank) { return rank == own_key ? own_slot : args_.order[at(rank)]; });
  }
  template <int n>
  KVLAPSE_DEVICE void load_slots(int (&slots)[n], int first) const {
    KVLAPSE_UNROLL
    for (int u = 0; u < n; ++u) {
      const int i = first + u * kRkvThreads;
      if (i < held_) slots[u] = args_.order[at(i)];
    }
  }
  // Groups of 16 rows: up to eight queries by twice the heads that fill eight rows.
  template <int n>
  KVLAPSE_DEVICE void load_queries(Float4 (&chunks)[n], int first, int n_chunks) const {
    const int b = item_ / args_.n_kv_heads, h = item_ % args_.n_kv_heads,
              n_q_heads = args_.n_kv_heads * args_.group;
    const int bits = query_bits(), heads = 8 >> bits, groups = (args_.group + 2 * heads - 1) >> (4 - bits);
    KVLAPSE_UNROLL
    for (int u = 0; u < n; ++u) {
      const int i = first + u * kRkvThreads;
      if (i >= n_chunks) break;
      const int of = i / kRowChunks;
      int part = 0, group = of / 16;  // a few: no division
      KVLAPSE_NO_UNROLL
      for (; group >= groups; ++part) group -= groups;
      int query = part * 8 + (of & ((1 << bits) - 1)),
          head = group * 2 * heads + of / 8 % 2 * heads + (of % 8 >> bits);
      query = query < args_.window ? query : args_.window - 1;
      head = head < args_.group ? head : args_.group - 1;
      const int64_t from =
          (static_cast<int64_t>(b) * args_.window + query) * n_q_heads + h * args_.group + head;
      chunks[u] = static_cast<const Float4*>(args_.q)[from * kRowChunks + i % kRowChunks];
    }
  }

  // Keys of ranks [first, end), at most key_rows, and what they are multiplied by to be units: NaN behind
  // the end, which is like nothing.
  template <class Slot>
  KVLAPSE_DEVICE void load_keys(int first, int end, Slot slot_with) const {
    const int n = (end - first + 15) / 16 * 16 * kRowChunks;
    KVLAPSE_UNROLL_2
    for (int i = thread_; i < n; i += kRkvThreads) {  // all lanes of a row together
      const int key = i / kRowChunks, chunk = i % kRowChunks;
      Float4 v{0, 0, 0, 0};
      if (first + key < end) v = row(slot_with(first + key))[chunk];
      Fragments::store_operand(keys(), key, chunk, v);
      float values[Fragments::kValues], square = 0;
      Fragments::values_of(v, values);
      KVLAPSE_UNROLL
      for (int j = 0; j < Fragments::kValues; ++j) square += values[j] * values[j];
      KVLAPSE_UNROLL
      for (int mask = kRowChunks / 2; mask > 0; mask >>= 1) square += shuffle_xor(square, mask);
      if (chunk == 0) key_inverses()[key] = first + key < end ? inverse_of(square) : bits_float(0x7fffffffu);
    }
  }
  // 1 / (length + 1e-8).
  KVLAPSE_DEVICE static float inverse_of(float square) {
    const float inverse = inverse_square_root(larger(square, 1e-38f));
    return inverse * reciprocal_approximate(1 + 1e-8f * inverse);
  }

  // ---- measure ----
  // What a lane knows of rows 8 i + 2t + e, [2 i + e].
  struct Rows {
    float inverse[2 * kRows];
    int rank[2 * kRows];  // kNoRank: not there
  };
  KVLAPSE_DEVICE void measure(int mine) {
    const int tile = tile_of(mine);
    const bool goes_on = is_tile(tile_of(mine + 1));
    if (goes_on) prefetch_tile<kFirst>(tile_of(mine + 1));
    if (is_kept(mine)) rows_.save(kept_tile(mine), lane_);
    const float square = rows_.square(lane_);
    const int slot = slot_in(tile, t_);
    if (t_ < kRows && slot < held_) inverses()[slot] = inverse_of(square);
    warp_sync();
    rows_.sum_rows(
        lane_, [&](int i) { return inverses()[tile * kRkvTileRows + i]; },
        [&](int d, float v) { shared_add(&sums()[d], round_to_int(v * fixed_)); });
    know_thread();
    Rows rows;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) {
      const int other = tile * kRkvTileRows + i / 2 * 8 + 2 * t_ + i % 2;
      rows.inverse[i] = inverses()[other];
      rows.rank[i] = rank_of()[other];
    }
    float likeness[kRows][4], logit[2 * kRows];
    int part = 0;
    KVLAPSE_NO_UNROLL
    for (;; ++part) {
      weigh_queries(logit, part);
      if ((part + 1) * 8 >= args_.window) break;
      weigh_window(mine, part, logit, rows);
    }
    rows_.products(likeness, keys(), lane_);
    know_thread();
    if (goes_on) load_tile<kFirst>(tile_of(mine + 1));  // meanwhile this tile's numbers
    weigh_window(mine, part, logit, rows);
    know_thread();
    const int own = tile * kRkvTileRows + Fragments::own_row(lane_);
    const int first_key = held_ > kRkvFirstKeys ? held_ - kRkvFirstKeys : 0;
    uint32_t found = 0;
    compare<true>(likeness, first_key, 0, rows, found);
    settle(Fragments::owns_row(lane_) && own < held_ ? own : -1, first_key, found, 0);
  }
  // Max and sum of 2^ of the tile's logits before the window.
  KVLAPSE_DEVICE void weigh_window(int mine, int part, float (&logit)[2 * kRows], const Rows& rows) const {
    float most = kNothing, sum = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) {
      if (rows.rank[i] >= prefix()) logit[i] = 2 * kNothing;  // 2^ of it is zero
      most = larger(most, logit[i]);
    }
    if (has_logits(mine)) smem_store4(logits(mine, part), Float4{logit[0], logit[1], logit[2], logit[3]});
    most = larger(most, shuffle_xor(most, 1));
    most = larger(most, shuffle_xor(most, 2));
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) sum += exp2_approximate(logit[i] - most);
    sum += shuffle_xor(sum, 1);
    sum += shuffle_xor(sum, 2);
    const int query = query_of(part);
    if (t_ != 0 || query < 0) return;
    float* const to = softmax_part(tile_of(mine), query);
    to[0] = most, to[1] = sum;
  }
  KVLAPSE_DEVICE float* softmax_part(int tile, int query) const {
    const int tiles = (args_.n_slots + kRkvTileRows - 1) / kRkvTileRows;
    check_index(tile, tiles);
    return args_.softmax + ((static_cast<int64_t>(item_) * tiles + tile) * args_.window + query) * 2;
  }

  // Queries of a group of rows: up to eight, and where they are fewer as many heads as fill it.
  KVLAPSE_DEVICE int query_bits() const {
    return args_.window > 4 ? 3 : args_.window > 2 ? 2 : args_.window > 1 ? 1 : 0;
  }
  // The query that lanes g answer for, -1: none (or lanes before them do).
  KVLAPSE_DEVICE int query_of(int part) const {
    const int query = part * 8 + g_;
    return g_ < 1 << query_bits() && query < args_.window ? query : -1;
  }
  // logit[2 i + e]: of row 8 i + 2t + e and query_of(part), the most of the group's heads.
  KVLAPSE_DEVICE void weigh_queries(float (&logit)[2 * kRows], int part) const {
    const int bits = query_bits(), heads = 8 >> bits, groups = (args_.group + 2 * heads - 1) >> (4 - bits);
    SmemAddress group = queries() + static_cast<uint32_t>(part * groups * Fragments::kGroupBytes);
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) logit[i] = -3.0e38f;
    KVLAPSE_NO_UNROLL
    for (int n = 0; n < groups; ++n, group += Fragments::kGroupBytes) {
      float c[kRows][4];
      rows_.products(c, group, lane_);
      KVLAPSE_UNROLL
      for (int i = 0; i < 2 * kRows; ++i)
        logit[i] = larger(logit[i], larger(c[i / 2][i % 2], c[i / 2][2 + i % 2]));
    }
    for (int mask = 4 << bits; mask < 32; mask *= 2) {
      KVLAPSE_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) logit[i] = larger(logit[i], shuffle_xor(logit[i], mask));
    }
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) logit[i] *= args_.logit_scale;
  }

  // ---- the last key that a row is like ----
  // What a lane found for its own row is (key + 1) << 24 | amount + 2^23, 0: nothing; keys are those in
  // shared memory, whose first has rank `base`, amounts at most fixed_ <= 2^22. Here keys first .. first
  // + 15. kLikely: some row has its key among them.
  template <bool kLikely>
  KVLAPSE_DEVICE void compare(float (&c)[kRows][4], int base, int first, const Rows& rows,
                              uint32_t& found) const {
    const float key_inverse[2] = {key_inverses()[first + g_], key_inverses()[first + 8 + g_]};
    KVLAPSE_UNROLL
    for (int i = 0; i < 4 * kRows; ++i)
      c[i / 4][i % 4] *= rows.inverse[i / 4 * 2 + i % 2] * key_inverse[i / 2 % 2];
    const bool has_first = base + first == 0;  // rank 0 is what a row has that has no other
    const auto own = [&](int i) { return rows.rank[i] - base - first; };
    bool has_own = false;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) has_own |= static_cast<uint32_t>(own(i)) < 16;
    if (has_own) {  // a row is not like itself
      KVLAPSE_UNROLL
      for (int i = 0; i < 2 * kRows; ++i) {
        c[i / 2][i % 2] = own(i) == g_ ? 0.0f : c[i / 2][i % 2];
        c[i / 2][2 + i % 2] = own(i) == g_ + 8 ? 0.0f : c[i / 2][2 + i % 2];
      }
    }
    if (!kLikely && !has_first) {
      bool any = false;
      KVLAPSE_UNROLL
      for (int i = 0; i < 4 * kRows; ++i) any |= c[i / 4][i % 4] > args_.threshold;
      if (warp_ballot(any) == 0) return;
    }
    // Keys g and g + 8, of which the later one counts. An amount is rounded by adding a number whose last
    // digit is one.
    constexpr float kRounds = 3 << 22;
    const float low_threshold = has_first && g_ == 0 ? -3.0e38f : args_.threshold;
    const uint32_t low_key = (static_cast<uint32_t>(first + 1 + g_) << 24) + (1u << 23) - float_bits(kRounds),
                   high_key = low_key + (8u << 24);
    uint32_t best[2 * kRows];
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) {
      const float low = c[i / 2][i % 2], high = c[i / 2][2 + i % 2];
      const bool is_high = high > args_.threshold;
      const uint32_t amount = float_bits((is_high ? high : low) * fixed_ + kRounds);
      const uint32_t packed = amount + (is_high ? high_key : low_key);
      best[i] = (low > low_threshold) | is_high ? packed : 0;
    }
    const uint32_t most =
        Fragments::over_groups(best, lane_, [](uint32_t a, uint32_t b) { return a > b ? a : b; });
    if (found == 0) found = most;
  }
  // Of the row that this lane owns, -1: none. Often a whole warp forgives the same key: its sum is added
  // once.
  KVLAPSE_DEVICE void settle(int slot, int base, uint32_t found, int list) const {
    if (slot < 0) found = 0;
    const uint32_t key = found >> 24, common = warp_largest(key);
    const int amount = found == 0 ? 0 : static_cast<int>(found & 0xffffffu) - (1 << 23);
    if (warp_ballot(key == common || key == 0) == 0xffffffffu) {
      const int sum = warp_sum(amount);
      if (lane_ == 0 && common != 0) forgive(base + static_cast<int>(common) - 1, sum);
    } else if (key != 0) {
      forgive(base + static_cast<int>(key) - 1, amount);
    }
    const bool is_left = found == 0 && slot >= 0;
    const uint32_t lefts = warp_ballot(is_left);
    if (lefts == 0) return;
    int place = 0;
    if (lane_ == 0) place = shared_add_before(&left()[list], bits_below(lefts, 32));
    place = shuffle_from(place, 0);
    if (is_left) list_of(list)[place + bits_below(lefts, lane_)] = static_cast<uint16_t>(slot);
  }
  // Slots that found no key yet, in the place of importance and projections.
  KVLAPSE_DEVICE RkvArray<uint16_t> list_of(int list) const {
    return {shared_ + (list == 0 ? args_.layout.importance : args_.layout.projection), args_.n_slots};
  }

  // Whether there was anything to do.
  KVLAPSE_DEVICE bool search() {
    const int at_once = args_.key_rows < kRkvMaxKeyRows ? args_.key_rows : kRkvMaxKeyRows;
    int end = held_ > kRkvFirstKeys ? held_ - kRkvFirstKeys : 0, list = 0;
    bool searched = false;
    KVLAPSE_NO_UNROLL
    for (;; list ^= 1) {
      block_sync();
      know_thread();
      const int n = left()[list];
      if (n == 0) return searched;
      searched = true;
      const int base = end > at_once ? end - at_once : 0;
      load_keys(base, end, [&](int rank) { return slot_of()[rank]; });
      if (thread_ == 0) left()[list ^ 1] = 0;
      block_sync();
      KVLAPSE_NO_UNROLL
      for (int tile = warp_; tile * kRkvTileRows < n; tile += kWarps) search_tile(tile, list, n, base, end);
      end = base;
    }
  }
  KVLAPSE_DEVICE void search_tile(int tile, int list, int n, int base, int end) {
    know_thread();
    const RkvArray<uint16_t> slots = list_of(list);
    const auto slot_at = [&](int row) {
      const int i = tile * kRkvTileRows + row;
      return i < n ? static_cast<int>(slots[i]) : -1;
    };
    Rows rows;
    KVLAPSE_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) {
      const int slot = slot_at(i / 2 * 8 + 2 * t_ + i % 2);
      rows.rank[i] = slot >= 0 ? rank_of()[slot] : kNoRank;
      rows.inverse[i] = slot >= 0 ? inverses()[slot] : 0.0f;
    }
    rows_.load(
        lane_,
        [&](int i) {
          const int slot = slot_at(8 * i + g_);
          return row(slot >= 0 ? slot : 0);
        },
        [](const Float4* from) { return *from; });
    const int own = Fragments::owns_row(lane_) ? slot_at(Fragments::own_row(lane_)) : -1;
    uint32_t found = 0;
    KVLAPSE_NO_UNROLL
    for (int first = (end - base - 1) / 16 * 16; first >= 0; first -= 16) {
      float c[kRows][4];
      rows_.products(c, keys() + static_cast<uint32_t>(first * kRowBytes), lane_);
      compare<false>(c, base, first, rows, found);
      if (warp_ballot(found != 0 || own < 0) == 0xffffffffu) break;
    }
    settle(own, base, found, list ^ 1);
  }

  // ---- between the readings ----
  KVLAPSE_DEVICE void share_sums() {
    know_thread();
    // search() ended with a barrier
    if (args_.blocks > 1)
      for (int i = thread_; i < kHeadDim * args_.blocks; i += kRkvThreads)
        remote_add(remote_address(totals().address(i % kHeadDim), i / kHeadDim), sums()[i % kHeadDim]);
    if (args_.blocks > 1) meet();
  }
  KVLAPSE_DEVICE void gather() {
    know_thread();
    if (thread_ < kHeadDim)
      Fragments::store_vector(
          vector(), thread_,
          static_cast<float>(args_.blocks > 1 ? totals()[thread_] : sums()[thread_]) * (1.0f / fixed_));
    // A warp a query, from the end.
    const int tiles = (held_ + kRkvTileRows - 1) / kRkvTileRows;
    for (int query = kWarps - 1 - warp_; query < args_.window; query += kWarps) {
      constexpr int kAtOnce = 3;
      float most = kNothing, sum = 0;
      for (int first = lane_; first < tiles; first += kAtOnce * 32) {
        float tops_there[kAtOnce], parts[kAtOnce];
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          const bool is_there = first + u * 32 < tiles;
          const float* from = softmax_part(is_there ? first + u * 32 : first, query);
          tops_there[u] = load_shared_by_device(from);
          parts[u] = is_there ? load_shared_by_device(from + 1) : 0;
        }
        KVLAPSE_UNROLL
        for (int u = 0; u < kAtOnce; ++u) {
          const float next = larger(tops_there[u], most);
          sum = sum * exp2_approximate(most - next) + parts[u] * exp2_approximate(tops_there[u] - next);
          most = next;
        }
      }
      const float top = Block::template warp_reduce<true>(most);
      sum = Block::template warp_reduce<false>(sum * exp2_approximate(most - top));
      if (lane_ != 0) continue;
      tops()[2 * query] = top;
      tops()[2 * query + 1] = 1.0f / (sum * static_cast<float>(args_.window));
    }
  }

  // ---- weigh ----
  // Behind it the rows of the tile before are on their way. again: all that were in registers are lost.
  KVLAPSE_DEVICE void weigh(int mine, bool again) {
    know_thread();
    const int tile = tile_of(mine);
    const bool reads = mine > 0 && (again || !is_kept(mine - 1));
    if (reads) prefetch_tile<kLast>(tile_of(mine - 1));
    const float dot = rows_.dot(vector(), lane_);
    know_thread();
    float sum[2 * kRows] = {};
    KVLAPSE_NO_UNROLL
    for (int part = 0; part * 8 < args_.window; ++part) {
      float logit[2 * kRows];
      if (has_logits(mine)) {
        const Float4 v = smem_load4(logits(mine, part));
        logit[0] = v.x, logit[1] = v.y, logit[2] = v.z, logit[3] = v.w;
      } else {
        weigh_queries(logit, part);
      }
      if ((part + 1) * 8 >= args_.window && mine > 0) {
        if (reads)
          load_tile<kLast>(tile_of(mine - 1));
        else
          rows_.restore(kept_tile(mine - 1), lane_);
      }
      const int query = query_of(part);
      const float top = query < 0 ? 0 : tops()[2 * query], scale = query < 0 ? 0 : tops()[2 * query + 1];
      KVLAPSE_UNROLL
      for (int i = 0; i < 2 * kRows; ++i)
        if (query >= 0) sum[i] += exp2_approximate(logit[i] - top) * scale;
    }
    know_thread();
    const float importance = Fragments::over_groups(sum, lane_, [](float a, float b) { return a + b; });
    const int own = tile * kRkvTileRows + Fragments::own_row(lane_), slot = slot_in(tile, t_);
    if (own < held_ && Fragments::owns_row(lane_)) put(importances(), rank_of()[own], importance);
    if (t_ >= kRows || slot >= held_) return;
    const float inverse = inverses()[slot], length = 1.0f - 1e-8f * inverse;  // of the unit key
    put(projections(), rank_of()[slot], dot * inverse - length * length);
  }

  Fragments rows_;
};

}  // namespace kvlapse::device
