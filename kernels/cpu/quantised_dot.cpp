#include "kernels/cpu/quantised_dot.h"

#include <algorithm>
#include <vector>

#include "core/base/scalar_math.h"
#include "core/model/tensor_file.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "kernels/cpu/quantised_dot.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

#if KVLAPSE_SIMD

inline constexpr size_t kBlock = 32;
inline constexpr size_t kBlockVecs = kBlock / kLanes;

// Two fp16 numbers at the head of a block, widened; every block is longer than the eight bytes that are read.
struct Scales {
  Vec d, m;
};
HWY_INLINE Scales scales_at(const std::byte* block) {
  const hn::FixedTag<float, 4> d4;
  const auto four = hn::PromoteTo(
      d4, hn::LoadU(hn::FixedTag<hwy::float16_t, 4>(), reinterpret_cast<const hwy::float16_t*>(block)));
  return {hn::Set(Tag(), hn::GetLane(four)), hn::Set(Tag(), hn::ExtractLane(four, 1))};
}

template <typename Byte>
HWY_INLINE Vec to_float(hn::Vec<hn::Rebind<Byte, Tag>> bytes) {
  return hn::ConvertTo(Tag(), hn::PromoteTo(hn::RebindToSigned<Tag>(), bytes));
}

// expand(block, out): the 32 values of a block in order, in the operations of dequantize().
struct Q8_0 {
  static constexpr size_t kBytes = 34;
  static HWY_INLINE void expand(const std::byte* block, Vec (&out)[kBlockVecs]) {
    const hn::Rebind<int8_t, Tag> d8;
    const Vec d = scales_at(block).d;
    const auto* q = reinterpret_cast<const int8_t*>(block + 2);
#pragma GCC unroll 4
    for (size_t v = 0; v < kBlockVecs; ++v)
      out[v] = hn::Mul(d, to_float<int8_t>(hn::LoadU(d8, q + v * kLanes)));
  }
};

// Low nibbles are values 0 to 15, high ones 16 to 31.
template <typename Value>
HWY_INLINE void expand_nibbles(const uint8_t* q, Vec (&out)[kBlockVecs], const Value& value) {
  const hn::Rebind<uint8_t, Tag> d8;
#pragma GCC unroll 2
  for (size_t v = 0; v < kBlockVecs / 2; ++v) {
    const auto bytes = hn::LoadU(d8, q + v * kLanes);
    out[v] = value(to_float<uint8_t>(hn::And(bytes, hn::Set(d8, uint8_t{15}))));
    out[v + kBlockVecs / 2] = value(to_float<uint8_t>(hn::ShiftRight<4>(bytes)));
  }
}

struct Q4_0 {
  static constexpr size_t kBytes = 18;
  static HWY_INLINE void expand(const std::byte* block, Vec (&out)[kBlockVecs]) {
    const Vec d = scales_at(block).d, eight = hn::Set(Tag(), 8.0f);
    expand_nibbles(reinterpret_cast<const uint8_t*>(block + 2), out,
                   [&](Vec q) HWY_ATTR { return hn::Mul(d, hn::Sub(q, eight)); });
  }
};

struct Q4_1 {
  static constexpr size_t kBytes = 20;
  static HWY_INLINE void expand(const std::byte* block, Vec (&out)[kBlockVecs]) {
    const Scales s = scales_at(block);
    // d * q is exact in fp32: one rounding, as in the definition.
    expand_nibbles(reinterpret_cast<const uint8_t*>(block + 4), out,
                   [&](Vec q) HWY_ATTR { return hn::MulAdd(s.d, q, s.m); });
  }
};

template <typename Block, int R, int X>
HWY_INLINE void quantised_group(const std::byte* const* row, const float* const* x, size_t columns,
                                Vec8 (*folded)[8], int first) {
  Vec acc[R][X][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j)
#pragma GCC unroll 2
      for (size_t v = 0; v < kVecs; ++v) acc[r][j][v] = hn::Zero(Tag());
  size_t offset = 0;
  for (size_t i = 0; i < columns; i += kBlock, offset += Block::kBytes) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      Vec w[kBlockVecs];
      prefetch_ahead(row[r] + offset);
      Block::expand(row[r] + offset, w);
#pragma GCC unroll 4
      for (size_t v = 0; v < kBlockVecs; ++v)
#pragma GCC unroll 4
        for (int j = 0; j < X; ++j)
          acc[r][j][v % kVecs] = hn::MulAdd(w[v], load(x[j] + i + v * kLanes), acc[r][j][v % kVecs]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < X; ++j) folded[j][first + r] = fold(acc[r][j]);
}

template <typename Block, int X>
HWY_INLINE void quantised_tile(const std::byte* const (&row)[8], size_t valid, const float* x,
                               size_t x_stride, size_t columns, float* y, size_t y_stride) {
  constexpr int kRows = X == 1 ? 4 : 2;
  const float* vectors[X];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) vectors[j] = x + j * x_stride;
  Vec8 folded[X][8];
#pragma GCC unroll 4
  for (int r = 0; r < 8; r += kRows) quantised_group<Block, kRows, X>(row + r, vectors, columns, folded, r);
  HWY_ALIGN float part[8];
#pragma GCC unroll 4
  for (int j = 0; j < X; ++j) {
    hn::Store(tree8(folded[j]), Tag8(), part);
    std::copy_n(part, valid, y + j * y_stride);
  }
}

template <typename Block>
HWY_INLINE void rows_of(const std::byte* rows, size_t row_bytes, size_t n_rows, size_t columns,
                        const float* x, size_t x_stride, size_t n_x, float* y, size_t y_stride) {
  for (size_t i = 0; i < n_rows; i += 8) {
    const size_t valid = std::min<size_t>(8, n_rows - i);
    const std::byte* row[8];
    for (size_t r = 0; r < 8; ++r) row[r] = rows + (i + std::min(r, valid - 1)) * row_bytes;
    for (size_t j = 0; j < n_x; j += 2) {
      if (n_x - j == 1)
        quantised_tile<Block, 1>(row, valid, x + j * x_stride, x_stride, columns, y + j * y_stride + i,
                                 y_stride);
      else
        quantised_tile<Block, 2>(row, valid, x + j * x_stride, x_stride, columns, y + j * y_stride + i,
                                 y_stride);
    }
  }
}

template <typename Block>
HWY_INLINE void widen_blocks(const std::byte* data, size_t n, float* out) {
  for (size_t i = 0; i < n; i += kBlock, data += Block::kBytes) {
    Vec w[kBlockVecs];
    Block::expand(data, w);
#pragma GCC unroll 4
    for (size_t v = 0; v < kBlockVecs; ++v) hn::StoreU(w[v], Tag(), out + i + v * kLanes);
  }
}

void QuantisedRows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows, size_t columns,
                   const float* x, size_t x_stride, size_t n_x, float* y, size_t y_stride) {
  switch (type) {
    case TensorType::q8_0:
      return rows_of<Q8_0>(rows, row_bytes, n_rows, columns, x, x_stride, n_x, y, y_stride);
    case TensorType::q4_0:
      return rows_of<Q4_0>(rows, row_bytes, n_rows, columns, x, x_stride, n_x, y, y_stride);
    default: return rows_of<Q4_1>(rows, row_bytes, n_rows, columns, x, x_stride, n_x, y, y_stride);
  }
}

void WidenQuantised(TensorType type, const std::byte* data, size_t n, float* out) {
  switch (type) {
    case TensorType::q8_0: return widen_blocks<Q8_0>(data, n, out);
    case TensorType::q4_0: return widen_blocks<Q4_0>(data, n, out);
    default: return widen_blocks<Q4_1>(data, n, out);
  }
}

#else

void QuantisedRows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows, size_t columns,
                   const float* x, size_t x_stride, size_t n_x, float* y, size_t y_stride) {
  std::vector<float> row(columns);
  for (size_t r = 0; r < n_rows; ++r) {
    dequantize(type, rows + r * row_bytes, static_cast<int64_t>(columns), row.data());
    for (size_t j = 0; j < n_x; ++j) y[j * y_stride + r] = scalar::dot(row.data(), x + j * x_stride, columns);
  }
}

void WidenQuantised(TensorType type, const std::byte* data, size_t n, float* out) {
  dequantize(type, data, static_cast<int64_t>(n), out);
}

#endif

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(QuantisedRows);
HWY_EXPORT(WidenQuantised);

bool has_quantised_dot(TensorType type) {
  return type == TensorType::q8_0 || type == TensorType::q4_0 || type == TensorType::q4_1;
}

void quantised_rows(TensorType type, const std::byte* rows, size_t row_bytes, size_t n_rows, size_t columns,
                    const float* x, size_t x_stride, size_t n_x, float* y, size_t y_stride) {
  HWY_DYNAMIC_DISPATCH(QuantisedRows)(type, rows, row_bytes, n_rows, columns, x, x_stride, n_x, y, y_stride);
}

void widen_quantised(TensorType type, const std::byte* data, size_t n, float* out) {
  HWY_DYNAMIC_DISPATCH(WidenQuantised)(type, data, n, out);
}

}  // namespace kvlapse
#endif  // HWY_ONCE
