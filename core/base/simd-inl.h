// Highway building blocks of the fixed summation order: 16 virtual lanes held in one or two vectors, and exp.
// For inclusion in foreach_target translation units only, inside KVLAPSE_SIMD. Re-included once per target.
#if defined(KVLAPSE_CORE_BASE_SIMD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef KVLAPSE_CORE_BASE_SIMD_INL_H_
#undef KVLAPSE_CORE_BASE_SIMD_INL_H_
#else
#define KVLAPSE_CORE_BASE_SIMD_INL_H_
#endif

#include <hwy/cache_control.h>
#include <hwy/highway.h>

#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/base/dtype.h"
#include "core/base/vector_math.h"

// Targets with 8 or 16 fp32 lanes and fused multiply-add; all others run the scalar definition.
#undef KVLAPSE_SIMD
#define KVLAPSE_SIMD (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2)  // better targets have lower numbers

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

#if KVLAPSE_SIMD

inline constexpr size_t kVirtualLanes = 16;
using Tag = hn::CappedTag<float, 16>;
using Tag8 = hn::CappedTag<float, 8>;
using Vec = hn::Vec<Tag>;
using Vec8 = hn::Vec<Tag8>;
inline constexpr size_t kLanes = hn::MaxLanes(Tag());
inline constexpr size_t kVecs = kVirtualLanes / kLanes;

HWY_INLINE Vec load(const float* p) {
  return hn::LoadU(Tag(), p);
}
HWY_INLINE Vec load(const hwy::float16_t* p) {
  return hn::PromoteTo(Tag(), hn::LoadU(hn::Rebind<hwy::float16_t, Tag>(), p));
}
HWY_INLINE Vec load(const hwy::bfloat16_t* p) {
  return hn::PromoteTo(Tag(), hn::LoadU(hn::Rebind<hwy::bfloat16_t, Tag>(), p));
}

// Widens one number exactly.
HWY_INLINE float widen(float v) {
  return v;
}
HWY_INLINE float widen(hwy::float16_t v) {
  return f16_to_f32(std::bit_cast<uint16_t>(v));
}
HWY_INLINE float widen(hwy::bfloat16_t v) {
  return bf16_to_f32(std::bit_cast<uint16_t>(v));
}

// Matrix rows lie one behind the other, but a group of them is read side by side, in streams too short for
// the hardware to follow: the bytes that come next are asked for this far ahead.
inline constexpr size_t kPrefetchBytes = 4096;
template <typename T>
HWY_INLINE void prefetch_ahead(const T* p) {
  hwy::Prefetch(reinterpret_cast<const std::byte*>(p) + kPrefetchBytes);
}

// Lane l += lane l + 8.
HWY_INLINE Vec8 fold(const Vec (&acc)[kVecs]) {
#if HWY_TARGET == HWY_AVX2
  return hn::Add(acc[0], acc[1]);
#else
  return hn::Add(hn::LowerHalf(Tag8(), acc[0]), hn::UpperHalf(Tag8(), acc[0]));
#endif
}

// The rest of the tree for one folded sum.
HWY_INLINE float tree(Vec8 folded) {
  HWY_ALIGN float l[8];
  hn::Store(folded, Tag8(), l);
  return ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
}

// The rest of the tree for eight folded sums at once: lane i is tree(v[i]).
HWY_INLINE Vec8 tree8(const Vec8 (&v)[8]) {
  const Tag8 d;
  const hn::Repartition<uint64_t, Tag8> d64;
  Vec8 four[4];  // [v_i lanes l + (l + 4) | v_{i+4} likewise]
  for (int i = 0; i < 4; ++i)
    four[i] = hn::Add(hn::ConcatLowerLower(d, v[i + 4], v[i]), hn::ConcatUpperUpper(d, v[i + 4], v[i]));
  auto pair = [&](Vec8 a, Vec8 b) HWY_ATTR {  // in each half: [a0+a2, a1+a3, b0+b2, b1+b3]
    auto a64 = hn::BitCast(d64, a), b64 = hn::BitCast(d64, b);
    return hn::Add(hn::BitCast(d, hn::InterleaveLower(d64, a64, b64)),
                   hn::BitCast(d, hn::InterleaveUpper(d64, a64, b64)));
  };
  const Vec8 even = pair(four[0], four[2]), odd = pair(four[1], four[3]);
  return hn::Add(hn::OddEven(hn::DupEven(odd), even), hn::OddEven(odd, hn::DupOdd(even)));
}

// The parts of scalar::exp_one and scalar::exp_over_one, in every lane.
HWY_INLINE Vec exp_integer(Vec x) {
  return hn::Round(hn::Mul(x, hn::Set(Tag(), kLog2e)));
}
HWY_INLINE Vec exp_rest(Vec x, Vec n) {
  const Tag d;
  return hn::MulAdd(n, hn::Set(d, 2.12194440e-4f), hn::MulAdd(n, hn::Set(d, -0.693359375f), x));
}
HWY_INLINE Vec exp_of_rest(Vec r) {
  const Tag d;
  Vec p = hn::Set(d, 1.9875691500e-4f);
  p = hn::MulAdd(p, r, hn::Set(d, 1.3981999507e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 8.3334519073e-3f));
  p = hn::MulAdd(p, r, hn::Set(d, 4.1665795894e-2f));
  p = hn::MulAdd(p, r, hn::Set(d, 1.6666665459e-1f));
  p = hn::MulAdd(p, r, hn::Set(d, 5.0000001201e-1f));
  return hn::Add(hn::MulAdd(p, hn::Mul(r, r), r), hn::Set(d, 1.0f));
}
HWY_INLINE Vec power_of_two(Vec n) {
  const hn::RebindToSigned<Tag> di;
  return hn::BitCast(Tag(), hn::ShiftLeft<23>(hn::Add(hn::ConvertTo(di, n), hn::Set(di, 127))));
}

// scalar::exp_one in every lane.
HWY_INLINE Vec exp(Vec x) {
  const Tag d;
  const Vec n = exp_integer(x);
  Vec value = hn::Mul(exp_of_rest(exp_rest(x, n)), power_of_two(n));
  value = hn::IfThenElse(hn::Gt(x, hn::Set(d, 88.37f)), hn::Set(d, std::numeric_limits<float>::infinity()),
                         value);
  value = hn::IfThenElseZero(hn::Gt(x, hn::Set(d, -87.3f)), value);
  return hn::IfThenElse(hn::IsNaN(x), x, value);
}
// scalar::exp_over_one in every lane.
HWY_INLINE Vec exp_over(Vec x, Vec base) {
  const Tag d;
  const Vec n = exp_integer(x), power = hn::Sub(n, base);
  const Vec rest = hn::Min(hn::Max(exp_rest(x, n), hn::Set(d, -1.0f)), hn::Set(d, 1.0f));
  const Vec value =
      hn::IfThenElseZero(hn::Ge(power, hn::Set(d, -126.0f)), hn::Mul(exp_of_rest(rest), power_of_two(power)));
  const Vec bad = hn::Set(d, std::numeric_limits<float>::quiet_NaN());
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, std::numeric_limits<float>::infinity())), value, bad);
}

#endif  // KVLAPSE_SIMD

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // include guard, toggled per target
