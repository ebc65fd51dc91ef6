// Confidence intervals by bootstrap, deterministic (seeded). Samples are traces or sequences; configurations
// that saw the same samples are compared pairwise, so that the samples' own spread cancels.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace kvlapse {

struct Interval {
  double mean = 0, low = 0, high = 0;
};

inline constexpr int kResamples = 2000;

// Percentile bootstrap of the mean. `block` > 1: resamples runs of that many neighbours (steps of one
// sequence are not independent). One sample: low = high = mean.
Interval bootstrap_mean(std::span<const double> samples, double confidence = 0.95, int block = 1,
                        uint64_t seed = 0);
// Of the mean of a - b over paired samples; the difference is real when 0 lies outside.
Interval bootstrap_difference(std::span<const double> a, std::span<const double> b, double confidence = 0.95);
// Wilson score interval of a proportion, 95 %.
Interval wilson(int64_t correct, int64_t n);

// Rank correlation with average ranks for ties; NaN below two samples or without variation.
double spearman(std::span<const float> a, std::span<const float> b);

}  // namespace kvlapse
