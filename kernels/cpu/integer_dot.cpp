#include "kernels/cpu/integer_dot.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "core/base/dtype.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/integer_dot.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

#if KVLAPSE_SIMD

// 256-bit vectors on every target: the eight lanes are part of the result.
using Tag16i = hn::FixedTag<int16_t, 16>;
using Tag8i = hn::FixedTag<int32_t, 8>;
using Vec16i = hn::Vec<Tag16i>;
using Vec8i = hn::Vec<Tag8i>;

struct Weights {
  Vec16i low, high;  // values 0 to 15 and 16 to 31 of a block
  Vec8 scale, minimum;
};

HWY_INLINE hn::Vec<hn::FixedTag<float, 4>> two_halves(const std::byte* block) {
  return hn::PromoteTo(hn::FixedTag<float, 4>(), hn::LoadU(hn::FixedTag<hwy::float16_t, 4>(),
                                                           reinterpret_cast<const hwy::float16_t*>(block)));
}

HWY_INLINE void load_nibbles(const std::byte* q, Weights& w) {
  const hn::FixedTag<uint8_t, 16> d8;
  const auto bytes = hn::LoadU(d8, reinterpret_cast<const uint8_t*>(q));
  w.low = hn::PromoteTo(Tag16i(), hn::And(bytes, hn::Set(d8, uint8_t{15})));
  w.high = hn::PromoteTo(Tag16i(), hn::ShiftRight<4>(bytes));
}

struct IntegerQ8_0 {
  static constexpr size_t kBytes = 34;
  static constexpr bool kMinimum = false;
  static HWY_INLINE void load(const std::byte* block, Weights& w) {
    const hn::FixedTag<int8_t, 16> d8;
    const auto* q = reinterpret_cast<const int8_t*>(block + 2);
    w.low = hn::PromoteTo(Tag16i(), hn::LoadU(d8, q));
    w.high = hn::PromoteTo(Tag16i(), hn::LoadU(d8, q + 16));
    w.scale = hn::Set(Tag8(), hn::GetLane(two_halves(block)));
  }
};

struct IntegerQ4_0 {
  static constexpr size_t kBytes = 18;
  static constexpr bool kMinimum = false;
  static HWY_INLINE void load(const std::byte* block, Weights& w) {
    load_nibbles(block + 2, w);
    const Vec16i eight = hn::Set(Tag16i(), int16_t{8});
    w.low = hn::Sub(w.low, eight);
    w.high = hn::Sub(w.high, eight);
    w.scale = hn::Set(Tag8(), hn::GetLane(two_halves(block)));
  }
};

struct IntegerQ4_1 {
  static constexpr size_t kBytes = 20;
  static constexpr bool kMinimum = true;
  static HWY_INLINE void load(const std::byte* block, Weights& w) {
    load_nibbles(block + 4, w);
    const auto halves = two_halves(block);
    w.scale = hn::Set(Tag8(), hn::GetLane(halves));
    w.minimum = hn::Set(Tag8(), hn::ExtractLane(halves, 1));
  }
};

// Pairs of products, added: lane l holds products 2l and 2l + 1 of `a` and of `b`.
HWY_INLINE Vec8i pair_products(Vec16i a, Vec16i xa, Vec16i b, Vec16i xb) {
  Vec8i unused = hn::Zero(Tag8i());
  const Vec8i first = hn::ReorderWidenMulAccumulate(Tag8i(), a, xa, hn::Zero(Tag8i()), unused);
  return hn::ReorderWidenMulAccumulate(Tag8i(), b, xb, first, unused);
}

template <typename Block, int R, int X>
HWY_INLINE void integer_group(const std::byte* const* row, const IntegerActivations& x, size_t x_row,
                              Vec8 (*total)[8], int first) {
  const size_t n_blocks = x.n_blocks();
  Vec8 acc[R][X];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j) acc[r][j] = hn::Zero(Tag8());
  for (size_t b = 0; b < n_blocks; ++b) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Weights w;
      prefetch_ahead(row[r] + b * Block::kBytes);
      Block::load(row[r] + b * Block::kBytes, w);
#pragma GCC unroll 4
      for (int j = 0; j < X; ++j) {
        const size_t at = (x_row + j) * n_blocks + b;
        const int16_t* values = x.values.data() + at * IntegerActivations::kBlock;
        const Vec8i sum =
            pair_products(w.low, hn::LoadU(Tag16i(), values), w.high, hn::LoadU(Tag16i(), values + 16));
        const Vec8 scale = hn::Mul(w.scale, hn::Set(Tag8(), x.scales[at]));
        acc[r][j] = hn::MulAdd(hn::ConvertTo(Tag8(), sum), scale, acc[r][j]);
        if constexpr (Block::kMinimum)
          acc[r][j] = hn::MulAdd(w.minimum, hn::LoadU(Tag8(), x.sums.data() + at * IntegerActivations::kSums),
                                 acc[r][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j) total[j][first + r] = acc[r][j];
}

template <typename Block, int X>
HWY_INLINE void integer_tile(const std::byte* const (&row)[8], size_t valid, const IntegerActivations& x,
                             size_t x_row, float* y, size_t y_stride) {
  constexpr int kRows = X == 1 ? 4 : 2;
  Vec8 total[X][8];
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += kRows) integer_group<Block, kRows, X>(row + r, x, x_row, total, r);
  HWY_ALIGN float part[8];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) {
    hn::Store(tree8(total[j]), Tag8(), part);
    std::copy_n(part, valid, y + j * y_stride);
  }
}

template <typename Block>
HWY_INLINE void integer_rows_of(const std::byte* rows, size_t row_bytes, size_t n_rows,
                                const IntegerActivations& x, float* y, size_t y_stride) {
  for (size_t i = 0; i < n_rows; i += 8) {
    const size_t valid = std::min<size_t>(8, n_rows - i);
    const std::byte* row[8];
    for (size_t r = 0; r < 8; ++r) row[r] = rows + (i + std::min(r, valid - 1)) * row_bytes;
    for (size_t j = 0; j < x.n_rows; j += 2) {
      if (x.n_rows - j == 1)
        integer_tile<Block, 1>(row, valid, x, j, y + j * y_stride + i, y_stride);
      else
        integer_tile<Block, 2>(row, valid, x, j, y + j * y_stride + i, y_stride);
    }
  }
}

void IntegerRows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows,
                 const IntegerActivations& x, float* y, size_t y_stride) {
  switch (type) {
    case TensorType::q8_0: return integer_rows_of<IntegerQ8_0>(rows, row_bytes, n_rows, x, y, y_stride);
    case TensorType::q4_0: return integer_rows_of<IntegerQ4_0>(rows, row_bytes, n_rows, x, y, y_stride);
    default: return integer_rows_of<IntegerQ4_1>(rows, row_bytes, n_rows, x, y, y_stride);
  }
}

#else

void IntegerRows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows,
                 const IntegerActivations& x, float* y, size_t y_stride) {
  for (size_t r = 0; r < n_rows; ++r)
    for (size_t j = 0; j < x.n_rows; ++j)
      y[j * y_stride + r] = scalar::integer_dot(type, rows + r * row_bytes, x, j);
}

#endif

// Element-wise: the compiler vectorises it, the bits cannot differ.
HWY_INLINE void round_block(const float* x, int16_t* values, float* scale, float* sums) {
  constexpr size_t kBlock = IntegerActivations::kBlock;
  float most = 0;
  for (size_t i = 0; i < kBlock; ++i) most = std::max(most, std::abs(x[i]));
  *scale = most / 32767.0f;
  const float inverse = most > 0 ? 32767.0f / most : 0.0f;
  for (size_t i = 0; i < kBlock; ++i) values[i] = static_cast<int16_t>(std::nearbyint(x[i] * inverse));
  for (size_t l = 0; l < IntegerActivations::kSums; ++l) {
    const int sum = values[2 * l] + values[2 * l + 1] + values[16 + 2 * l] + values[17 + 2 * l];
    sums[l] = *scale * static_cast<float>(sum);
  }
}

void RoundBlocks(const float* x, size_t n_blocks, int16_t* values, float* scales, float* sums) {
  for (size_t b = 0; b < n_blocks; ++b)
    round_block(x + b * IntegerActivations::kBlock, values + b * IntegerActivations::kBlock, scales + b,
                sums + b * IntegerActivations::kSums);
}

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(IntegerRows);
HWY_EXPORT(RoundBlocks);

void IntegerActivations::reserve(size_t max_rows, size_t max_columns) {
  values.reserve(max_rows * max_columns);
  scales.reserve(max_rows * max_columns / kBlock);
  sums.reserve(max_rows * max_columns / kBlock * kSums);
}

void IntegerActivations::assign(const float* x, size_t x_stride, size_t rows, size_t row_columns) {
  n_rows = rows;
  columns = row_columns;
  values.resize(n_rows * columns);
  scales.resize(n_rows * n_blocks());
  sums.resize(n_rows * n_blocks() * kSums);
  for (size_t r = 0; r < n_rows; ++r) HWY_DYNAMIC_DISPATCH(RoundBlocks)
  (x + r * x_stride, n_blocks(), values.data() + r * columns, scales.data() + r * n_blocks(),
   sums.data() + r * n_blocks() * kSums);
}

bool has_integer_dot(TensorType type) {
  return type == TensorType::q8_0 || type == TensorType::q4_0 || type == TensorType::q4_1;
}

void integer_rows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows,
                  const IntegerActivations& x, float* y, size_t y_stride) {
  HWY_DYNAMIC_DISPATCH(IntegerRows)(type, rows, row_bytes, n_rows, x, y, y_stride);
}

float scalar::integer_dot(TensorType type, const std::byte* row, const IntegerActivations& x, size_t x_row) {
  float lanes[8] = {};
  for (size_t b = 0; b < x.n_blocks(); ++b, row += block_bytes(type)) {
    const size_t at = x_row * x.n_blocks() + b;
    const int16_t* values = x.values.data() + at * IntegerActivations::kBlock;
    uint16_t halves[2];
    std::memcpy(halves, row, sizeof halves);
    const float scale = f16_to_f32(halves[0]) * x.scales[at];
    auto weight = [&](size_t i) {
      if (type == TensorType::q8_0) return static_cast<int>(static_cast<int8_t>(row[2 + i]));
      const auto byte = static_cast<uint8_t>(row[(type == TensorType::q4_1 ? 4 : 2) + i % 16]);
      const int nibble = i < 16 ? byte & 15 : byte >> 4;
      return type == TensorType::q4_0 ? nibble - 8 : nibble;
    };
    for (size_t l = 0; l < 8; ++l) {
      int sum = 0;
      for (size_t i : {2 * l, 2 * l + 1, 16 + 2 * l, 17 + 2 * l}) sum += weight(i) * values[i];
      lanes[l] = std::fma(static_cast<float>(sum), scale, lanes[l]);
      if (type == TensorType::q4_1)
        lanes[l] = std::fma(f16_to_f32(halves[1]), x.sums[at * IntegerActivations::kSums + l], lanes[l]);
    }
  }
  return ((lanes[0] + lanes[4]) + (lanes[2] + lanes[6])) + ((lanes[1] + lanes[5]) + (lanes[3] + lanes[7]));
}

}  // namespace kvlapse
#endif  // HWY_ONCE
