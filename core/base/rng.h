// Counter-based random numbers: a value is a pure function of its key, so the draws of a policy do not depend
// on call order, thread count or which heads are replayed. Finaliser: splitmix64 (Steele, Lea, Flood 2014),
// applied once per key word.
#pragma once

#include <bit>
#include <cstdint>
#include <initializer_list>

namespace kvlapse {

constexpr uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

constexpr uint64_t counter_random(std::initializer_list<uint64_t> key) {
  uint64_t state = 0;
  for (uint64_t word : key) state = mix64(state ^ word);
  return state;
}

// Uniform in [0, 1), 24 random bits: exact in fp32.
constexpr float unit_float(uint64_t bits) {
  return static_cast<float>(bits >> 40) * 0x1p-24f;
}
// Uniform in [0, 1), 53 random bits.
constexpr double unit_double(uint64_t bits) {
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

// Natural logarithm of a positive finite double, in plain double arithmetic: the same bits whatever the C
// library. Relative error below 1e-12.
constexpr double fixed_log(double x) {
  constexpr double kLn2 = 0.693147180559945309417;
  uint64_t bits = std::bit_cast<uint64_t>(x);
  int exponent = static_cast<int>(bits >> 52) - 1023;
  double m = std::bit_cast<double>((bits & 0xfffffffffffffull) | 0x3ff0000000000000ull);
  if (m > 1.41421356237309504880) {
    m *= 0.5;
    ++exponent;
  }
  const double f = (m - 1) / (m + 1), f2 = f * f;
  double series = 0;
  for (int k = 19; k >= 1; k -= 2) series = series * f2 + 1.0 / k;
  return exponent * kLn2 + 2 * f * series;
}
// Standard Gumbel noise: argmax of log w + noise draws in proportion to w; the top k draw without
// replacement.
constexpr float gumbel(uint64_t bits) {
  const double u = (static_cast<double>(bits >> 12) + 0.5) * 0x1p-52;
  return static_cast<float>(-fixed_log(-fixed_log(u)));
}

}  // namespace kvlapse
