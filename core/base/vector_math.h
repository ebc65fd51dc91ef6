// The few vector operations whose order of summation is part of kvlapse's contract: live decode, replay and
// every CPU give the same bits. Sums run in 16 virtual lanes (element i in lane i % 16) with fused
// multiply-add, then a fixed tree: lane l += lane l + 8, then + 4, + 2, + 1. Element-wise operations are
// order-free. Thread-safe.
//
// Implemented with Highway for AVX2 and AVX-512, chosen at run time; other CPUs take the scalar definition in
// scalar_math.h, which the tests compare bit for bit.
#pragma once

#include <cstddef>
#include <span>

namespace kvlapse {

float dot(const float* a, const float* b, size_t n);
float sum(std::span<const float> values);
float l1_norm(std::span<const float> values);
float max_value(std::span<const float> values);  // -inf when empty; NaN is skipped; never -0

// exp with a fixed polynomial (fused multiply-add), relative error below 2e-7; exp(-inf) = 0. Arguments below
// -87.3 give 0, above 88.37 infinity.
void exp_minus(std::span<const float> values, float shift,
               std::span<float> out);  // out = exp(values - shift)
// Softmax is taken in powers of two: e^x = y 2^n, n the integer nearest to x / log 2, y of x alone. A row is
// stated over 2^base, and since another base only moves exponents, its weights are the same bits under every
// base: rows of the same logits share exponentials whatever their own largest is, where their sum is at least
// kLeastSharedSum (what is lost below 2^-126 is then no weight that a float could hold). Precision as above
// up to |x| = 65536.
inline constexpr float kLog2e = 1.44269504088896341f;
inline constexpr int kHeadBits = 32;  // exponentials stay below 2^(kHeadBits + 1), far from overflow
inline constexpr float kLeastSharedSum = 0x1p26f;
float softmax_base(float most);  // of a row with that largest value
// out = e^values / 2^base; below 2^-126 zero. Values: at most those that the base is for.
void exp_over(std::span<const float> values, float base, std::span<float> out);
float log_over(float sum, float base);  // log(sum 2^base)
// `out` may be `logits`. All -inf gives zeros. Returns log-sum-exp.
float softmax(std::span<const float> logits, std::span<float> out);

void multiply_add(std::span<const float> a, std::span<const float> b, std::span<float> out);  // out += a * b
void add_scaled(float scale, std::span<const float> values, std::span<float> out);  // out += scale * values
void scale(float factor, std::span<float> values);                                  // values *= factor

}  // namespace kvlapse
