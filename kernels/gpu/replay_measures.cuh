// What full attention says of a row, what the held tokens keep of it, and the sums at the end.
#pragma once

#include "kernels/gpu/replay_common.cuh"

namespace kvlapse::gpu_replay {

// ---- rows ----
// The sum over all threads of a row of [threads], in a fixed order; the same for every lane of the warp.
KVLAPSE_DEVICE float warp_sum_of(const float* values, int n) {
  float sum = 0;
  for (int i = thread_index() % 32; i < n; i += 32) sum += values[i];
  KVLAPSE_UNROLL
  for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
  return sum;
}

template <int kLanes>
KVLAPSE_DEVICE void run(const RowsArgs& a, int block, unsigned char* memory) {
  constexpr int kThreads = RowsArgs::kThreads, kList = RowsArgs::kList, kShare = kThreads / 32;
  const Shape& shape = a.shape;
  const int group = shape.group(), thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int s = block / shape.n_kv, h = block % shape.n_kv, t = a.t0 + s, n = t + 1;
  const bool measured = a.facts != nullptr && t >= a.begin;
  float* row = a.weights + shape.row(s, h);
  float* peaks = reinterpret_cast<float*>(memory);  // [lanes][threads]
  float* totals = peaks + kLanes * kThreads;
  float* products = totals + kLanes * kThreads;
  float* outsides = products + kLanes * kThreads;
  float* list = outsides + kLanes * kThreads;  // [group][kList]
  auto* list_pos = reinterpret_cast<int32_t*>(list + kMaxGroup * kList);
  auto* listed = reinterpret_cast<uint32_t*>(list_pos + kMaxGroup * kList);  // [group]
  float* bases = reinterpret_cast<float*>(listed + kMaxGroup);  // [3][group]: base, threshold, total
  float *thresholds = bases + kMaxGroup, *sums = thresholds + kMaxGroup;

  float peak[kLanes];
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) peak[g] = -infinity();
  KVLAPSE_UNROLL_8
  for (int i = thread; i < n; i += kThreads) {
    const Weights<kLanes> x = Weights<kLanes>::load(row + static_cast<int64_t>(i) * kLanes);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) peak[g] = fmaxf(peak[g], x.v[g]);
  }
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) peaks[g * kThreads + thread] = peak[g];
  if (thread < kMaxGroup) listed[thread] = 0;
  block_sync();
  if (warp < group) {
    uint32_t own[kShare];
    uint32_t best = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kShare; ++i) {
      own[i] = ordered(peaks[warp * kThreads + lane + 32 * i] + 0.0f);
      best = own[i] > best ? own[i] : best;
    }
    const float highest = unordered(warp_largest(best));
    const float base = row_base(highest);
    // The tenth of the threads' maxima is exceeded by ten tokens at least.
    uint32_t threshold = 0;
    KVLAPSE_NO_UNROLL
    for (int k = 0; measured && k < kTop; ++k) {
      threshold = warp_largest(best);
      const uint32_t who = warp_ballot(best == threshold);
      if (device::bits_below(who, lane) == 0 && best == threshold) {
        bool removed = false;
        best = 0;
        KVLAPSE_UNROLL
        for (int i = 0; i < kShare; ++i) {
          if (!removed && own[i] == threshold)
            own[i] = 0, removed = true;
          else
            best = own[i] > best ? own[i] : best;
        }
      }
    }
    if (lane == 0) {
      bases[warp] = base;
      thresholds[warp] = threshold == 0 ? 0.0f : device::exp_over(unordered(threshold), base);
      if (!(fabsf(highest) < infinity())) *a.failed = t + 1;
    }
  }
  block_sync();

  // Sums of exponentials e, of e times the logit less the base's, and of e behind the sinks.
  float total[kLanes] = {}, product[kLanes] = {}, outside[kLanes] = {}, base[kLanes] = {},
        threshold[kLanes] = {};
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g)
    if (g < group) base[g] = bases[g], threshold[g] = thresholds[g];
  KVLAPSE_UNROLL_2
  for (int i = thread; i < n; i += kThreads) {
    float* at = row + static_cast<int64_t>(i) * kLanes;
    Weights<kLanes> x = Weights<kLanes>::load(at);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      if (g >= group) continue;
      const float e = device::exp_over(x.v[g], base[g]);
      total[g] += e;
      product[g] = fmaf(e, fmaf(base[g] + kRowHeadBits, -kLog2, x.v[g]), product[g]);
      outside[g] += i >= kSinks ? e : 0.0f;
      if (measured && e >= threshold[g]) {
        const uint32_t place = device::shared_append(listed + g);
        if (place < kList) list[g * kList + place] = e, list_pos[g * kList + place] = i;
      }
      x.v[g] = e;
    }
    x.store(at);
    if (!measured) continue;
    auto* half = reinterpret_cast<uint64_t*>(a.half + shape.row(s, h) + static_cast<int64_t>(i) * kLanes);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; g += 4) {
      constexpr float kScale = kHalfScale / kRowHead;
      const uint64_t low = device::pack2<device::F16>(x.v[g] * kScale, x.v[g + 1] * kScale),
                     high = device::pack2<device::F16>(x.v[g + 2] * kScale, x.v[g + 3] * kScale);
      half[g / 4] = low | high << 32;
    }
  }
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) {
    totals[g * kThreads + thread] = total[g];
    products[g * kThreads + thread] = product[g];
    outsides[g * kThreads + thread] = outside[g];
  }
  block_sync();
  if (warp < group) {
    const float sum = warp_sum_of(totals + warp * kThreads, kThreads);
    if (lane == 0) {
      sums[warp] = sum;
      if (!(sum > 0)) *a.failed = t + 1;
    }
  }
  if (!measured) return;
  block_sync();

  // A thread without a large weight of its own has no token that is attended.
  bool any_hot = false;
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g)
    if (g < group) any_hot |= device::exp_over(peak[g], base[g]) > kHot * sums[g];
  for (int i = thread; any_hot && i < n; i += kThreads) {
    const Weights<kLanes> e = Weights<kLanes>::load(row + static_cast<int64_t>(i) * kLanes);
    bool hot = false;
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g)
      if (g < group) hot |= e.v[g] > kHot * sums[g];
    if (hot) device::global_max(a.last_hot + static_cast<int64_t>(h) * shape.n_tokens + i, t);
  }
  if (warp < group) {
    RowFacts& out = a.facts[static_cast<int64_t>(s) * shape.n_q + h * group + warp];
    const int wanted = least(n, kTop), found = static_cast<int>(listed[warp]);
    if (found <= kList) {
      for (int i = lane; i < found; i += 32) {
        const float e = list[warp * kList + i];
        const int pos = list_pos[warp * kList + i];
        int rank = 0;
        for (int k = 0; k < found; ++k) {
          const float other = list[warp * kList + k];
          rank += other > e || (other == e && list_pos[warp * kList + k] < pos);
        }
        if (rank < wanted) out.top[rank] = pos;
      }
    } else {  // many are equal: one after the other
      float above = infinity();
      int behind = -1;
      for (int k = 0; k < wanted; ++k) {
        float value = -1;
        int pos = n;
        for (int i = lane; i < n; i += 32) {
          const float p = row[static_cast<int64_t>(i) * kLanes + warp];
          if (p > above || (p == above && i <= behind) || p <= value) continue;
          value = p, pos = i;
        }
        const uint32_t key = warp_largest(ordered(value));
        const uint32_t nearest = ~warp_largest(ordered(value) == key ? ~static_cast<uint32_t>(pos) : 0u);
        above = unordered(key), behind = static_cast<int>(nearest);
        if (lane == 0) out.top[k] = behind;
      }
    }
    const float inverse = 1.0f / sums[warp], dot = warp_sum_of(products + warp * kThreads, kThreads),
                behind = warp_sum_of(outsides + warp * kThreads, kThreads);
    if (lane == 0) {
      out.inverse = inverse, out.outside = behind * inverse, out.n_top = wanted;
      a.entropy[static_cast<int64_t>(t) * shape.n_q + h * group + warp] =
          logf(sums[warp] / kRowHead) - dot * inverse;
    }
    // Cosine with the query of the step before.
    const float* q = a.q + (static_cast<int64_t>(s) * shape.n_q + h * group + warp) * shape.dim;
    const float* before = s > 0      ? q - static_cast<int64_t>(shape.n_q) * shape.dim
                          : a.before ? a.before + static_cast<int64_t>(h * group + warp) * shape.dim
                                     : nullptr;
    float cosine = 1;
    if (before) {
      float ab = 0, aa = 0, bb = 0;
      for (int d = lane; d < shape.dim; d += 32) {
        ab = fmaf(q[d], before[d], ab);
        aa = fmaf(q[d], q[d], aa);
        bb = fmaf(before[d], before[d], bb);
      }
      KVLAPSE_UNROLL
      for (int mask = 16; mask > 0; mask /= 2)
        ab += shuffle_xor(ab, mask), aa += shuffle_xor(aa, mask), bb += shuffle_xor(bb, mask);
      const float norms = device::square_root(aa * bb);
      cosine = norms > 0 ? ab / norms : 0.0f;
    }
    if (lane == 0) a.query_cosine[static_cast<int64_t>(t) * shape.n_q + h * group + warp] = cosine;
  }
  if (warp == 0) {
    float older = 0;
    for (int g = 0; g < group; ++g) {
      float newest = t - lane >= 0 ? row[static_cast<int64_t>(t - lane) * kLanes + g] / sums[g] : 0.0f;
      KVLAPSE_UNROLL
      for (int shift = 1; shift < 32; shift *= 2) {
        const float other = shuffle_from(newest, lane >= shift ? lane - shift : lane);
        if (lane >= shift) newest += other;
      }
      older += newest < 1.0f ? 1.0f - newest : 0.0f;
    }
    a.older[(static_cast<int64_t>(t) * shape.n_kv + h) * kHorizon + lane] = older;
  }
}

// ---- masses ----
// A lane is a configuration, a warp one step. The next tile is on its way in registers while one is summed.
template <int kLanes>
KVLAPSE_DEVICE void run(const MassesArgs& a, int block, unsigned char* memory) {
  constexpr int kSteps = MassesArgs::kSteps, kTokens = MassesArgs::kTokens, kConfigs = MassesArgs::kConfigs,
                kThreads = MassesArgs::kThreads, kOwnWeights = kSteps * kTokens / kThreads,
                kOwnLast = kConfigs * kTokens / kThreads;
  static_assert(kConfigs == 32 && kSteps == kThreads / 32 && kTokens % 32 == 0);
  const Shape& shape = a.shape;
  const int group = shape.group(), thread = thread_index(), warp = thread / 32, lane = thread % 32;
  const int h = block % shape.n_kv, config_tile = block / shape.n_kv % a.config_tiles(),
            step_tile = block / shape.n_kv / a.config_tiles();
  const int first = a.t0 + step_tile * kSteps, end = least(a.t1, first + kSteps), t = first + warp;
  if (end <= a.begin) return;
  float* weights = reinterpret_cast<float*>(memory);                             // [steps][tokens][lanes]
  auto* last = reinterpret_cast<int32_t*>(weights + kSteps * kTokens * kLanes);  // [tokens][configs + 1]
  const int config = config_tile * kConfigs + lane;
  Weights<kLanes> next[kOwnWeights];
  int next_last[kOwnLast];
  // A thread's share: one token of every kApart-th step, and of every kApart-th configuration.
  constexpr int kApart = kThreads / kTokens;
  const int own_token = thread % kTokens, own = thread / kTokens;
  const float* from = a.weights + shape.row(first + own - a.t0, h) + static_cast<int64_t>(own_token) * kLanes;
  const int64_t step_floats = kApart * shape.row(1, 0),
                config_tokens = static_cast<int64_t>(kApart) * shape.n_kv * shape.n_tokens;
  const int n_own = most(0, (a.n_configs - config_tile * kConfigs - own + kApart - 1) / kApart);
  const int32_t* from_last =
      a.last + (static_cast<int64_t>(config_tile * kConfigs + own) * shape.n_kv + h) * shape.n_tokens +
      own_token;
  const auto fetch = [&](int token) {
    const int pos = token + own_token;
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) {
      const int at = first + own + k * kApart;
      next[k] = {};
      if (pos <= at && at < end)
        next[k] = Weights<kLanes>::load(from + k * step_floats + static_cast<int64_t>(token) * kLanes);
    }
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnLast; ++k)
      next_last[k] = k < n_own && pos < shape.n_tokens ? from_last[k * config_tokens + token] : kHeld;
  };
  float rest[kLanes] = {}, sinks[kLanes] = {};
  fetch(0);
  for (int token = 0; token < end; token += kTokens) {
    block_sync();
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) next[k].store(weights + (thread + k * kThreads) * kLanes);
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnLast; ++k) {
      const int i = thread + k * kThreads;
      last[i % kTokens * (kConfigs + 1) + i / kTokens] = next_last[k];
    }
    block_sync();
    if (token + kTokens < end) fetch(token + kTokens);
    float part[kLanes] = {};
    KVLAPSE_UNROLL_8
    for (int i = 0; i < kTokens; ++i) {
      const Weights<kLanes> w = Weights<kLanes>::load(weights + (warp * kTokens + i) * kLanes);
      const bool gone = last[i * (kConfigs + 1) + lane] < t;
      KVLAPSE_UNROLL
      for (int g = 0; g < kLanes; ++g) part[g] += gone ? w.v[g] : 0.0f;
    }
    if (token == 0) {
      KVLAPSE_UNROLL
      for (int g = 0; g < kLanes; ++g) part[g] = 0;
      KVLAPSE_NO_UNROLL
      for (int i = 0; i < kTokens; ++i) {
        const bool gone = last[i * (kConfigs + 1) + lane] < t;
        const float* w = weights + (warp * kTokens + i) * kLanes;
        KVLAPSE_UNROLL
        for (int g = 0; g < kLanes; ++g) {
          const float dropped = gone ? w[g] : 0.0f;
          if (i < kSinks)
            sinks[g] += dropped;
          else
            part[g] += dropped;
        }
      }
    }
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) rest[g] += part[g];
  }
  if (config >= a.n_configs || t >= end || t < a.begin) return;
  const int32_t* own_last = a.last + (static_cast<int64_t>(config) * shape.n_kv + h) * shape.n_tokens;
  const int64_t plane = static_cast<int64_t>(a.n_configs) * shape.n_q * shape.n_tokens;
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g) {
    if (g >= group) continue;
    const RowFacts& facts = a.facts[static_cast<int64_t>(t - a.t0) * shape.n_q + h * group + g];
    const float other = rest[g] * facts.inverse, missing = other + sinks[g] * facts.inverse,
                outside = facts.outside;
    const float share = outside > 1e-6f ? other / outside : 0.0f;
    int held = 0;
    KVLAPSE_NO_UNROLL
    for (int i = 0; i < facts.n_top; ++i) held += own_last[facts.top[i]] >= t;
    float* to = a.metrics + (static_cast<int64_t>(config) * shape.n_q + h * group + g) * shape.n_tokens + t;
    to[kMissing * plane] = missing < 1.0f ? missing : 1.0f;
    to[kMissingRest * plane] = share < 1.0f ? share : 1.0f;
    to[kTopHeld * plane] = static_cast<float>(held) / static_cast<float>(facts.n_top);
  }
}

// ---- values ----
KVLAPSE_DEVICE void run(const ValuesArgs& a, int block, unsigned char*) {
  const int i = block * ValuesArgs::kThreads + thread_index(), dim = a.shape.dim;
  if (i >= (a.t1 - a.t0) * a.shape.n_kv) return;
  const int t = a.t0 + i / a.shape.n_kv, h = i % a.shape.n_kv;
  const float* v = a.v + (static_cast<int64_t>(t) * a.shape.n_kv + h) * dim;
  const int64_t at = static_cast<int64_t>(h) * a.shape.n_tokens + t;
  uint16_t* half = a.half + at * a.shape.dim_padded();
  for (int d = dim; d < a.shape.dim_padded(); ++d) half[d] = 0;
  float lanes[kSumLanes] = {};
  for (int d = 0; d < dim; d += kSumLanes) {
    KVLAPSE_UNROLL
    for (int l = 0; l < kSumLanes; ++l) {
      if (d + l >= dim) continue;
      const float x = v[d + l], size = fabsf(x);
      lanes[l] += size;
      if (!(size <= kLargestHalf)) *a.beyond = t + 1;
      half[d + l] = device::float_to_half(x);
    }
  }
  KVLAPSE_UNROLL
  for (int w = kSumLanes / 2; w > 0; w /= 2) {
    KVLAPSE_UNROLL
    for (int l = 0; l < w; ++l) lanes[l] += lanes[l + w];
  }
  a.l1[at] = lanes[0];
}

// ---- future ----
KVLAPSE_DEVICE void run(const FutureArgs& a, int block, unsigned char*) {
  const Shape& shape = a.shape;
  const int pos = block % a.token_blocks() * FutureArgs::kThreads + thread_index();
  const int64_t row = block / a.token_blocks();  // config, kv head
  if (pos >= a.t1) return;
  const int32_t last = a.last[row * shape.n_tokens + pos];
  if (last < a.scope_begin || last >= a.t1 - 1) return;
  const int from = most(most(a.t0, a.begin), last + 1), to = least(a.t1, last + kHorizon + 1);
  if (from >= to) return;
  const int lanes = shape.lanes(), group = shape.group(), h = static_cast<int>(row % shape.n_kv);
  float sum = 0;
  for (int t = from; t < to; ++t) {
    const float* w = a.weights + shape.row(t - a.t0, h) + static_cast<int64_t>(pos) * lanes;
    const RowFacts* facts = a.facts + static_cast<int64_t>(t - a.t0) * shape.n_q + h * group;
    for (int g = 0; g < group; ++g) sum = fmaf(w[g], facts[g].inverse, sum);
  }
  a.future[row * shape.n_tokens + pos] += sum;
}

KVLAPSE_DEVICE void run(const SumFutureArgs& a, int block, unsigned char* memory) {
  auto* shared = reinterpret_cast<double*>(memory);
  const float* row = a.future + static_cast<int64_t>(block) * a.width;
  double sum = 0;
  for (int i = thread_index(); i < a.width; i += SumFutureArgs::kThreads) sum += static_cast<double>(row[i]);
  shared[thread_index()] = sum;
  block_sync();
  if (thread_index() != 0) return;
  for (int i = 1; i < SumFutureArgs::kThreads; ++i) sum += shared[i];
  a.sums[block] = sum;
}

// ---- close ----
KVLAPSE_DEVICE void run(const CloseArgs& a, int block, unsigned char* memory) {
  constexpr int kThreads = CloseArgs::kThreads, kBins = sketch_bins::kBins, kSums = 7;
  const Shape& shape = a.shape;
  auto* sums = reinterpret_cast<double*>(memory);  // [threads][kSums]
  auto* bins = reinterpret_cast<uint32_t*>(sums + kThreads * kSums);
  const int thread = thread_index();
  const int64_t head = block, plane = static_cast<int64_t>(a.n_configs) * shape.n_q * shape.n_tokens;
  for (int i = thread; i < 4 * kBins; i += kThreads) bins[i] = 0;
  block_sync();
  double own[kSums] = {};
  for (int b = thread; b < a.n_series; b += kThreads) {
    const auto first =
                   static_cast<int>((static_cast<int64_t>(b) * shape.n_tokens + a.n_series - 1) / a.n_series),
               behind = static_cast<int>((static_cast<int64_t>(b + 1) * shape.n_tokens + a.n_series - 1) /
                                         a.n_series);
    const int from = most(first, a.begin), to = least(behind, a.end);
    double recall_sum = 0, error_sum = 0;
    for (int t = from; t < to; ++t) {
      const float* m = a.metrics + head * shape.n_tokens + t;
      const float missing = m[kMissing * plane], rest = m[kMissingRest * plane], error = m[kError * plane],
                  cosine = m[kCosine * plane];
      const double recall = 1.0 - static_cast<double>(missing);
      recall_sum += recall, error_sum += static_cast<double>(error);
      own[0] += recall < 0.9 ? 1 : 0;
      own[2] += 1.0 - static_cast<double>(rest);
      own[4] += static_cast<double>(cosine);
      own[5] += static_cast<double>(m[kTopHeld * plane]);
      own[6] += static_cast<double>(missing);
      const float sketched[4] = {missing, rest, error, cosine};
      KVLAPSE_UNROLL
      for (int k = 0; k < 4; ++k)
        device::shared_increment(
            bins + k * kBins +
            (sketched[k] > 0 ? sketch_bins::bin_of_bits(device::float_bits(sketched[k])) : 0));
    }
    own[1] += recall_sum, own[3] += error_sum;
    float* series = a.series + head * 2 * a.n_series + b;
    const double n = to - from;
    series[0] = to > from ? static_cast<float>(recall_sum / n) : device::bits_float(0x7fc00000u);
    series[a.n_series] = to > from ? static_cast<float>(error_sum / n) : device::bits_float(0x7fc00000u);
  }
  for (int k = 0; k < kSums; ++k) sums[thread * kSums + k] = own[k];
  block_sync();
  for (int i = thread; i < 4 * kBins; i += kThreads) a.sketches[head * 4 * kBins + i] = bins[i];
  if (thread != 0) return;
  for (int i = 1; i < kThreads; ++i) {
    for (int k = 0; k < kSums; ++k) own[k] += sums[i * kSums + k];
  }
  a.sums[head] = {static_cast<int64_t>(own[0]), own[1], own[2], own[3], own[4], own[5], own[6]};
}

}  // namespace kvlapse::gpu_replay
