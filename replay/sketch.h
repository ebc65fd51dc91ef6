// Sketch: a histogram of positive numbers with 32 bins an octave (relative width about 2 %), for quantiles
// that can be merged over heads, layers and sequences. Counts are integers, so a merge does not depend on its
// order.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "core/base/sketch_bins.h"

namespace kvlapse {

class Sketch {
 public:
  void add(float value) {
    const int bin = bin_of(value);
    const auto i = static_cast<size_t>(bin - first_);
    ++(bin >= first_ && i < bins_.size() && bin > 0 ? bins_[i] : at(bin));
    ++count_;
  }
  // counts[bin] numbers of each bin of core/base/sketch_bins.h.
  void add(std::span<const uint32_t> counts);
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
  static constexpr int kPerOctave = sketch_bins::kPerOctave, kMinExponent = sketch_bins::kMinExponent,
                       kBins = sketch_bins::kBins;
  static int bin_of(float value) { return sketch_bins::bin_of(value); }
  static double middle(int bin);
  uint32_t& at(int bin);
  uint32_t zeros_ = 0;          // bin 0
  int first_ = 0;               // bin of bins_[0]
  std::vector<uint32_t> bins_;  // only the range that is occupied, in steps of an octave
  int64_t count_ = 0;
};

}  // namespace kvlapse
