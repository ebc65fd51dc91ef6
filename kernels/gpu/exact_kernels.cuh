// The exact kernels, one function a kernel that every thread of a block runs; contract: exact_args.h. Written
// in the operations of kernels/cuda/device_ops.cuh and exact_ops.cuh, so that the tests' emulator compiles
// the same text: include these (or the emulator) first. Compiled without contraction of products and sums:
// fused multiply-adds are written where they are meant.
#pragma once

#include <cmath>

#include "kernels/gpu/exact_args.h"
#include "kernels/gpu/exponential.cuh"

namespace kvlapse::exact {

using device::block_sync;
using device::shuffle_xor;
using device::thread_index;
using device::warp_sync;

KVLAPSE_DEVICE float infinity() {
  return __builtin_huge_valf();
}

// scalar::exp_one of core/base.
KVLAPSE_DEVICE float exp_one(float x) {
  if (!(x > -87.3f)) return x != x ? x : 0.0f;
  if (x > 88.37f) return infinity();
  const float n = rintf(x * kLog2e);
  return device::exp_of_rest(device::exp_rest(x, n)) *
         device::bits_float(static_cast<uint32_t>(static_cast<int32_t>(n) + 127) << 23);
}

// Sixteen threads, one for each lane of a sum.
struct Team {
  int index;  // in the whole launch
  int lane;
  KVLAPSE_DEVICE explicit Team(int block)
      : index(block * kTeams + thread_index() / kTeam), lane(thread_index() % kTeam) {}
};
// The tree over the lanes of a team; every lane gets the sum. All threads of a warp together.
KVLAPSE_DEVICE float tree(float lane_sum) {
  for (int mask = kTeam / 2; mask > 0; mask /= 2) lane_sum += shuffle_xor(lane_sum, mask);
  return lane_sum;
}

struct Float32 {
  using Storage = float;
  KVLAPSE_DEVICE static float widen(float v) { return v; }
  KVLAPSE_DEVICE static float narrow(float v) { return v; }
};
struct Half {
  using Storage = uint16_t;
  KVLAPSE_DEVICE static float widen(uint16_t v) { return device::half_to_float(v); }
  KVLAPSE_DEVICE static uint16_t narrow(float v) { return device::float_to_half(v); }
};
struct Brain {
  using Storage = uint16_t;
  KVLAPSE_DEVICE static float widen(uint16_t v) { return device::bits_float(static_cast<uint32_t>(v) << 16); }
  KVLAPSE_DEVICE static uint16_t narrow(float v) { return f32_to_bf16(v); }
};
// Calls f(Float32), f(Half) or f(Brain).
template <class F>
KVLAPSE_DEVICE void with_type(DType type, const F& f) {
  if (type == DType::f32)
    f(Float32());
  else if (type == DType::f16)
    f(Half());
  else
    f(Brain());
}

KVLAPSE_DEVICE void run(const EmbedArgs& a, int block, unsigned char*) {
  const int64_t i = static_cast<int64_t>(block) * kThreads + thread_index();
  if (i >= static_cast<int64_t>(a.n_rows) * a.width) return;
  const int64_t at = static_cast<int64_t>(a.tokens[i / a.width]) * a.width + i % a.width;
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    a.x[i] = T::widen(static_cast<const typename T::Storage*>(a.embedding)[at]);
  });
}

KVLAPSE_DEVICE void run(const NormArgs& a, int block, unsigned char*) {
  const Team team(block);
  const bool mine = team.index < a.n_rows;
  const int i = mine ? team.index : 0;
  const float* x = a.x + static_cast<int64_t>(a.rows ? a.rows[i] : i) * a.width;
  float sum = 0;
  KVLAPSE_UNROLL_16
  for (int c = team.lane; c < a.width; c += kTeam) sum = fmaf(x[c], x[c], sum);
  const float mean = tree(sum) / static_cast<float>(a.width);
  const float factor = 1.0f / sqrtf(mean + a.eps);
  if (!mine) return;
  float* out = a.out + static_cast<int64_t>(i) * a.width;
  for (int c = team.lane; c < a.width; c += kTeam) out[c] = x[c] * factor * a.weight[c];
}

KVLAPSE_DEVICE void run(const MatmulArgs& a, int block, unsigned char*) {
  const int row_blocks = blocks_for(a.total_rows(), kTeams);
  const Team team(block % row_blocks);
  const int first = block / row_blocks * kVectorsAtOnce;
  const bool mine = team.index < a.total_rows();
  int row = mine ? team.index : 0, p = 0;
  while (row >= a.parts[p].rows) row -= a.parts[p++].rows;
  const MatmulPart& part = a.parts[p];
  const int n = a.n_x - first < kVectorsAtOnce ? a.n_x - first : kVectorsAtOnce;  // of the whole block
  const float* x = a.x + static_cast<int64_t>(first) * a.columns;
  float sum[kVectorsAtOnce] = {};
  with_type(a.type, [&](auto type) {
    using T = decltype(type);
    const auto* w =
        static_cast<const typename T::Storage*>(part.data) + static_cast<int64_t>(row) * a.columns;
    if (n == 1) {
      KVLAPSE_UNROLL_16
      for (int c = team.lane; c < a.columns; c += kTeam) sum[0] = fmaf(T::widen(w[c]), x[c], sum[0]);
      return;
    }
    const float* rows[kVectorsAtOnce];
    for (int v = 0; v < kVectorsAtOnce; ++v) rows[v] = x + static_cast<int64_t>(v < n ? v : 0) * a.columns;
    for (int c = team.lane; c < a.columns; c += kTeam) {
      const float value = T::widen(w[c]);
      for (int v = 0; v < kVectorsAtOnce; ++v) sum[v] = fmaf(value, rows[v][c], sum[v]);
    }
  });
  KVLAPSE_UNROLL
  for (int v = 0; v < kVectorsAtOnce; ++v) {
    if (v >= n) continue;
    const float dot = tree(sum[v]);
    if (!mine || team.lane != 0) continue;
    float* out = part.out + static_cast<int64_t>(first + v) * part.stride + row;
    *out = a.add ? *out + dot : dot;
  }
}

KVLAPSE_DEVICE float rounded(DType type, float v) {
  float out = v;
  with_type(type, [&](auto t) { out = decltype(t)::widen(decltype(t)::narrow(v)); });
  return out;
}

KVLAPSE_DEVICE void run(const FinishQkvArgs& a, int block, unsigned char*) {
  const Team team(block);
  const int n_heads = a.heads.n_q + 2 * a.heads.n_kv, dim = a.heads.dim, half = dim / 2;
  const bool mine = team.index < a.n_rows * n_heads;
  const int at = mine ? team.index : 0, row = at / n_heads, head = at % n_heads;
  const bool is_q = head < a.heads.n_q, is_v = head >= a.heads.n_q + a.heads.n_kv;
  const int h = is_q ? head : is_v ? head - a.heads.n_q - a.heads.n_kv : head - a.heads.n_q;
  const float* bias = is_q ? a.q_bias : is_v ? a.v_bias : a.k_bias;
  const float* norm = is_q ? a.q_norm : is_v ? nullptr : a.k_norm;
  float* x = is_q   ? a.q + (static_cast<int64_t>(row) * a.heads.n_q + h) * dim
             : is_v ? a.v + (static_cast<int64_t>(row) * a.heads.n_kv + h) * dim
                    : a.k + (static_cast<int64_t>(row) * a.heads.n_kv + h) * dim;
  float sum = 0;
  for (int d = team.lane; d < dim; d += kTeam) {
    float v = x[d];
    if (bias && mine) x[d] = v = v + bias[h * dim + d];
    sum = fmaf(v, v, sum);
  }
  const float mean = tree(sum) / static_cast<float>(dim);
  const float factor = 1.0f / sqrtf(mean + a.eps);
  if (norm && mine)
    for (int d = team.lane; d < dim; d += kTeam) x[d] = x[d] * factor * norm[d];
  warp_sync();  // the rotation pairs elements of different lanes
  if (!mine) return;
  if (is_v) {
    for (int d = team.lane; d < dim; d += kTeam) x[d] = rounded(a.heads.dtype, x[d]);
    return;
  }
  for (int d = team.lane; d < half; d += kTeam) {
    const float c = a.cos[static_cast<int64_t>(row) * half + d],
                s = a.sin[static_cast<int64_t>(row) * half + d];
    const float low = x[d], high = x[d + half];
    x[d] = rounded(a.heads.dtype, low * c - high * s);
    x[d + half] = rounded(a.heads.dtype, high * c + low * s);
  }
}

KVLAPSE_DEVICE void run(const StoreArgs& a, int block, unsigned char*) {
  const Team team(block);
  const bool mine = team.index < a.n_rows * a.heads.n_kv;
  const int at = mine ? team.index : 0, row = at / a.heads.n_kv, h = at % a.heads.n_kv, dim = a.heads.dim;
  const SiteView& site = a.sites[row];
  const int64_t slot = static_cast<int64_t>(h) * site.n_slots + a.slots[at];
  const float* k = a.k + static_cast<int64_t>(at) * dim;
  const float* v = a.v + static_cast<int64_t>(at) * dim;
  float sum = 0;
  for (int d = team.lane; d < dim; d += kTeam) sum += v[d] < 0 ? -v[d] : v[d];
  const float norm = tree(sum);
  if (!mine) return;
  with_type(a.heads.dtype, [&](auto type) {
    using T = decltype(type);
    auto* keys = static_cast<typename T::Storage*>(site.k) + slot * dim;
    auto* values = static_cast<typename T::Storage*>(site.v) + slot * dim;
    for (int d = team.lane; d < dim; d += kTeam) keys[d] = T::narrow(k[d]), values[d] = T::narrow(v[d]);
  });
  if (team.lane == 0) {
    site.value_l1[slot] = norm;
    site.positions[slot] = a.pos[row];
  }
  const int ring = a.ring[row] & (kKeepsQuery - 1);
  const bool keeps_query = a.ring[row] >= kKeepsQuery;
  const int width = a.heads.group() * dim;
  const float* q = a.q + static_cast<int64_t>(row) * a.heads.n_q * dim + h * width;
  for (int i = team.lane; i < width; i += kTeam) {
    if (keeps_query) site.query[h * width + i] = q[i];
    if (ring != kNoRing) site.ring[static_cast<int64_t>(ring) * a.heads.n_q * dim + h * width + i] = q[i];
  }
}

KVLAPSE_DEVICE void run(const LogitsArgs& a, int block, unsigned char*) {
  const int parts = blocks_for(a.most, kBlockSlots);
  const int row = block / parts / a.heads.n_kv, h = block / parts % a.heads.n_kv;
  const int first = block % parts * kBlockSlots, n = a.counts[row * a.heads.n_kv + h];
  if (first >= n) return;  // of all threads alike
  const SiteView& site = a.sites[row];
  const int dim = a.heads.dim, group = a.heads.group(), lane = thread_index() % kTeam;
  const float* q = site.query + static_cast<int64_t>(h) * group * dim;
  for (int i = 0; i < kTeamSlots; ++i) {
    const int slot = first + i * kTeams + thread_index() / kTeam;
    float sum[kMaxGroup] = {};
    with_type(a.heads.dtype, [&](auto type) {
      using T = decltype(type);
      const auto* k = static_cast<const typename T::Storage*>(site.k) +
                      (static_cast<int64_t>(h) * site.n_slots + (slot < n ? slot : 0)) * dim;
      for (int d = lane; d < dim; d += kTeam) {
        const float value = T::widen(k[d]);
        KVLAPSE_UNROLL
        for (int g = 0; g < kMaxGroup; ++g)
          if (g < group) sum[g] = fmaf(value, q[g * dim + d], sum[g]);
      }
    });
    KVLAPSE_UNROLL
    for (int g = 0; g < kMaxGroup; ++g) {
      if (g >= group) continue;
      const float dot = tree(sum[g]);
      if (lane == 0 && slot < n)
        site.logits[(static_cast<int64_t>(h) * group + g) * site.stride + slot] = dot * a.factor;
    }
  }
}

// Largest value over the block; `shared` holds kThreads floats.
KVLAPSE_DEVICE float block_max(float v, float* shared) {
  shared[thread_index()] = v;
  block_sync();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (thread_index() < width) {
      const float other = shared[thread_index() + width];
      if (other > shared[thread_index()]) shared[thread_index()] = other;
    }
    block_sync();
  }
  const float most = shared[0] + 0.0f;  // one zero
  block_sync();
  return most;
}

KVLAPSE_DEVICE void run(const SoftmaxArgs& a, int block, unsigned char* memory) {
  float* shared = reinterpret_cast<float*>(memory);
  const int row = block / a.heads.n_q, head = block % a.heads.n_q;
  const SiteView& site = a.sites[row];
  const int n = a.counts[row * a.heads.n_kv + head / a.heads.group()];
  const float* logits = site.logits + static_cast<int64_t>(head) * site.stride;
  float* weights = site.weights + static_cast<int64_t>(head) * site.stride;
  float most = -infinity();
  for (int i = thread_index(); i < n; i += kThreads) most = logits[i] > most ? logits[i] : most;
  most = block_max(most, shared);
  const float base = device::softmax_base(most);
  for (int i = thread_index(); i < n; i += kThreads) weights[i] = device::exp_over(logits[i], base);
  block_sync();
  if (thread_index() < 32) {  // both teams of the first warp alike
    float sum = 0;
    KVLAPSE_UNROLL_16
    for (int i = thread_index() % kTeam; i < n; i += kTeam) sum += weights[i];
    sum = tree(sum);
    if (thread_index() == 0) shared[0] = 1.0f / sum;
  }
  block_sync();
  const float inverse = shared[0];
  for (int i = thread_index(); i < n; i += kThreads) weights[i] *= inverse;
}

KVLAPSE_DEVICE void run(const ValuesArgs& a, int block, unsigned char*) {
  const int chunks = blocks_for(a.most, kChunkSlots);
  const int row = block / chunks / a.heads.n_kv, h = block / chunks % a.heads.n_kv, chunk = block % chunks;
  const int first = chunk * kChunkSlots, n = a.counts[row * a.heads.n_kv + h];
  if (first >= n) return;
  const int count = n - first < kChunkSlots ? n - first : kChunkSlots;
  const SiteView& site = a.sites[row];
  const int dim = a.heads.dim, group = a.heads.group();
  for (int i = thread_index(); i < group * dim; i += kThreads) {
    const int head = h * group + i / dim, d = i % dim;
    const float* w = site.weights + static_cast<int64_t>(head) * site.stride + first;
    float total = 0;
    with_type(a.heads.dtype, [&](auto type) {
      using T = decltype(type);
      const auto* v = static_cast<const typename T::Storage*>(site.v) +
                      (static_cast<int64_t>(h) * site.n_slots + first) * dim + d;
      KVLAPSE_UNROLL_16
      for (int s = 0; s < count; ++s) total = fmaf(w[s], T::widen(v[static_cast<int64_t>(s) * dim]), total);
    });
    site.partials[(static_cast<int64_t>(chunk) * a.heads.n_q + head) * dim + d] = total;
  }
}

KVLAPSE_DEVICE void run(const SumChunksArgs& a, int block, unsigned char*) {
  const int64_t i = static_cast<int64_t>(block) * kThreads + thread_index();
  const int width = a.heads.n_q * a.heads.dim;
  if (i >= static_cast<int64_t>(a.n_rows) * width) return;
  const int row = static_cast<int>(i / width), at = static_cast<int>(i % width);
  const int h = at / a.heads.dim / a.heads.group();
  const SiteView& site = a.sites[row];
  const int chunks = blocks_for(a.counts[row * a.heads.n_kv + h], kChunkSlots);
  float total = 0;
  for (int c = 0; c < chunks; ++c) total += site.partials[static_cast<int64_t>(c) * width + at];
  site.output[at] = total;
  if (a.out) a.out[i] = total;
}

KVLAPSE_DEVICE void run(const SiluArgs& a, int block, unsigned char*) {
  const int64_t i = static_cast<int64_t>(block) * kThreads + thread_index();
  if (i >= a.n) return;
  const float g = a.gate[i];
  a.gate[i] = g / (1.0f + exp_one(-g)) * a.up[i];
}

KVLAPSE_DEVICE void run(const ChooseArgs& a, int block, unsigned char* memory) {
  float* shared = reinterpret_cast<float*>(memory);
  int32_t* shared_index = reinterpret_cast<int32_t*>(shared + kThreads);
  const float* logits = a.logits + static_cast<int64_t>(block) * a.n_vocab;
  float value = -infinity();
  int32_t index = a.n_vocab;
  for (int i = thread_index(); i < a.n_vocab; i += kThreads)
    if (logits[i] > value || index == a.n_vocab) value = logits[i], index = i;
  shared[thread_index()] = value, shared_index[thread_index()] = index;
  block_sync();
  if (thread_index() == 0) {
    for (int t = 1; t < kThreads; ++t)
      if (shared_index[t] < a.n_vocab &&
          (shared[t] > shared[0] || (shared[t] == shared[0] && shared_index[t] < shared_index[0])))
        shared[0] = shared[t], shared_index[0] = shared_index[t];
  }
  block_sync();
  const int32_t best = shared_index[0];
  const float best_logit = logits[best], most = best_logit + 0.0f;
  block_sync();
  float second = -infinity();
  for (int i = thread_index(); i < a.n_vocab; i += kThreads)
    if (i != best && logits[i] > second) second = logits[i];
  second = block_max(second, shared);
  if (thread_index() >= 32) return;
  const float base = device::softmax_base(most);
  float sum = 0;
  for (int i = thread_index() % kTeam; i < a.n_vocab; i += kTeam) sum += device::exp_over(logits[i], base);
  sum = tree(sum);
  if (thread_index() != 0) return;
  const int32_t forced = a.forced[block];
  a.choices[block] = {best, best_logit, second, sum, forced >= 0 ? logits[forced] : 0.0f};
}

KVLAPSE_DEVICE void run(const VictimArgs& a, int block, unsigned char* memory) {
  float* one = reinterpret_cast<float*>(memory);
  float* two = one + kThreads;
  int32_t* slots = reinterpret_cast<int32_t*>(two + kThreads);
  int32_t* nans = slots + kThreads;
  const int row = block / a.n_score_rows(), h0 = block % a.n_score_rows();
  const int first_head = a.shared ? 0 : h0 * a.heads.group();
  const int end_head = a.shared ? a.heads.n_q : first_head + a.heads.group();
  const SiteView& site = a.sites[row];
  const int n = a.counts[row * a.heads.n_kv + h0];
  float low = infinity(), next = infinity();
  int32_t slot = n, has_nan = 0;
  for (int s = thread_index(); s < n; s += kThreads) {
    const int32_t pos = site.positions[static_cast<int64_t>(h0) * site.n_slots + s];
    if (pos < a.first_free[row] || pos > a.last_free[row]) continue;
    float score = 0;
    for (int q = first_head; q < end_head; ++q) {
      const float w = site.weights[static_cast<int64_t>(q) * site.stride + s];
      score = fmaf(w, site.value_l1[static_cast<int64_t>(q / a.heads.group()) * site.n_slots + s], score);
    }
    score *= a.scale;
    has_nan |= score != score;
    if (score < low)
      next = low, low = score, slot = s;
    else if (score < next)
      next = score;
  }
  one[thread_index()] = low, two[thread_index()] = next, slots[thread_index()] = slot,
  nans[thread_index()] = has_nan;
  block_sync();
  if (thread_index() != 0) return;
  for (int t = 1; t < kThreads; ++t) {
    has_nan |= nans[t];
    const bool first = one[t] < low || (one[t] == low && slots[t] < slot);
    const float other = first ? low : one[t];  // the larger of the two lowest
    next = first ? two[t] : next;
    if (first) low = one[t], slot = slots[t];
    if (other < next) next = other;
  }
  a.victims[block] = {low < infinity() ? slot : -1, low, next, has_nan};
}

KVLAPSE_DEVICE void run(const GatherArgs& a, int block, unsigned char*) {
  const int64_t i = static_cast<int64_t>(block) * kThreads + thread_index();
  if (i >= static_cast<int64_t>(a.n) * a.total_words()) return;
  const int row = static_cast<int>(i / a.total_words());
  int word = static_cast<int>(i % a.total_words()), p = 0;
  while (word >= a.words[p]) word -= a.words[p++];
  const int64_t from = a.order ? a.order[row] : row;
  a.to[p][static_cast<int64_t>(row) * a.words[p] + word] = a.from[p][from * a.words[p] + word];
}

KVLAPSE_DEVICE void run(const UnitKeysArgs& a, int block, unsigned char*) {
  const int parts = blocks_for(a.most, kTeams), h = block / parts, dim = a.heads.dim;
  const Team team(block % parts);
  const bool mine = team.index < a.counts[h];
  const int slot = mine ? team.index : 0;
  float* unit = a.unit + (static_cast<int64_t>(h) * a.most + slot) * dim;
  with_type(a.heads.dtype, [&](auto type) {
    using T = decltype(type);
    const auto* k =
        static_cast<const typename T::Storage*>(a.k) + (static_cast<int64_t>(h) * a.n_slots + slot) * dim;
    float sum = 0;
    for (int d = team.lane; d < dim; d += kTeam) sum = fmaf(T::widen(k[d]), T::widen(k[d]), sum);
    const float divisor = sqrtf(tree(sum)) + 1e-8f;
    float own = 0;
    for (int d = team.lane; d < dim; d += kTeam) {
      const float u = T::widen(k[d]) / divisor;
      own = fmaf(u, u, own);
      if (mine) unit[d] = u;
    }
    own = tree(own);
    if (mine && team.lane == 0) a.own[static_cast<int64_t>(h) * a.most + slot] = own;
  });
}

KVLAPSE_DEVICE void run(const MeanKeyArgs& a, int block, unsigned char*) {
  const int n = a.counts[block], dim = a.heads.dim;
  for (int d = thread_index(); d < dim; d += kThreads) {
    const float* unit = a.unit + static_cast<int64_t>(block) * a.most * dim + d;
    double total = 0;
    KVLAPSE_UNROLL_16
    for (int i = 0; i < n; ++i) total += static_cast<double>(unit[static_cast<int64_t>(i) * dim]);
    a.mean[block * dim + d] = static_cast<float>(total / static_cast<double>(n));
  }
}

KVLAPSE_DEVICE void run(const SimilarKeyArgs& a, int block, unsigned char*) {
  constexpr int kAtOnce = 4;
  const int parts = blocks_for(a.most, kTeams), h = block / parts, dim = a.heads.dim, n = a.counts[h];
  const Team team(block % parts);
  const bool mine = team.index < n;
  const int row = mine ? team.index : 0;
  const float* all = a.unit + static_cast<int64_t>(h) * a.most * dim;
  const float* unit = all + static_cast<int64_t>(row) * dim;
  const float* mean = a.mean + h * dim;
  float sum = 0;
  for (int d = team.lane; d < dim; d += kTeam) sum = fmaf(mean[d], unit[d], sum);
  const float projection = tree(sum);
  int similar = 0;
  float cosine = 0;
  bool found = !mine;
  // The two rows of a warp look at the same keys until both have theirs.
  for (int last = n - 1; last >= 0; last -= kAtOnce) {
    float sums[kAtOnce] = {};
    for (int d = team.lane; d < dim; d += kTeam) {
      KVLAPSE_UNROLL
      for (int j = 0; j < kAtOnce; ++j) {
        const int key = last - j > 0 ? last - j : 0;
        sums[j] = fmaf(all[static_cast<int64_t>(key) * dim + d], unit[d], sums[j]);
      }
    }
    KVLAPSE_UNROLL
    for (int j = 0; j < kAtOnce; ++j) {
      const int key = last - j;
      const float product = tree(sums[j]), c = key == row ? 0.0f : product;
      if (found || key < 0 || (!(c > a.threshold) && key > 0)) continue;
      similar = key, cosine = c, found = true;
    }
    if (device::warp_ballot(found) == 0xffffffffu) break;
  }
  if (!mine || team.lane != 0) return;
  const int64_t at = static_cast<int64_t>(h) * a.most + row;
  a.projection[at] = projection;
  a.similar[at] = similar;
  a.cosine[at] = cosine;
}

}  // namespace kvlapse::exact
