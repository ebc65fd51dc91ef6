#include "kernels/cpu/integer_matmul.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/base/dtype.h"

#ifndef KVLAPSE_KERNELS_CPU_INTEGER_MATMUL_ONCE_
#define KVLAPSE_KERNELS_CPU_INTEGER_MATMUL_ONCE_
namespace kvlapse {
namespace {

// A block of one row of activations.
struct BlockView {
  const int16_t* values;
  size_t tile;
  float scale, sum;
  int value(size_t column) const { return values[column / 2 * 2 * tile + column % 2]; }
};

BlockView block_of(const IntegerActivations& x, size_t row, size_t block) {
  size_t first = 0, tile = IntegerActivations::tile_of(x.n_rows);
  while (row >= first + tile) {
    first += tile;
    tile = IntegerActivations::tile_of(x.n_rows - first);
  }
  const size_t at = first * x.n_blocks() + block * tile + row - first;
  return {x.values.data() + first * x.columns + block * IntegerActivations::kBlock * tile + 2 * (row - first),
          tile, x.scales[at], x.sums[at]};
}

}  // namespace
}  // namespace kvlapse
#endif

// Pairs of 16-bit products are added by one instruction where there is VNNI: the only file that gains by it.
#undef HWY_DISABLED_TARGETS
#define HWY_DISABLED_TARGETS (HWY_SSSE3 | HWY_SSE4)
#define HWY_WANT_AVX3_DL

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/integer_matmul.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

struct BlockScale {
  float scale, inverse;
};
// From the largest magnitude of a block. Blocks too small for a finite inverse are zeros.
HWY_INLINE BlockScale block_scale(float most) {
  if (!(most > 1e-30f)) return {0, 0};
  return {most / 32767.0f, 32767.0f / most};
}

#if KVLAPSE_SIMD

// 256-bit vectors on every target: a lane is a row of the group.
using Tag16i = hn::FixedTag<int16_t, 16>;
using Tag8i = hn::FixedTag<int32_t, 8>;
using Vec16i = hn::Vec<Tag16i>;
using Vec8i = hn::Vec<Tag8i>;

HWY_INLINE Vec8 halves(const std::byte* p) {
  return hn::PromoteTo(
      Tag8(), hn::LoadU(hn::Rebind<hwy::float16_t, Tag8>(), reinterpret_cast<const hwy::float16_t*>(p)));
}

// sum += w * x, products exact, for two columns of eight rows and two neighbouring activations.
#if HWY_TARGET == HWY_AVX3_DL
// One instruction, broadcast included. Not its intrinsic: for this target the compiler would take the
// encoding of AVX-VNNI, which CPUs with AVX-512 VNNI may lack.
HWY_INLINE void add_products(Vec16i w, const int16_t* x, Vec8i& sum) {
  asm("vpdpwssd %2%{1to8%}, %1, %0"
      : "+v"(sum.raw)
      : "v"(w.raw), "m"(*reinterpret_cast<const int16_t(*)[2]>(x)));
}
#else
HWY_INLINE void add_products(Vec16i w, const int16_t* x, Vec8i& sum) {
  int32_t both;
  std::memcpy(&both, x, sizeof both);
  Vec8i unused = hn::Zero(Tag8i());
  sum = hn::ReorderWidenMulAccumulate(Tag8i(), w, hn::BitCast(Tag16i(), hn::Set(Tag8i(), both)), sum, unused);
  // Integer sums are associative and the compiler knows: left alone it forms all products first and adds
  // them as a tree, which spills every one of them.
  asm("" : "+x"(sum.raw));
}
#endif

// each_pair(block, use): use(p, weights of columns 2p and 2p + 1), p = 0 .. 15.
template <typename Use>
HWY_INLINE void each_nibble_pair(const std::byte* q, const Use& use) {
  const hn::FixedTag<uint16_t, 16> d;
  const auto mask = hn::Set(d, uint16_t{15});
#pragma GCC unroll 4
  for (size_t j = 0; j < 4; ++j) {
    const auto words = hn::LoadU(d, reinterpret_cast<const uint16_t*>(q) + 16 * j);
    use(4 * j, hn::BitCast(Tag16i(), hn::And(words, mask)));
    use(4 * j + 1, hn::BitCast(Tag16i(), hn::And(hn::ShiftRight<4>(words), mask)));
    use(4 * j + 2, hn::BitCast(Tag16i(), hn::And(hn::ShiftRight<8>(words), mask)));
    use(4 * j + 3, hn::BitCast(Tag16i(), hn::ShiftRight<12>(words)));
  }
}

struct PackedQ8_0 {
  static constexpr size_t kBytes = 16 + 256;
  static constexpr bool kMinimum = false;
  static HWY_INLINE Vec8 scale(const std::byte* block) { return halves(block); }
  template <typename Use>
  static HWY_INLINE void each_pair(const std::byte* block, const Use& use) {
    const auto* q = reinterpret_cast<const int8_t*>(block + 16);
#pragma GCC unroll 16
    for (size_t p = 0; p < 16; ++p)
      use(p, hn::PromoteTo(Tag16i(), hn::LoadU(hn::FixedTag<int8_t, 16>(), q + 16 * p)));
  }
};

struct PackedQ4_0 {
  static constexpr size_t kBytes = 16 + 128;
  static constexpr bool kMinimum = true;
  static HWY_INLINE Vec8 scale(const std::byte* block) { return halves(block); }
  static HWY_INLINE Vec8 minimum(const std::byte* block) {
    return hn::Mul(halves(block), hn::Set(Tag8(), -8.0f));
  }
  template <typename Use>
  static HWY_INLINE void each_pair(const std::byte* block, const Use& use) {
    each_nibble_pair(block + 16, use);
  }
};

struct PackedQ4_1 {
  static constexpr size_t kBytes = 32 + 128;
  static constexpr bool kMinimum = true;
  static HWY_INLINE Vec8 scale(const std::byte* block) { return halves(block); }
  static HWY_INLINE Vec8 minimum(const std::byte* block) { return halves(block + 16); }
  template <typename Use>
  static HWY_INLINE void each_pair(const std::byte* block, const Use& use) {
    each_nibble_pair(block + 32, use);
  }
};

// One group of rows by X rows of activations, from x_row on.
template <typename Block, int X>
HWY_INLINE void group_tile(const std::byte* group, const IntegerActivations& x, size_t x_row, size_t valid,
                           float* y, size_t y_stride) {
  const size_t n_blocks = x.n_blocks();
  const int16_t* HWY_RESTRICT values = x.values.data() + x_row * x.columns;
  const float* HWY_RESTRICT scales = x.scales.data() + x_row * n_blocks;
  const float* HWY_RESTRICT sums = x.sums.data() + x_row * n_blocks;
  Vec8 total[X];
#pragma GCC unroll 8
  for (int j = 0; j < X; ++j) total[j] = hn::Zero(Tag8());
  for (size_t b = 0; b < n_blocks; ++b, group += Block::kBytes, values += IntegerActivations::kBlock * X) {
    Vec8i sum[X];
#pragma GCC unroll 8
    for (int j = 0; j < X; ++j) sum[j] = hn::Zero(Tag8i());
    Block::each_pair(group, [&](size_t p, Vec16i w) HWY_ATTR {
#pragma GCC unroll 8
      for (int j = 0; j < X; ++j) add_products(w, values + 2 * (p * X + j), sum[j]);
    });
    const Vec8 scale = Block::scale(group);
#pragma GCC unroll 8
    for (int j = 0; j < X; ++j) {
      const Vec8 factor = hn::Mul(scale, hn::Set(Tag8(), scales[b * X + j]));
      total[j] = hn::MulAdd(hn::ConvertTo(Tag8(), sum[j]), factor, total[j]);
    }
    if constexpr (Block::kMinimum) {
      const Vec8 minimum = Block::minimum(group);
#pragma GCC unroll 8
      for (int j = 0; j < X; ++j) total[j] = hn::MulAdd(minimum, hn::Set(Tag8(), sums[b * X + j]), total[j]);
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < X; ++j) {
    if (HWY_LIKELY(valid == PackedMatrix::kRows)) {
      hn::StoreU(total[j], Tag8(), y + j * y_stride);
    } else {
      HWY_ALIGN float part[PackedMatrix::kRows];
      hn::Store(total[j], Tag8(), part);
      std::copy_n(part, valid, y + j * y_stride);
    }
  }
}

template <typename Block>
HWY_INLINE void multiply_groups(const PackedMatrix& w, int64_t begin, int64_t end,
                                const IntegerActivations& x, float* y, size_t y_stride) {
  const size_t group_bytes = x.n_blocks() * Block::kBytes;
  for (int64_t r = begin; r < end; r += PackedMatrix::kRows) {
    const std::byte* group = w.data + r / PackedMatrix::kRows * group_bytes;
    const auto valid = static_cast<size_t>(std::min(PackedMatrix::kRows, end - r));
    for (size_t j = 0, tile; j < x.n_rows; j += tile) {
      tile = IntegerActivations::tile_of(x.n_rows - j);
      float* to = y + j * y_stride + r;
      switch (tile) {
        case 8: group_tile<Block, 8>(group, x, j, valid, to, y_stride); break;
        case 4: group_tile<Block, 4>(group, x, j, valid, to, y_stride); break;
        case 2: group_tile<Block, 2>(group, x, j, valid, to, y_stride); break;
        default: group_tile<Block, 1>(group, x, j, valid, to, y_stride);
      }
    }
  }
}

void IntegerMatmul(const PackedMatrix& w, int64_t begin, int64_t end, const IntegerActivations& x, float* y,
                   size_t y_stride) {
  switch (w.type) {
    case TensorType::q8_0: return multiply_groups<PackedQ8_0>(w, begin, end, x, y, y_stride);
    case TensorType::q4_0: return multiply_groups<PackedQ4_0>(w, begin, end, x, y, y_stride);
    default: return multiply_groups<PackedQ4_1>(w, begin, end, x, y, y_stride);
  }
}

void RoundRow(const float* x, size_t n_blocks, size_t tile, int16_t* values, float* scales, float* sums) {
  constexpr size_t kVectors = IntegerActivations::kBlock / 8;
  for (size_t b = 0; b < n_blocks; ++b, x += IntegerActivations::kBlock) {
    Vec8 v[kVectors], most = hn::Zero(Tag8());
#pragma GCC unroll 4
    for (size_t i = 0; i < kVectors; ++i) {
      v[i] = hn::LoadU(Tag8(), x + 8 * i);
      most = hn::Max(most, hn::Abs(v[i]));
    }
    const BlockScale scale = block_scale(hn::GetLane(hn::MaxOfLanes(Tag8(), most)));
    Vec8i sum = hn::Zero(Tag8i());
    int16_t rounded_values[IntegerActivations::kBlock];
#pragma GCC unroll 4
    for (size_t i = 0; i < kVectors; ++i) {
      const Vec8i rounded = hn::NearestInt(hn::Mul(v[i], hn::Set(Tag8(), scale.inverse)));
      hn::StoreU(hn::DemoteTo(hn::FixedTag<int16_t, 8>(), rounded), hn::FixedTag<int16_t, 8>(),
                 rounded_values + 8 * i);
      sum = hn::Add(sum, rounded);
    }
    for (size_t i = 0; i < IntegerActivations::kBlock; i += 2, values += 2 * tile)
      std::memcpy(values, rounded_values + i, 2 * sizeof(int16_t));
    scales[b * tile] = scale.scale;
    sums[b * tile] = scale.scale * static_cast<float>(hn::GetLane(hn::SumOfLanes(Tag8i(), sum)));
  }
}

#else

// Row r of a packed block as the definition reads it.
void IntegerMatmul(const PackedMatrix& w, int64_t begin, int64_t end, const IntegerActivations& x, float* y,
                   size_t y_stride) {
  const size_t group_bytes = packed_group_bytes(w.type, w.columns), n_blocks = x.n_blocks();
  const size_t n_halves = w.type == TensorType::q4_1 ? 2 : 1;
  for (int64_t row = begin; row < end; ++row) {
    const std::byte* group = w.data + row / PackedMatrix::kRows * group_bytes;
    const auto r = static_cast<size_t>(row % PackedMatrix::kRows);
    for (size_t j = 0; j < x.n_rows; ++j) {
      float total = 0;
      for (size_t b = 0; b < n_blocks; ++b) {
        const std::byte* block = group + b * (group_bytes / n_blocks);
        const std::byte* q = block + n_halves * 16;
        auto half = [&](size_t i) {
          uint16_t bits;
          std::memcpy(&bits, block + (i * PackedMatrix::kRows + r) * 2, 2);
          return f16_to_f32(bits);
        };
        auto weight = [&](size_t c) -> int {
          if (w.type == TensorType::q8_0) return static_cast<int8_t>(q[c / 2 * 16 + 2 * r + c % 2]);
          uint16_t word;
          std::memcpy(&word, q + (c / 8 * 16 + 2 * r + c % 2) * 2, 2);
          return word >> (c % 8 / 2 * 4) & 15;
        };
        const BlockView view = block_of(x, j, b);
        int sum = 0;
        for (size_t c = 0; c < IntegerActivations::kBlock; ++c) sum += weight(c) * view.value(c);
        total = std::fma(static_cast<float>(sum), half(0) * view.scale, total);
        if (w.type == TensorType::q4_1) total = std::fma(half(1), view.sum, total);
        if (w.type == TensorType::q4_0) total = std::fma(half(0) * -8.0f, view.sum, total);
      }
      y[j * y_stride + row] = total;
    }
  }
}

void RoundRow(const float* x, size_t n_blocks, size_t tile, int16_t* values, float* scales, float* sums) {
  constexpr size_t kBlock = IntegerActivations::kBlock;
  for (size_t b = 0; b < n_blocks; ++b, x += kBlock) {
    float most = 0;
    for (size_t i = 0; i < kBlock; ++i) most = std::max(most, std::abs(x[i]));
    const BlockScale scale = block_scale(most);
    int sum = 0;
    for (size_t i = 0; i < kBlock; ++i) {
      const int rounded = static_cast<int>(std::nearbyint(x[i] * scale.inverse));
      values[(b * kBlock + i) / 2 * 2 * tile + i % 2] = static_cast<int16_t>(rounded);
      sum += rounded;
    }
    scales[b * tile] = scale.scale;
    sums[b * tile] = scale.scale * static_cast<float>(sum);
  }
}

#endif

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(IntegerMatmul);
HWY_EXPORT(RoundRow);

void IntegerActivations::reserve(size_t max_rows, size_t max_columns) {
  values.reserve(max_rows * max_columns);
  scales.reserve(max_rows * max_columns / kBlock);
  sums.reserve(max_rows * max_columns / kBlock);
}

void IntegerActivations::assign(const float* x, size_t x_stride, size_t rows, size_t row_columns) {
  n_rows = rows;
  columns = row_columns;
  values.resize(n_rows * columns);
  scales.resize(n_rows * n_blocks());
  sums.resize(n_rows * n_blocks());
  for (size_t first = 0, tile; first < n_rows; first += tile) {
    tile = tile_of(n_rows - first);
    for (size_t r = 0; r < tile; ++r) HWY_DYNAMIC_DISPATCH(RoundRow)
    (x + (first + r) * x_stride, n_blocks(), tile, values.data() + first * columns + 2 * r,
     scales.data() + first * n_blocks() + r, sums.data() + first * n_blocks() + r);
  }
}

void integer_matmul(const PackedMatrix& w, int64_t begin, int64_t end, const IntegerActivations& x, float* y,
                    size_t y_stride) {
  HWY_DYNAMIC_DISPATCH(IntegerMatmul)(w, begin, end, x, y, y_stride);
}

float scalar::integer_dot(TensorType type, const std::byte* row, const IntegerActivations& x, size_t x_row) {
  float total = 0;
  for (size_t b = 0; b < x.n_blocks(); ++b, row += block_bytes(type)) {
    const BlockView block = block_of(x, x_row, b);
    uint16_t half[2];
    std::memcpy(half, row, sizeof half);
    int sum = 0;
    for (size_t i = 0; i < IntegerActivations::kBlock; ++i) {
      if (type == TensorType::q8_0) {
        sum += static_cast<int8_t>(row[2 + i]) * block.value(i);
      } else {
        const auto byte = static_cast<uint8_t>(row[(type == TensorType::q4_1 ? 4 : 2) + i % 16]);
        sum += (i < 16 ? byte & 15 : byte >> 4) * block.value(i);
      }
    }
    const float scale = f16_to_f32(half[0]);
    total = std::fma(static_cast<float>(sum), scale * block.scale, total);
    if (type == TensorType::q4_1) total = std::fma(f16_to_f32(half[1]), block.sum, total);
    if (type == TensorType::q4_0) total = std::fma(scale * -8.0f, block.sum, total);
  }
  return total;
}

}  // namespace kvlapse
#endif  // HWY_ONCE
