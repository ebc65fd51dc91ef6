#include "trace/sketch.h"

#include <algorithm>
#include <functional>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "trace/sketch.cpp"
#include "hwy/foreach_target.h"
// After foreach_target: this header changes with the target.
#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"

#ifndef KVLAPSE_SKETCH_BLOCK
#define KVLAPSE_SKETCH_BLOCK
namespace kvlapse {
inline constexpr size_t kSketchBlock = 16;  // slots that share one maximum
}
#endif

HWY_BEFORE_NAMESPACE();
namespace kvlapse {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// mean[i] = mean over the group, zero from n to `padded`; block_max[b] = largest of each kSketchBlock. Returns the
// entropy. The sums' order depends on the vector width: a sketch is a summary, no decision is taken from it.
float reduce(const std::span<const float>* weights, size_t group, size_t n, float* mean, float* block_max) {
  const hn::CappedTag<float, kSketchBlock> d;
  const size_t lanes = hn::Lanes(d);
  const size_t padded = (n + kSketchBlock - 1) / kSketchBlock * kSketchBlock;
  const float scale = 1.0f / static_cast<float>(group);
  const size_t whole = n / lanes * lanes;
  for (size_t i = 0; i < whole; i += lanes) {
    auto total = hn::LoadU(d, weights[0].data() + i);
    for (size_t g = 1; g < group; ++g) total = hn::Add(total, hn::LoadU(d, weights[g].data() + i));
    hn::StoreU(hn::Mul(total, hn::Set(d, scale)), d, mean + i);
  }
  for (size_t i = whole; i < padded; ++i) {
    float total = 0;
    if (i < n)
      for (size_t g = 0; g < group; ++g) total += weights[g][i];
    mean[i] = total * scale;
  }
  const auto tiny = hn::Set(d, 1e-30f);
  auto entropy = hn::Zero(d);
  for (size_t b = 0; b * kSketchBlock < padded; ++b) {
    auto most = hn::Zero(d);
    for (size_t i = b * kSketchBlock; i < (b + 1) * kSketchBlock; i += lanes) {
      const auto p = hn::LoadU(d, mean + i);
      most = hn::Max(most, p);
      entropy = hn::NegMulAdd(p, hn::CallLog(d, hn::Max(p, tiny)), entropy);  // p log p -> 0 as p -> 0
    }
    block_max[b] = hn::GetLane(hn::MaxOfLanes(d, most));
  }
  return hn::GetLane(hn::SumOfLanes(d, entropy));
}

}  // namespace HWY_NAMESPACE
}  // namespace kvlapse
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {
namespace {
HWY_EXPORT(reduce);
}

void Sketcher::sketch(std::span<const std::span<const float>> weights, std::span<const Pos> positions, SketchRow& out) {
  const size_t n = positions.size(), n_blocks = (n + kSketchBlock - 1) / kSketchBlock;
  mean_.resize(n_blocks * kSketchBlock);
  block_max_.resize(n_blocks);
  out.pos.fill(-1);
  out.weight.fill(0.0f);
  out.entropy = n == 0 ? 0.0f : HWY_DYNAMIC_DISPATCH(reduce)(weights.data(), weights.size(), n, mean_.data(), block_max_.data());

  // At least kSketchTop values reach the kSketchTop-th largest block maximum, so nothing below it can be among the top.
  float floor = 0;
  if (n_blocks > kSketchTop) {
    ranking_ = block_max_;
    std::nth_element(ranking_.begin(), ranking_.begin() + kSketchTop - 1, ranking_.end(), std::greater<>());
    floor = ranking_[kSketchTop - 1];
  }
  candidates_.clear();
  for (size_t b = 0; b < n_blocks; ++b) {
    if (block_max_[b] < floor) continue;
    for (size_t i = b * kSketchBlock; i < std::min(n, (b + 1) * kSketchBlock); ++i)
      if (mean_[i] >= floor) candidates_.push_back(static_cast<int>(i));
  }
  auto ahead = [&](int a, int b) {
    return mean_[a] != mean_[b] ? mean_[a] > mean_[b] : positions[a] > positions[b];
  };
  const size_t top = std::min<size_t>(kSketchTop, candidates_.size());
  if (candidates_.size() > top)
    std::nth_element(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(top), candidates_.end(), ahead);
  std::sort(candidates_.begin(), candidates_.begin() + static_cast<ptrdiff_t>(top), ahead);
  for (size_t i = 0; i < top; ++i) {
    out.pos[i] = raw(positions[candidates_[i]]);
    out.weight[i] = mean_[candidates_[i]];
  }
}

}  // namespace kvlapse
#endif  // HWY_ONCE
