// The knee of a trade-off curve: the point furthest from the chord between its ends, on both axes scaled to
// 0..1 (Satopaa et al. 2011, "Finding a Kneedle in a Haystack", without its smoothing). Beyond it a larger
// footprint buys little. Pure function.
#pragma once

#include <span>
#include <vector>

namespace kvlapse {

// xs ascending. Index into xs, -1: fewer than three points, no spread, or no point that beats the chord by
// 0.02.
int find_knee(std::span<const double> xs, std::span<const double> ys, bool higher_is_better);

// The Pareto front: points that no other one beats or equals on both axes while being better on one. Indices
// in order of x; of equal points the first. NaN points are on no front.
std::vector<int> find_front(std::span<const double> xs, std::span<const double> ys, bool higher_is_better);

}  // namespace kvlapse
