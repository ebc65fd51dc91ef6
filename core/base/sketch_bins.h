// Bins of a sketch (replay/sketch.h), for whoever counts into one: 32 an octave, from 2^-40 to 2^24; bin 0
// holds what is smaller.
#pragma once

#include <bit>
#include <cstdint>

namespace kvlapse::sketch_bins {

inline constexpr int kPerOctave = 32, kMinExponent = -40, kMaxExponent = 24;
inline constexpr int kBins = (kMaxExponent - kMinExponent) * kPerOctave + 1;

constexpr int bin_of_bits(uint32_t bits) {  // of a positive float
  const int exponent = static_cast<int>(bits >> 23) - 127;
  if (exponent < kMinExponent) return 0;
  if (exponent >= kMaxExponent) return kBins - 1;
  return 1 + (exponent - kMinExponent) * kPerOctave + static_cast<int>((bits >> 18) & 31u);
}
constexpr int bin_of(float value) {
  return value > 0 ? bin_of_bits(std::bit_cast<uint32_t>(value)) : 0;
}

}  // namespace kvlapse::sketch_bins
