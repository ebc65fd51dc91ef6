#include "core/base/vector_math.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "core/base/scalar_math.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/base/vector_math.cpp"
#include <hwy/foreach_target.h>  // must come before highway.h
#include <hwy/highway.h>

#include "core/base/simd-inl.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {

#if KVLAPSE_SIMD

// Calls body(offset, lane vector, mask) over n elements; the mask is only partial in the last call.
template <typename Full, typename Tail>
HWY_INLINE void for_vectors(size_t n, const Full& full, const Tail& tail) {
  size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) full(i);
  if (i < n) tail(i, hn::FirstN(Tag(), n - i));
}

// The 16-lane sum of term(i) over i; `term` must give a vector from element i, `masked` one whose inactive
// lanes are ignored.
template <typename Step, typename Masked>
HWY_INLINE float lane_sum(size_t n, const Step& step, const Masked& masked) {
  Vec acc[kVecs];
  for (Vec& a : acc) a = hn::Zero(Tag());
  size_t i = 0;
  for (; i + kVirtualLanes <= n; i += kVirtualLanes)
    for (size_t v = 0; v < kVecs; ++v) acc[v] = step(acc[v], i + v * kLanes);
  for (size_t v = 0; v < kVecs && i < n; ++v, i += kLanes) {
    const auto mask = hn::FirstN(Tag(), n - i);
    acc[v] = hn::IfThenElse(mask, masked(acc[v], i, mask), acc[v]);
  }
  return tree(fold(acc));
}

float Dot(const float* a, const float* b, size_t n) {
  return lane_sum(
      n, [&](Vec acc, size_t i) HWY_ATTR { return hn::MulAdd(load(a + i), load(b + i), acc); },
      [&](Vec acc, size_t i, auto mask) HWY_ATTR {
        return hn::MulAdd(hn::MaskedLoad(mask, Tag(), a + i), hn::MaskedLoad(mask, Tag(), b + i), acc);
      });
}

float Sum(std::span<const float> values) {
  const float* p = values.data();
  return lane_sum(
      values.size(), [&](Vec acc, size_t i) HWY_ATTR { return hn::Add(acc, load(p + i)); },
      [&](Vec acc, size_t i, auto mask)
          HWY_ATTR { return hn::Add(acc, hn::MaskedLoad(mask, Tag(), p + i)); });
}

float L1Norm(std::span<const float> values) {
  const float* p = values.data();
  return lane_sum(
      values.size(), [&](Vec acc, size_t i) HWY_ATTR { return hn::Add(acc, hn::Abs(load(p + i))); },
      [&](Vec acc, size_t i, auto mask)
          HWY_ATTR { return hn::Add(acc, hn::Abs(hn::MaskedLoad(mask, Tag(), p + i))); });
}

float MaxValue(std::span<const float> values) {
  const float lowest = -std::numeric_limits<float>::infinity();
  const float* p = values.data();
  Vec most[4];  // independent chains hide the latency
  for (Vec& m : most) m = hn::Set(Tag(), lowest);
  size_t i = 0, n = values.size();
  // The second operand wins when one is NaN: NaN is skipped as std::max(most, v) does.
  for (; i + 4 * kLanes <= n; i += 4 * kLanes)
    for (size_t c = 0; c < 4; ++c) most[c] = hn::Max(load(p + i + c * kLanes), most[c]);
  float result =
      hn::GetLane(hn::MaxOfLanes(Tag(), hn::Max(hn::Max(most[0], most[1]), hn::Max(most[2], most[3]))));
  for (; i < n; ++i) result = std::max(result, p[i]);
  return result + 0.0f;
}

void ExpMinus(std::span<const float> values, float shift, std::span<float> out) {
  const Vec s = hn::Set(Tag(), shift);
  const float* in = values.data();
  float* to = out.data();
  for_vectors(
      values.size(), [&](size_t i) HWY_ATTR { hn::StoreU(exp(hn::Sub(load(in + i), s)), Tag(), to + i); },
      [&](size_t i, auto mask) HWY_ATTR {
        hn::BlendedStore(exp(hn::Sub(hn::MaskedLoad(mask, Tag(), in + i), s)), mask, Tag(), to + i);
      });
}

void ExpOver(std::span<const float> values, float base, std::span<float> out) {
  const Vec b = hn::Set(Tag(), base);
  const float* in = values.data();
  float* to = out.data();
  for_vectors(
      values.size(), [&](size_t i) HWY_ATTR { hn::StoreU(exp_over(load(in + i), b), Tag(), to + i); },
      [&](size_t i, auto mask) HWY_ATTR {
        hn::BlendedStore(exp_over(hn::MaskedLoad(mask, Tag(), in + i), b), mask, Tag(), to + i);
      });
}

void Scale(float factor, std::span<float> values) {
  const Vec f = hn::Set(Tag(), factor);
  float* p = values.data();
  for_vectors(
      values.size(), [&](size_t i) HWY_ATTR { hn::StoreU(hn::Mul(load(p + i), f), Tag(), p + i); },
      [&](size_t i, auto mask)
          HWY_ATTR { hn::BlendedStore(hn::Mul(hn::MaskedLoad(mask, Tag(), p + i), f), mask, Tag(), p + i); });
}

float Softmax(std::span<const float> logits, std::span<float> out) {
  const float most = MaxValue(logits);
  if (most == -std::numeric_limits<float>::infinity()) {
    std::fill(out.begin(), out.end(), 0.0f);
    return most;
  }
  const float own_base = softmax_base(most);
  const Vec base = hn::Set(Tag(), own_base);
  const float* in = logits.data();
  float* to = out.data();
  // exp_over and sum in one pass.
  const float total = lane_sum(
      logits.size(),
      [&](Vec acc, size_t i) HWY_ATTR {
        const Vec e = exp_over(load(in + i), base);
        hn::StoreU(e, Tag(), to + i);
        return hn::Add(acc, e);
      },
      [&](Vec acc, size_t i, auto mask) HWY_ATTR {
        const Vec e = exp_over(hn::MaskedLoad(mask, Tag(), in + i), base);
        hn::BlendedStore(e, mask, Tag(), to + i);
        return hn::Add(acc, e);
      });
  Scale(1.0f / total, out);
  return log_over(total, own_base);
}

void MultiplyAdd(std::span<const float> a, std::span<const float> b, std::span<float> out) {
  float* to = out.data();
  for_vectors(
      out.size(),
      [&](size_t i) HWY_ATTR {
        hn::StoreU(hn::MulAdd(load(a.data() + i), load(b.data() + i), load(to + i)), Tag(), to + i);
      },
      [&](size_t i, auto mask) HWY_ATTR {
        const Vec x = hn::MaskedLoad(mask, Tag(), a.data() + i),
                  y = hn::MaskedLoad(mask, Tag(), b.data() + i);
        hn::BlendedStore(hn::MulAdd(x, y, hn::MaskedLoad(mask, Tag(), to + i)), mask, Tag(), to + i);
      });
}

void AddScaled(float factor, std::span<const float> values, std::span<float> out) {
  const Vec f = hn::Set(Tag(), factor);
  const float* in = values.data();
  float* to = out.data();
  for_vectors(
      out.size(),
      [&](size_t i) HWY_ATTR { hn::StoreU(hn::MulAdd(f, load(in + i), load(to + i)), Tag(), to + i); },
      [&](size_t i, auto mask) HWY_ATTR {
        const Vec x = hn::MaskedLoad(mask, Tag(), in + i), y = hn::MaskedLoad(mask, Tag(), to + i);
        hn::BlendedStore(hn::MulAdd(f, x, y), mask, Tag(), to + i);
      });
}

#else

float Dot(const float* a, const float* b, size_t n) {
  return scalar::dot(a, b, n);
}
float Sum(std::span<const float> values) {
  return scalar::sum(values);
}
float L1Norm(std::span<const float> values) {
  return scalar::l1_norm(values);
}
float MaxValue(std::span<const float> values) {
  return scalar::max_value(values);
}
void ExpMinus(std::span<const float> values, float shift, std::span<float> out) {
  scalar::exp_minus(values, shift, out);
}
void ExpOver(std::span<const float> values, float base, std::span<float> out) {
  scalar::exp_over(values, base, out);
}
void Scale(float factor, std::span<float> values) {
  scalar::scale(factor, values);
}
float Softmax(std::span<const float> logits, std::span<float> out) {
  return scalar::softmax(logits, out);
}
void MultiplyAdd(std::span<const float> a, std::span<const float> b, std::span<float> out) {
  scalar::multiply_add(a, b, out);
}
void AddScaled(float factor, std::span<const float> values, std::span<float> out) {
  scalar::add_scaled(factor, values, out);
}

#endif

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(Dot);
HWY_EXPORT(Sum);
HWY_EXPORT(L1Norm);
HWY_EXPORT(MaxValue);
HWY_EXPORT(ExpMinus);
HWY_EXPORT(ExpOver);
HWY_EXPORT(Scale);
HWY_EXPORT(Softmax);
HWY_EXPORT(MultiplyAdd);
HWY_EXPORT(AddScaled);

float dot(const float* a, const float* b, size_t n) {
  return HWY_DYNAMIC_DISPATCH(Dot)(a, b, n);
}
float sum(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(Sum)(values);
}
float l1_norm(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(L1Norm)(values);
}
float max_value(std::span<const float> values) {
  return HWY_DYNAMIC_DISPATCH(MaxValue)(values);
}
void exp_minus(std::span<const float> values, float shift, std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(ExpMinus)(values, shift, out);
}
void exp_over(std::span<const float> values, float base, std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(ExpOver)(values, base, out);
}
float softmax_base(float most) {
  return std::nearbyint(most * kLog2e) - static_cast<float>(kHeadBits);
}
float log_over(float sum, float base) {
  return static_cast<float>(std::log(static_cast<double>(sum)) + std::numbers::ln2 * base);
}
void scale(float factor, std::span<float> values) {
  HWY_DYNAMIC_DISPATCH(Scale)(factor, values);
}
float softmax(std::span<const float> logits, std::span<float> out) {
  return HWY_DYNAMIC_DISPATCH(Softmax)(logits, out);
}
void multiply_add(std::span<const float> a, std::span<const float> b, std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(MultiplyAdd)(a, b, out);
}
void add_scaled(float factor, std::span<const float> values, std::span<float> out) {
  HWY_DYNAMIC_DISPATCH(AddScaled)(factor, values, out);
}

}  // namespace kvlapse
#endif  // HWY_ONCE
