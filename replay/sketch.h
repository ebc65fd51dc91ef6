// Sketch: a histogram of positive numbers with 32 bins an octave (relative width about 2 %), for quantiles
// that can be merged over heads, layers and sequences. Counts are integers, so a merge does not depend on its
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

namespace kvlapse {

class Sketch {
 public:
  void add(float value, int64_t count = 1);
  void merge(const Sketch& other);
  int64_t count() const { return count_; }
  // Value below which the share `q` of the numbers lies (the middle of its bin); 0 when empty or in the zero
  // bin.
  double quantile(double q) const;
  // Share of the numbers that exceed `value` (whole bins above value's own).
  double share_above(double value) const;
  // Occupied bins as bytes: pairs (bin, count) of little-endian uint32.
  std::vector<std::byte> bytes() const;
  static Sketch from_bytes(std::span<const std::byte> bytes);  // throws Error

 private:
  static constexpr int kPerOctave = 32, kMinExponent = -40, kMaxExponent = 24;
  static constexpr int kBins = (kMaxExponent - kMinExponent) * kPerOctave + 1;  // bin 0: below 2^kMinExponent
  static int bin_of(float value);
  static double middle(int bin);
  uint32_t& at(int bin);
  uint32_t zeros_ = 0;          // bin 0
  int first_ = 0;               // bin of bins_[0]
  std::vector<uint32_t> bins_;  // only the range that is occupied, in steps of an octave
  int64_t count_ = 0;
};

}  // namespace kvlapse
