#include "trace/row_convert.h"

#include <cstring>

#include "core/base/error.h"
#include "hwy/cache_control.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "trace/row_convert.cpp"
#include "hwy/foreach_target.h"
// After foreach_target: this header changes with the target.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Whole vectors here, the rest by the caller. Return how many were done.
size_t f16_from_f32(const float* values, size_t n, uint16_t* out) {
  const hn::ScalableTag<float> df;
  const hn::Rebind<hwy::float16_t, decltype(df)> dh;
  const hn::Rebind<uint16_t, decltype(df)> du;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::BitCast(du, hn::DemoteTo(dh, hn::LoadU(df, values + i))), du, out + i);
  return i;
}

// Round to nearest even, NaN kept quiet: f32_to_bf16, lane by lane.
size_t bf16_from_f32(const float* values, size_t n, uint16_t* out) {
  const hn::ScalableTag<float> df;
  const hn::RebindToUnsigned<decltype(df)> du;
  const hn::RebindToSigned<decltype(df)> di;
  const hn::Rebind<uint16_t, decltype(df)> dh;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto value = hn::LoadU(df, values + i);
    const auto bits = hn::BitCast(du, value);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(du, 1u));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(du, 0x7fffu))));
    const auto quiet = hn::Or(hn::ShiftRight<16>(bits), hn::Set(du, 0x40u));
    const auto is_nan = hn::RebindMask(du, hn::IsNaN(value));
    hn::StoreU(hn::DemoteTo(dh, hn::BitCast(di, hn::IfThenElse(is_nan, quiet, rounded))), dh, out + i);
  }
  return i;
}

size_t copy_f32(const float* values, size_t n, float* out) {
  const hn::ScalableTag<float> df;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  if (reinterpret_cast<uintptr_t>(out) % kRowAlignment == 0 && lanes * sizeof(float) <= kRowAlignment)
    for (; i + lanes <= n; i += lanes) hn::Stream(hn::LoadU(df, values + i), df, out + i);
  else
    for (; i + lanes <= n; i += lanes) hn::StoreU(hn::LoadU(df, values + i), df, out + i);
  return i;
}

size_t f32_from_f16(const uint16_t* data, size_t n, float* out) {
  const hn::ScalableTag<float> df;
  const hn::Rebind<hwy::float16_t, decltype(df)> dh;
  const hn::Rebind<uint16_t, decltype(df)> du;
  const size_t lanes = hn::Lanes(df);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes)
    hn::StoreU(hn::PromoteTo(df, hn::BitCast(dh, hn::LoadU(du, data + i))), df, out + i);
  return i;
}

}  // namespace HWY_NAMESPACE
}  // namespace kvlapse
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {
namespace {

HWY_EXPORT(f16_from_f32);
HWY_EXPORT(bf16_from_f32);
HWY_EXPORT(copy_f32);
HWY_EXPORT(f32_from_f16);

[[noreturn]] void refuse(DType type) {
  fail("q, k, v rows: expected fp32, fp16 or bf16, found {}", dtype_name(type));
}

}  // namespace

void store_rows(const float* values, size_t n, DType type, std::byte* out) {
  switch (type) {
    case DType::f32: {
      // Rows of a few KiB fall where the C library copies by `rep movsb`, which starts slowly on many CPUs.
      auto* copy = reinterpret_cast<float*>(out);
      for (size_t i = HWY_DYNAMIC_DISPATCH(copy_f32)(values, n, copy); i < n; ++i) copy[i] = values[i];
      return;
    }
    case DType::bf16: {
      auto* bits = reinterpret_cast<uint16_t*>(out);
      for (size_t i = HWY_DYNAMIC_DISPATCH(bf16_from_f32)(values, n, bits); i < n; ++i)
        bits[i] = f32_to_bf16(values[i]);
      return;
    }
    case DType::f16: {
      auto* bits = reinterpret_cast<uint16_t*>(out);
      for (size_t i = HWY_DYNAMIC_DISPATCH(f16_from_f32)(values, n, bits); i < n; ++i)
        bits[i] = f32_to_f16(values[i]);
      return;
    }
    case DType::f8e4m3: break;
  }
  refuse(type);
}

void publish_rows() {
  hwy::FlushStream();
}

void load_rows(const std::byte* data, size_t n, DType type, float* out) {
  switch (type) {
    case DType::f32: std::memcpy(out, data, n * sizeof(float)); return;
    case DType::bf16: {
      const auto* bits = reinterpret_cast<const uint16_t*>(data);
      for (size_t i = 0; i < n; ++i) out[i] = bf16_to_f32(bits[i]);
      return;
    }
    case DType::f16: {
      const auto* bits = reinterpret_cast<const uint16_t*>(data);
      for (size_t i = HWY_DYNAMIC_DISPATCH(f32_from_f16)(bits, n, out); i < n; ++i)
        out[i] = f16_to_f32(bits[i]);
      return;
    }
    case DType::f8e4m3: break;
  }
  refuse(type);
}

}  // namespace kvlapse
#endif  // HWY_ONCE
