#include "core/policy/lowest.h"

#include <algorithm>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "core/policy/lowest.cpp"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>

HWY_BEFORE_NAMESPACE();
namespace kvlapse::HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// Minima do not depend on the order of comparison, so any vector width gives the same result.
Lowest FindLowest(const float* scores, const int32_t* positions, size_t n, int first_free, int last_free,
                  bool last) {
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  const auto infinity = hn::Set(d, std::numeric_limits<float>::infinity());
  const auto first = hn::Set(di, first_free), end = hn::Set(di, last_free);
  auto one = infinity, two = infinity;
  auto nan = hn::Zero(d);
  size_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto pos = hn::LoadU(di, positions + i);
    const auto held = hn::Or(hn::Lt(pos, first), hn::Gt(pos, end));
    const auto score = hn::IfThenElse(hn::RebindMask(d, held), infinity, hn::LoadU(d, scores + i));
    nan = hn::IfThenElse(hn::IsNaN(score), score, nan);
    two = hn::Min(two, hn::Max(one, score));
    one = hn::Min(one, score);
  }
  Lowest result;
  HWY_ALIGN float ones[HWY_MAX_BYTES / sizeof(float)], twos[HWY_MAX_BYTES / sizeof(float)];
  hn::Store(one, d, ones);
  hn::Store(two, d, twos);
  result.has_nan = !hn::AllFalse(d, hn::IsNaN(nan));
  result.score = result.next = std::numeric_limits<float>::infinity();
  auto add = [&](float value) {
    if (value < result.score) {
      result.next = result.score;
      result.score = value;
    } else if (value < result.next) {
      result.next = value;
    }
  };
  for (size_t l = 0; l < lanes; ++l) {
    add(ones[l]);
    add(twos[l]);
  }
  for (; i < n; ++i) {
    if (positions[i] < first_free || positions[i] > last_free) continue;
    result.has_nan |= scores[i] != scores[i];
    add(scores[i]);
  }
  auto is_lowest = [&](size_t s) {
    return scores[s] == result.score && positions[s] >= first_free && positions[s] <= last_free;
  };
  if (last) {
    for (size_t s = n; s-- > 0 && result.slot < 0;)
      if (is_lowest(s)) result.slot = static_cast<int>(s);
  } else {
    for (size_t s = 0; s < n && result.slot < 0; ++s)
      if (is_lowest(s)) result.slot = static_cast<int>(s);
  }
  return result;
}

}  // namespace kvlapse::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {

HWY_EXPORT(FindLowest);

Lowest find_lowest(std::span<const float> scores, std::span<const Pos> positions, int first_free,
                   int last_free, bool last_among_equals) {
  return HWY_DYNAMIC_DISPATCH(FindLowest)(scores.data(), reinterpret_cast<const int32_t*>(positions.data()),
                                          scores.size(), first_free, last_free, last_among_equals);
}

}  // namespace kvlapse
#endif
