#include "trace/views/recording_pair.h"

#include <algorithm>

namespace kvlapse {

TokenAlignment align_tokens(std::span<const int32_t> a, std::span<const int32_t> b) {
  TokenAlignment alignment{.n_a = static_cast<int>(a.size()), .n_b = static_cast<int>(b.size())};
  const auto [in_a, in_b] = std::ranges::mismatch(a, b);
  alignment.n_common = static_cast<int>(in_a - a.begin());
  if (in_a != a.end() && in_b != b.end()) alignment.first_divergence = alignment.n_common;
  return alignment;
}

KeepDifference compare_kept(std::span<const int32_t> a, std::span<const int32_t> b, int n_common, int step) {
  KeepDifference difference;
  const int end = std::min({n_common, step + 1, static_cast<int>(a.size()), static_cast<int>(b.size())});
  for (int pos = 0; pos < end; ++pos) {
    const bool in_a = a[pos] > step, in_b = b[pos] > step;
    ++(in_a ? in_b ? difference.both : difference.only_a : in_b ? difference.only_b : difference.neither);
  }
  return difference;
}

}  // namespace kvlapse
