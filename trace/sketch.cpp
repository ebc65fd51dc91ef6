#include "trace/sketch.h"

#include <algorithm>
#include <bit>
#include <functional>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "trace/sketch.cpp"
#include "hwy/foreach_target.h"
// After foreach_target: this header changes with the target.
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

// Natural logarithm of a positive normal number, relative error of p log p below 2e-6: m in [sqrt(1/2), sqrt(2)),
// log m = 2 atanh((m - 1) / (m + 1)), three terms of its series.
template <class D, class V = hn::Vec<D>>
V log_of(D d, V x) {
  const hn::RebindToSigned<D> di;
  const auto bits = hn::BitCast(di, x);
  const auto exponent = hn::ShiftRight<23>(hn::Sub(bits, hn::Set(di, 0x3f3504f3)));
  const auto m = hn::BitCast(d, hn::Sub(bits, hn::ShiftLeft<23>(exponent)));
  const auto one = hn::Set(d, 1.0f);
  const auto s = hn::Div(hn::Sub(m, one), hn::Add(m, one));
  const auto s2 = hn::Mul(s, s);
  const auto series = hn::MulAdd(hn::MulAdd(hn::Set(d, 0.4f), s2, hn::Set(d, 2.0f / 3.0f)), s2, hn::Set(d, 2.0f));
  return hn::MulAdd(hn::ConvertTo(d, exponent), hn::Set(d, 0.69314718f), hn::Mul(s, series));
}

// mean[i] = mean over the group, zero from n to the end of the last block; block_max[b] = largest of each
// kSketchBlock. Returns the entropy. The sums' order depends on the vector width: a sketch is a summary, no decision
// is taken from it.
float reduce(const std::span<const float>* weights, size_t group, size_t n, float* mean, float* block_max) {
  const hn::CappedTag<float, kSketchBlock> d;
  const size_t lanes = hn::Lanes(d);
  const float scale = 1.0f / static_cast<float>(group);
  const auto vector_scale = hn::Set(d, scale), tiny = hn::Set(d, 1e-30f);
  auto entropy = hn::Zero(d);
  for (size_t begin = 0; begin < n; begin += kSketchBlock) {
    const size_t end = begin + kSketchBlock;
    if (end <= n) {
      for (size_t i = begin; i < end; i += lanes) {
        auto total = hn::LoadU(d, weights[0].data() + i);
        for (size_t g = 1; g < group; ++g) total = hn::Add(total, hn::LoadU(d, weights[g].data() + i));
        hn::StoreU(hn::Mul(total, vector_scale), d, mean + i);
      }
    } else {
      for (size_t i = begin; i < end; ++i) {
        mean[i] = 0;
        for (size_t g = 0; g < group && i < n; ++g) mean[i] += weights[g][i] * scale;
      }
    }
    auto most = hn::Zero(d);
    for (size_t i = begin; i < end; i += lanes) {
      const auto p = hn::LoadU(d, mean + i);
      most = hn::Max(most, p);
      entropy = hn::NegMulAdd(p, log_of(d, hn::Max(p, tiny)), entropy);  // p log p -> 0 as p -> 0
    }
    block_max[begin / kSketchBlock] = hn::GetLane(hn::MaxOfLanes(d, most));
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
  // Weights are not negative, so they order like their bits; behind them the position orders equals.
  candidates_.clear();
  for (size_t b = 0; b < n_blocks; ++b) {
    if (block_max_[b] < floor) continue;
    for (size_t i = b * kSketchBlock; i < std::min(n, (b + 1) * kSketchBlock); ++i)
      if (mean_[i] >= floor)
        candidates_.push_back(uint64_t{std::bit_cast<uint32_t>(mean_[i])} << 32 | static_cast<uint32_t>(raw(positions[i])));
  }
  const auto top = static_cast<ptrdiff_t>(std::min<size_t>(kSketchTop, candidates_.size()));
  if (static_cast<ptrdiff_t>(candidates_.size()) > top)
    std::nth_element(candidates_.begin(), candidates_.begin() + top, candidates_.end(), std::greater<>());
  std::sort(candidates_.begin(), candidates_.begin() + top, std::greater<>());
  for (ptrdiff_t i = 0; i < top; ++i) {
    out.pos[i] = static_cast<int32_t>(candidates_[i] & 0xffffffffu);
    out.weight[i] = std::bit_cast<float>(static_cast<uint32_t>(candidates_[i] >> 32));
  }
}

}  // namespace kvlapse
#endif  // HWY_ONCE
