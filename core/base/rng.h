// Counter-based random numbers: a value is a pure function of its key, so the draws of a policy do not depend on
// call order, thread count or which heads are replayed. Finaliser: splitmix64 (Steele, Lea, Flood 2014), applied
// once per key word.
#pragma once

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
constexpr float unit_float(uint64_t bits) { return static_cast<float>(bits >> 40) * 0x1p-24f; }
// Uniform in [0, 1), 53 random bits.
constexpr double unit_double(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

}  // namespace kvlapse
