#include "trace/sketch.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "trace/sketch.cpp"
#include "hwy/foreach_target.h"
// After foreach_target: this header changes with the target.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace kvlapse {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// G heads of a group over whole vectors of slots: mean (+)= weight * scale; dots[g] = sum of weights[g] *
// logits[g].
template <int G>
void add_heads(const std::span<const float>* weights, const std::span<const float>* logits, size_t whole,
               float scale, bool first, float* mean, float* dots) {
  const hn::CappedTag<float, 8> d;
  using V = hn::VFromD<decltype(d)>;
  const size_t lanes = hn::Lanes(d);
  const V factor = hn::Set(d, scale);
  const float *p[G], *l[G];
  V sum[G];
  for (int g = 0; g < G; ++g) {
    p[g] = weights[g].data();
    l[g] = logits[g].data();
    sum[g] = hn::Zero(d);
  }
  for (size_t i = 0; i < whole; i += lanes) {
    V total = first ? hn::Zero(d) : hn::LoadU(d, mean + i);
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
      const V weight = hn::LoadU(d, p[g] + i);
      sum[g] = hn::MulAdd(weight, hn::LoadU(d, l[g] + i), sum[g]);
      total = hn::MulAdd(weight, factor, total);
    }
    hn::StoreU(total, d, mean + i);
  }
  for (int g = 0; g < G; ++g) dots[g] = hn::GetLane(hn::SumOfLanes(d, sum[g]));
}

// What attention left of a group: mean[i] = mean over its heads, zero from n to the end of the last block;
// block_max[b] = largest of each `block` slots, a multiple of 8; dots[g] = sum of weights[g] * logits[g].
void reduce(const std::span<const float>* weights, const std::span<const float>* logits, size_t group,
            size_t n, size_t block, float* mean, float* block_max, float* dots) {
  const hn::CappedTag<float, 8> d;
  const size_t lanes = hn::Lanes(d), whole = n / lanes * lanes, padded = (n + block - 1) / block * block;
  const float scale = 1.0f / static_cast<float>(group);
  std::fill(mean + whole, mean + padded, 0.0f);
  for (size_t g = 0; g < group;) {
    const size_t left = group - g;
    const auto add = left >= 4 ? add_heads<4> : left >= 2 ? add_heads<2> : add_heads<1>;
    add(weights + g, logits + g, whole, scale, g == 0, mean, dots + g);
    g += left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
  for (size_t g = 0; g < group; ++g)
    for (size_t i = whole; i < n; ++i) {
      dots[g] += weights[g][i] * logits[g][i];
      mean[i] += weights[g][i] * scale;
    }
  for (size_t begin = 0; begin < n; begin += block) {
    auto most = hn::Zero(d);
    for (size_t i = begin; i < begin + block; i += lanes) most = hn::Max(most, hn::LoadU(d, mean + i));
    block_max[begin / block] = hn::GetLane(hn::MaxOfLanes(d, most));
  }
}

// A bound that at least `least` and at most `enough` of the values reach, by halving the range of their bits;
// values are not negative, so they order like these. With equal values more than `enough` may reach it.
// `values` is padded with zeros to a multiple of 8. No branch depends on the order of the values: sorting
// would guess wrong at each.
float bound(const float* values, size_t n, size_t least, size_t enough) {
  const hn::CappedTag<float, 8> d;
  const hn::RebindToSigned<decltype(d)> di;
  const size_t lanes = hn::Lanes(d);
  uint32_t low = 0,
           high = 0x3f800001u;  // weights are at most about 1; all reach 0, none the bits behind 1 + epsilon
  size_t at_low = n;
  while (at_low > enough && high - low > 1) {
    const uint32_t middle = low + (high - low) / 2;
    const auto limit = hn::Set(di, static_cast<int32_t>(middle) - 1);
    auto below = hn::Zero(di);  // minus the number of values that reach
    for (size_t i = 0; i < n; i += lanes)
      below = hn::Add(below, hn::VecFromMask(di, hn::Gt(hn::BitCast(di, hn::LoadU(d, values + i)), limit)));
    const auto reach = static_cast<size_t>(-hn::GetLane(hn::SumOfLanes(di, below)));
    const bool keeps = reach >= least;
    low = keeps ? middle : low;
    at_low = keeps ? reach : at_low;
    high = keeps ? high : middle;
  }
  return std::bit_cast<float>(low);
}

}  // namespace HWY_NAMESPACE
}  // namespace kvlapse
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace kvlapse {
namespace {
constexpr size_t kMostBlocks = 256;

HWY_EXPORT(reduce);
HWY_EXPORT(bound);

// -sum p log p without a logarithm per slot: log p = logit - lse, and one slot tells lse.
float head_entropy(std::span<const float> weights, std::span<const float> logits, float dot, size_t slot) {
  if (!(weights[slot] > 1e-30f))
    slot = static_cast<size_t>(std::max_element(weights.begin(), weights.end()) - weights.begin());
  const float lse = logits[slot] - std::log(weights[slot]);
  return std::max(0.0f, lse - dot);
}

}  // namespace

void Sketcher::sketch(std::span<const std::span<const float>> weights,
                      std::span<const std::span<const float>> logits, std::span<const Pos> positions,
                      SketchRow& out) {
  const size_t n = positions.size(), group = weights.size();
  out.pos.fill(-1);
  out.weight.fill(0.0f);
  out.entropy = 0;
  if (n == 0) return;
  size_t block = 8;
  while (n > block * kMostBlocks) block *= 2;
  const size_t n_blocks = (n + block - 1) / block, padded = n_blocks * block + 8;
  if (mean_.size() < padded) {
    mean_.resize(padded);
    weights_.resize(padded);
    slots_.resize(padded);
  }
  block_max_.assign(n_blocks + 8, 0.0f);
  dots_.resize(group);
  HWY_DYNAMIC_DISPATCH(reduce)
  (weights.data(), logits.data(), group, n, block, mean_.data(), block_max_.data(), dots_.data());

  // At least kSketchTop weights reach a bound that as many blocks reach, so nothing below it is among the
  // top.
  float floor = 0;
  if (n_blocks > kSketchTop)
    floor = HWY_DYNAMIC_DISPATCH(bound)(block_max_.data(), n_blocks, kSketchTop, kSketchTop + 4);
  std::array<size_t, kMostBlocks + 1> reaching;
  size_t n_reaching = 0, found = 0;
  for (size_t b = 0; b < n_blocks; ++b) {
    reaching[n_reaching] = b * block;
    n_reaching += block_max_[b] >= floor;
  }
  for (size_t k = 0; k < n_reaching; ++k) {
    const size_t end = std::min(n, reaching[k] + block);
    for (size_t i = reaching[k]; i < end; ++i) {
      weights_[found] = mean_[i];
      slots_[found] = static_cast<int32_t>(i);
      found += mean_[i] >= floor;
    }
  }
  std::fill_n(weights_.begin() + static_cast<ptrdiff_t>(found), 8, 0.0f);
  const size_t top = std::min<size_t>(kSketchTop, found);
  const float least = found > top ? HWY_DYNAMIC_DISPATCH(bound)(weights_.data(), found, top, top) : 0;
  // Fewer than `top` exceed the bound unless exactly `top` reach it. No branch here depends on the weights
  // either.
  std::array<size_t, kSketchTop + 1> chosen;
  size_t taken = 0;
  for (size_t i = 0; i < found; ++i) {
    chosen[taken] = i;
    taken += weights_[i] > least;
  }
  for (size_t i = 0; i < found && taken < top; ++i)
    if (weights_[i] == least) chosen[taken++] = i;
  size_t largest = 0;
  for (size_t k = 0; k < taken; ++k) {
    const size_t i = chosen[k];
    out.pos[k] = raw(positions[slots_[i]]);
    out.weight[k] = weights_[i];
    largest = weights_[i] > weights_[largest] ? i : largest;
  }
  for (size_t g = 0; g < group; ++g)
    out.entropy += head_entropy(weights[g], logits[g], dots_[g], static_cast<size_t>(slots_[largest]));
  out.entropy /= static_cast<float>(group);
}

}  // namespace kvlapse
#endif  // HWY_ONCE
