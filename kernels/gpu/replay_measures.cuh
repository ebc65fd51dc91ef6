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
  float* totals = reinterpret_cast<float*>(memory);  // [lanes][threads]
  float* products = totals + kLanes * kThreads;
  float* outsides = products + kLanes * kThreads;
  float* list = outsides + kLanes * kThreads;  // [group][kList]
  auto* list_pos = reinterpret_cast<int32_t*>(list + kMaxGroup * kList);
  auto* listed = reinterpret_cast<uint32_t*>(list_pos + kMaxGroup * kList);  // [group]
  float* bases = reinterpret_cast<float*>(listed + kMaxGroup);  // [3][group]: base, threshold, total
  float *thresholds = bases + kMaxGroup, *sums = thresholds + kMaxGroup;

  if (thread < kMaxGroup) listed[thread] = 0;
  Weights<kLanes> next[2] = {};  // on their way
  KVLAPSE_UNROLL
  for (int k = 0; k < 2; ++k)
    if (thread + k * kThreads < n)
      next[k] = Weights<kLanes>::load(row + static_cast<int64_t>(thread + k * kThreads) * kLanes);
  if (warp < group) {
    // The largest logits of runs, dealt to kThreads places.
    const float* peaks = a.peaks + shape.row(s, h) / kRun + warp;
    float highest_own[kShare];
    KVLAPSE_UNROLL
    for (int i = 0; i < kShare; ++i) highest_own[i] = -infinity();
    for (int first = 0; first < n; first += kThreads * kRun) {
      KVLAPSE_UNROLL
      for (int i = 0; i < kShare; ++i) {
        const int run = first / kRun + lane + 32 * i;
        if (run * kRun < n) highest_own[i] = fmaxf(highest_own[i], peaks[static_cast<int64_t>(run) * kLanes]);
      }
    }
    uint32_t own[kShare];
    uint32_t best = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kShare; ++i) {
      own[i] = ordered(highest_own[i] + 0.0f);
      best = own[i] > best ? own[i] : best;
    }
    const float highest = unordered(warp_largest(best));
    const float base = row_base(highest);
    // The tenth of the places' maxima is exceeded by ten tokens at least.
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
        threshold[kLanes] = {}, peak[kLanes] = {};
  KVLAPSE_UNROLL
  for (int g = 0; g < kLanes; ++g)
    if (g < group) base[g] = bases[g], threshold[g] = thresholds[g];
  KVLAPSE_UNROLL_2
  for (int i = thread; i < n; i += kThreads) {
    float* at = row + static_cast<int64_t>(i) * kLanes;
    Weights<kLanes> x = next[0];
    next[0] = next[1];
    if (i + 2 * kThreads < n) next[1] = Weights<kLanes>::load(at + 2 * kThreads * kLanes);
    KVLAPSE_UNROLL
    for (int g = 0; g < kLanes; ++g) {
      if (g >= group) continue;
      const float e = device::exp_over(x.v[g], base[g]);
      total[g] += e;
      peak[g] = fmaxf(peak[g], e);
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
    if (g < group) any_hot |= peak[g] > kHot * sums[g];
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
// A block has a tile of steps x 4 query heads by 32 configurations, a warp two of the steps. Tokens that are
// gone at every step of the tile are summed as products; a warp adds the few that go within it, of four
// configurations, a lane a step. The next chunk of tokens is on its way in registers.
class Masses {
 public:
  static constexpr int kSteps = MassesArgs::kSteps, kTokens = MassesArgs::kTokens,
                       kConfigs = MassesArgs::kConfigs, kThreads = MassesArgs::kThreads,
                       kWarps = kThreads / 32, kOwnWeights = kSteps * kTokens / kThreads,
                       kOwnConfigs = kConfigs / kWarps, kRuns = kTokens / 32,
                       kApart = kThreads / kTokens;  // steps between those that a thread loads
  static constexpr uint32_t kWeightBytes = MassesArgs::kWeightBytes, kOneBytes = MassesArgs::kOneBytes;
  static constexpr float kScale = kHalfScale / kRowHead;
  static_assert(kSteps == 2 * kWarps && kSteps == 16 && kConfigs == 32 && kTokens % 32 == 0);

  KVLAPSE_DEVICE Masses(const MassesArgs& args, int block, unsigned char* memory)
      : a_(args), shape_(args.shape), warp_(thread_index() / 32), lane_(thread_index() % 32) {
    head_ = block % shape_.n_kv;
    quad_ = block / shape_.n_kv % a_.quads();
    first_config_ = block / shape_.n_kv / a_.quads() % a_.config_tiles() * kConfigs;
    first_ = a_.t0 + block / shape_.n_kv / a_.quads() / a_.config_tiles() * kSteps;
    end_ = least(a_.t1, first_ + kSteps);
    weights_ = device::smem_address(memory);  // [tokens][steps][upper 4, lower 4]
    memory_ = memory;
    from_ = a_.weights + shape_.row(first_ - a_.t0 + thread_index() / kTokens, head_) + quad_ * 4 +
            static_cast<int64_t>(thread_index() % kTokens) * shape_.lanes();
    own_last_ = last_of(first_config_ + warp_ * kOwnConfigs) + lane_;
  }

  KVLAPSE_DEVICE void run() {
    if (end_ <= a_.begin) return;
    for (int i = thread_index(); i < kConfigs * kSteps * 4; i += kThreads) extra(0, 0)[i] = 0;
    fetch(0);
    KVLAPSE_NO_UNROLL
    for (int token = 0; token < end_; token += kTokens) {
      block_sync();
      const uint32_t passing = put(token);
      block_sync();
      if (warp_ballot(passing != 0) != 0) add_passing(passing);
      if (token + kTokens < end_) fetch(token + kTokens);
      multiply();
    }
    share();
    block_sync();
    close();
  }

 private:
  KVLAPSE_DEVICE const int32_t* last_of(int config) const {
    return a_.last + (static_cast<int64_t>(config) * shape_.n_kv + head_) * shape_.n_tokens;
  }
  KVLAPSE_DEVICE void fetch(int token) {
    const int64_t apart = kApart * shape_.row(1, 0),
                  of_config = static_cast<int64_t>(shape_.n_kv) * shape_.n_tokens;
    const int pos = token + thread_index() % kTokens;
    const float* from = from_ + static_cast<int64_t>(token) * shape_.lanes();
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) {
      const int step = first_ + thread_index() / kTokens + k * kApart;
      next_[k] = {};
      if (pos <= step && step < end_) next_[k] = Weights<4>::load(from + k * apart);
    }
    KVLAPSE_UNROLL
    for (int c = 0; c < kOwnConfigs; ++c) {
      KVLAPSE_UNROLL
      for (int k = 0; k < kRuns; ++k)
        next_last_[c * kRuns + k] =
            first_config_ + warp_ * kOwnConfigs + c < a_.n_configs && token + 32 * k + lane_ < shape_.n_tokens
                ? own_last_[c * of_config + token + 32 * k]
                : kHeld;
    }
  }
  // What has come into shared memory; a bit for each that goes within the tile. Sinks are left to the end.
  KVLAPSE_DEVICE uint32_t put(int token) {
    const int thread = thread_index();
    KVLAPSE_UNROLL
    for (int k = 0; k < kOwnWeights; ++k) {
      const float* w = next_[k].v;
      uint32_t upper[2], lower[2];
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float low = w[2 * j] * kScale, high = w[2 * j + 1] * kScale;
        upper[j] = device::pack2<device::F16>(low, high);
        float low_part, high_part;
        device::unpack2<device::F16>(upper[j], low_part, high_part);
        lower[j] = device::pack2<device::F16>(low - low_part, high - high_part);
      }
      *reinterpret_cast<Float4*>(memory_ + thread % kTokens * kWeightBytes +
                                 (thread / kTokens + k * kApart) * 16) =
          Float4{device::bits_float(upper[0]), device::bits_float(upper[1]), device::bits_float(lower[0]),
                 device::bits_float(lower[1])};
    }
    unsigned char* const ones =
        memory_ + kTokens * kWeightBytes + warp_ * kOwnConfigs * kOneBytes + lane_ * 2;
    uint32_t passing = 0;
    KVLAPSE_UNROLL
    for (int i = 0; i < kOwnConfigs * kRuns; ++i) {
      const int last = next_last_[i];
      const bool sink = token + i % kRuns * 32 + lane_ < kSinks;
      *reinterpret_cast<uint16_t*>(ones + i / kRuns * kOneBytes + i % kRuns * 64) =
          last < first_ && !sink ? 0x3c00 : 0;
      if (last >= first_ && last < end_ - 1 && !sink) passing |= 1u << i;
    }
    return passing;
  }
  KVLAPSE_DEVICE void multiply() {
    float part[kConfigs / 8][4] = {};
    const SmemAddress rows = weights_ + (lane_ / 16 * 8 + lane_ % 8) * kWeightBytes +
                             static_cast<uint32_t>(warp_ * 32 + (lane_ / 8 & 1) * 16);
    const SmemAddress columns = weights_ + kTokens * kWeightBytes + (lane_ / 16 * 8 + lane_ % 8) * kOneBytes +
                                static_cast<uint32_t>((lane_ / 8 & 1) * 16);
    KVLAPSE_UNROLL
    for (int s = 0; s < kTokens / 16; ++s) {
      uint32_t a[4], b[2][4];
      device::load_matrix4_transposed(a, rows + static_cast<uint32_t>(s) * 16 * kWeightBytes);
      KVLAPSE_UNROLL
      for (int n = 0; n < 2; ++n)
        device::load_matrix4(b[n], columns + static_cast<uint32_t>(n) * 16 * kOneBytes + s * 32);
      KVLAPSE_UNROLL
      for (int n = 0; n < 4; ++n)
        device::multiply_add_16x8x16<device::F16>(part[n], a, b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]);
    }
    // In fp32: the products' own sums are rounded towards zero.
    KVLAPSE_UNROLL
    for (int n = 0; n < kConfigs / 8; ++n) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 4; ++j) sum_[n][j] += part[n][j];
    }
  }
  KVLAPSE_DEVICE float* extra(int config, int step) const {  // of four heads
    return reinterpret_cast<float*>(memory_ + kTokens * kWeightBytes + kConfigs * kOneBytes) +
           (config * kSteps + step) * 4;
  }
  // To the steps behind their last ones.
  KVLAPSE_DEVICE void add_passing(uint32_t passing) {
    KVLAPSE_UNROLL
    for (int i = 0; i < kOwnConfigs * kRuns; ++i) {
      uint32_t bits = warp_ballot((passing >> i & 1) != 0);
      while (bits != 0) {
        const int from = device::lowest_bit(bits), last = shuffle_from(next_last_[i], from);
        bits &= bits - 1;
        if (lane_ >= kSteps || first_ + lane_ <= last) continue;
        const Float4 w =
            *reinterpret_cast<const Float4*>(memory_ + (i % kRuns * 32 + from) * kWeightBytes + lane_ * 16);
        float upper[4], lower[4];
        device::unpack2<device::F16>(device::float_bits(w.x), upper[0], upper[1]);
        device::unpack2<device::F16>(device::float_bits(w.y), upper[2], upper[3]);
        device::unpack2<device::F16>(device::float_bits(w.z), lower[0], lower[1]);
        device::unpack2<device::F16>(device::float_bits(w.w), lower[2], lower[3]);
        float* to = extra(warp_ * kOwnConfigs + i / kRuns, lane_);
        Weights<4> sum = Weights<4>::load(to);
        KVLAPSE_UNROLL
        for (int g = 0; g < 4; ++g) sum.v[g] += upper[g] + lower[g];
        sum.store(to);
      }
    }
  }
  // Adds the products to them: a lane has a part, upper or lower, of both steps, and sums up one.
  KVLAPSE_DEVICE void share() {
    block_sync();
    const int part = lane_ / 16;
    KVLAPSE_UNROLL
    for (int n = 0; n < kConfigs / 8; ++n) {
      KVLAPSE_UNROLL
      for (int j = 0; j < 2; ++j) {
        const float own = part == 0 ? sum_[n][j] : sum_[n][2 + j],
                    other = shuffle_xor(part == 0 ? sum_[n][2 + j] : sum_[n][j], 16);
        extra(n * 8 + lane_ % 4 * 2 + j, warp_ * 2 + part)[lane_ / 4 % 4] += own + other;
      }
    }
  }
  // From here on a thread has a step and a head.
  KVLAPSE_DEVICE void close() const {
    constexpr int kApartConfigs = kThreads / kSteps / 4;
    const int thread = thread_index(), step = thread % kSteps, head = thread / kSteps % 4, t = first_ + step,
              g = quad_ * 4 + head;
    if (g >= shape_.group() || t >= end_ || t < a_.begin) return;
    const RowFacts& facts =
        a_.facts[static_cast<int64_t>(t - a_.t0) * shape_.n_q + head_ * shape_.group() + g];
    const float inverse = facts.inverse, scale = inverse * (kRowHead / kHalfScale), outside = facts.outside;
    const int n_top = facts.n_top;
    int top[kTop];
    KVLAPSE_UNROLL
    for (int i = 0; i < kTop; ++i) top[i] = i < n_top ? facts.top[i] : 0;
    float sink[kSinks];
    KVLAPSE_UNROLL
    for (int i = 0; i < kSinks; ++i)
      sink[i] = i <= t
                    ? a_.weights[shape_.row(t - a_.t0, head_) + static_cast<int64_t>(i) * shape_.lanes() + g]
                    : 0.0f;
    const int64_t plane = static_cast<int64_t>(a_.n_configs) * shape_.n_q * shape_.n_tokens;
    KVLAPSE_NO_UNROLL
    for (int i = thread / kSteps / 4; i < kConfigs && first_config_ + i < a_.n_configs; i += kApartConfigs) {
      const int config = first_config_ + i;
      const int32_t* last = last_of(config);
      float sinks = 0;
      KVLAPSE_UNROLL
      for (int k = 0; k < kSinks; ++k) sinks += k <= t && last[k] < t ? sink[k] : 0.0f;
      int held = 0;
      KVLAPSE_UNROLL
      for (int k = 0; k < kTop; ++k) held += k < n_top && last[top[k]] >= t;
      const float other = extra(i, step)[head] * scale, missing = other + sinks * inverse;
      const float share = outside > 1e-6f ? other / outside : 0.0f;
      float* to = a_.metrics +
                  (static_cast<int64_t>(config) * shape_.n_q + head_ * shape_.group() + g) * shape_.n_tokens +
                  t;
      to[kMissing * plane] = missing < 1.0f ? missing : 1.0f;
      to[kMissingRest * plane] = share < 1.0f ? share : 1.0f;
      to[kTopHeld * plane] = static_cast<float>(held) / static_cast<float>(n_top);
    }
  }

  const MassesArgs& a_;
  const Shape& shape_;
  const int warp_, lane_;
  int head_, quad_, first_config_, first_, end_;
  SmemAddress weights_;  // [tokens][steps][upper 4, lower 4], ones [configs][tokens], extras
  unsigned char* memory_;
  const float* from_;        // of the thread's token in the chunk
  const int32_t* own_last_;  // of the warp's first configuration
  Weights<4> next_[kOwnWeights];
  int next_last_[kOwnConfigs * kRuns];
  float sum_[kConfigs / 8][4] = {};
};

KVLAPSE_DEVICE void run(const MassesArgs& a, int block, unsigned char* memory) {
  Masses(a, block, memory).run();
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
