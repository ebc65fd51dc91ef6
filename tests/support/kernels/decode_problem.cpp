#include "tests/support/kernels/decode_problem.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <thread>

#include "core/base/error.h"
#include "core/base/fp8.h"
#include "core/base/rng.h"

namespace kvlapse {
namespace {

constexpr uint16_t kPoison = 0x7fff;  // NaN in fp16 and bf16

// Mean 0, variance 1: the sum of four uniform numbers, cheap enough for gigabytes.
double normal(uint64_t seed, uint64_t stream, uint64_t index) {
  const uint64_t bits = counter_random({seed, stream, index});
  const double sum =
      static_cast<double>((bits & 0xffff) + ((bits >> 16) & 0xffff) + ((bits >> 32) & 0xffff) + (bits >> 48));
  return (sum / 65536 - 2) * 1.7320508;
}

// work(i) for i in [0, n), on all cores.
template <class Work>
void for_each_index(size_t n, Work work) {
  std::atomic<size_t> next{0};
  std::vector<std::jthread> threads;
  const size_t most = std::min<size_t>(n, std::max(1u, std::thread::hardware_concurrency()));
  auto run = [&] {
    for (size_t i = next++; i < n; i = next++) work(i);
  };
  for (size_t i = 1; i < most; ++i) threads.emplace_back(run);
  run();
}

int protect_words(const DecodeShape& s) {
  return (s.n_slots + 63) / 64 * 4;
}

bool should_protect(const DecodeProblem& p, int token_pos, int step) {
  return token_pos < p.pinned || token_pos > step - p.recent;
}

template <class... Args>
void report(DecodeCheck& check, fmt::format_string<Args...> format, Args&&... args) {
  if (check.failure.empty()) check.failure = fmt::format(format, std::forward<Args>(args)...);
}

}  // namespace

float DecodeProblem::to_float(uint16_t bits) const {
  return shape.io() == DType::f16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}
uint16_t DecodeProblem::from_float(float value) const {
  return shape.io() == DType::f16 ? f32_to_f16(value) : f32_to_bf16(value);
}
std::vector<float> DecodeProblem::row(const std::vector<uint16_t>& plane, const std::vector<float>& scale,
                                      size_t item, int slot) const {
  const size_t at = (item * shape.n_slots + slot) * row_words();
  std::vector<float> values(shape.head_dim);
  for (size_t d = 0; d < values.size(); ++d) {
    if (shape.fp8())
      values[d] = e4m3_to_f32(static_cast<uint8_t>(plane[at + d / 2] >> (d % 2 * 8))) *
                  scale[item * shape.scale_stride() + slot];
    else
      values[d] = to_float(plane[at + d]);
  }
  return values;
}
void DecodeProblem::set_row(std::vector<uint16_t>& plane, std::vector<float>& scale, size_t item, int slot,
                            const uint16_t* values) const {
  const size_t at = (item * shape.n_slots + slot) * row_words();
  if (!shape.fp8()) {
    std::copy_n(values, shape.head_dim, plane.begin() + at);
    return;
  }
  std::vector<float> row(shape.head_dim);
  std::vector<uint8_t> bytes(row.size());
  for (size_t d = 0; d < row.size(); ++d) row[d] = to_float(values[d]);
  scale[item * shape.scale_stride() + slot] = quantise_fp8_row(row, bytes.data());
  for (size_t d = 0; d < row.size(); d += 2)
    plane[at + d / 2] = static_cast<uint16_t>(bytes[d] | bytes[d + 1] << 8);
}
float DecodeProblem::score_scale() const {
  const int heads = shared ? shape.n_q_heads : shape.group();
  return 1.0f / static_cast<float>(score_uses_norm(score) ? heads * shape.head_dim : heads);
}
int DecodeProblem::held(int b, int h) const {
  if (step_pos[b] < 0) return 0;
  return count.empty() ? std::min(step_pos[b], budget) : count[static_cast<size_t>(b) * shape.n_kv_heads + h];
}
int DecodeProblem::slot_of_new_token(int b, int h) const {
  if (step_pos[b] < 0 || !appends) return -1;
  const int n = held(b, h);
  if (n < budget) return n;
  const uint64_t* keys =
      &victim_keys[(static_cast<size_t>(b) * shape.n_kv_heads + (shared ? 0 : h)) * kMaxDecodeSplits];
  return static_cast<int>(static_cast<uint32_t>(*std::min_element(keys, keys + n_splits)));
}

void draw_decode_token(DecodeProblem& p, const DecodeCase& c, uint64_t step) {
  // q.k / sqrt(D) has standard deviation logit_range when q has that and k has 1.
  for (size_t i = 0; i < p.q.size(); ++i)
    p.q[i] = p.from_float(static_cast<float>(c.logit_range * normal(c.seed, 100 + step * 3, i)));
  for (size_t i = 0; i < p.k_new.size(); ++i) {
    double k = normal(c.seed, 101 + step * 3, i), v = normal(c.seed, 102 + step * 3, i);
    const size_t d = i % p.shape.head_dim;
    if (c.data == DecodeCase::Data::equal_rows)
      k = std::sin(static_cast<double>(d)), v = std::cos(static_cast<double>(d));
    if (c.data == DecodeCase::Data::zero_values) v = 0;
    if (c.data == DecodeCase::Data::near_rows) v = std::cos(static_cast<double>(d)) + 1e-3 * v;
    p.k_new[i] = p.from_float(static_cast<float>(k));
    p.v_new[i] = p.from_float(static_cast<float>(v));
  }
}

DecodeProblem make_decode_problem(const DecodeCase& c, int n_splits) {
  const DecodeShape& s = c.shape;
  DecodeProblem p;
  p.shape = s, p.score = c.score, p.shared = c.shared, p.appends = c.appends;
  p.budget = c.budget > 0 ? c.budget : s.n_slots;
  p.recent = c.recent, p.pinned = c.pinned, p.n_splits = n_splits;
  const size_t items = s.n_items(), rows = items * s.n_slots, D = s.head_dim;
  p.q.resize(static_cast<size_t>(s.batch) * s.n_q_heads * D);
  p.out.assign(p.q.size(), kPoison);
  p.k_new.resize(items * D), p.v_new.resize(items * D);
  // Two bytes of NaN in fp8 as well.
  p.k.assign(rows * p.row_words(), s.fp8() ? 0x7f7f : kPoison), p.v = p.k;
  if (s.fp8()) p.k_scale.assign(items * s.scale_stride(), NAN), p.v_scale = p.k_scale;
  p.value_l1.assign(rows, NAN), p.importance.assign(rows, NAN), p.accumulated.assign(rows, NAN);
  p.protect.assign(items * protect_words(s), 0);
  p.recent_slots.assign(items * std::max(1, c.recent), 0);
  p.positions.assign(rows, -1);
  p.step_pos.assign(c.tokens.begin(), c.tokens.end());
  p.victim_keys.assign(items * kMaxDecodeSplits, ~uint64_t{0});
  p.arrivals.assign(static_cast<size_t>(s.batch) * kMaxDecodeSplits, 0);
  p.flags.assign(1, 0);
  if (c.ragged) p.count.resize(items);

  for_each_index(items, [&](size_t item) {
    const int h = static_cast<int>(item) % s.n_kv_heads, b = static_cast<int>(item) / s.n_kv_heads;
    const int step = c.tokens[b];
    if (step < 0) return;
    int n = std::min(step, p.budget);
    if (c.ragged) {
      n = std::min(n, n * (h + 1) / s.n_kv_heads + 1);
      p.count[item] = n;
    }
    // Pinned tokens and the newest ones are held; the positions between were thinned out. Slots are in a
    // fixed pseudo-random order, as after many evictions (the same in all heads when they share victims).
    std::vector<int> held;
    for (int i = 0; i < n; ++i) held.push_back(i < std::min(n, c.pinned) ? i : step - (n - i));
    const uint64_t shuffle_seed = c.shared ? b : item;
    if (!c.ragged && n == p.budget)
      for (int i = n; i > 1; --i)
        std::swap(held[i - 1], held[counter_random({c.seed, 7, shuffle_seed, static_cast<uint64_t>(i)}) % i]);
    int victim = -1;
    for (int i = 0; i < n; ++i) {
      const size_t row = item * s.n_slots + i;
      const int pos = held[i];
      p.positions[row] = pos;
      if (should_protect(p, pos, step - 1))
        p.protect[item * protect_words(s) + i / 16] |= static_cast<uint16_t>(1u << (i % 16));
      else if (victim < 0 || i % 7 == 3)
        victim = i;
      if (c.recent > 0 && pos >= step - c.recent) p.recent_slots[item * c.recent + pos % c.recent] = i;
      std::vector<uint16_t> k_row(D), v_row(D);
      for (size_t d = 0; d < D; ++d) {
        double k = normal(c.seed, 1, row * D + d), v = normal(c.seed, 2, row * D + d);
        if (c.data == DecodeCase::Data::equal_rows)
          k = std::sin(static_cast<double>(d)), v = std::cos(static_cast<double>(d));
        if (c.data == DecodeCase::Data::zero_values) v = 0;
        if (c.data == DecodeCase::Data::near_rows) v = std::cos(static_cast<double>(d)) + 1e-3 * v;
        if (c.data == DecodeCase::Data::one_hot) k = i == n / 2 ? 40 * (d % 2 ? 1 : -1) : 0;
        k_row[d] = p.from_float(static_cast<float>(k));
        v_row[d] = p.from_float(static_cast<float>(v));
      }
      p.set_row(p.k, p.k_scale, item, i, k_row.data());
      p.set_row(p.v, p.v_scale, item, i, v_row.data());
      float l1 = 0;
      for (float v : p.row(p.v, p.v_scale, item, i)) l1 += std::abs(v);
      p.value_l1[row] = l1;
      p.accumulated[row] = static_cast<float>(unit_double(counter_random({c.seed, 9, row})) * 0.1);
    }
    if (victim >= 0)
      p.victim_keys[item * kMaxDecodeSplits + counter_random({c.seed, 8, shuffle_seed}) % n_splits] =
          static_cast<uint64_t>(victim) | (uint64_t{0x3f000000} << 32);
  });
  draw_decode_token(p, c, 0);
  return p;
}

namespace {

// What leaving each slot out does to a head's output: the sum over a group's heads, and how far it can be
// told in fp32.
struct LeftOut {
  std::vector<double> error, doubt;
};

// Adds a head's. `p`: of its slots relative to the largest's. As defined: |o' - o|, o' from the other slots
// alone.
void leave_each_out(std::span<const double> p, const std::vector<float>& values, size_t D, double tolerance,
                    LeftOut& to) {
  const size_t n = p.size();
  double sum = 0, largest_norm = 0;
  std::vector<double> total(D, 0.0), left(D);
  for (size_t i = 0; i < n; ++i) {
    double norm = 0;
    sum += p[i];
    for (size_t d = 0; d < D; ++d) {
      total[d] += p[i] * values[i * D + d];
      norm += static_cast<double>(values[i * D + d]) * values[i * D + d];
    }
    largest_norm = std::max(largest_norm, std::sqrt(norm));
  }
  for (size_t i = 0; i < n; ++i) {
    double rest = sum - p[i], square = 0;
    for (size_t d = 0; d < D; ++d) left[d] = total[d] - p[i] * values[i * D + d];
    if (p[i] > 0.5 * sum) {  // one slot at most: without differences of nearly equal numbers
      rest = 0;
      std::fill(left.begin(), left.end(), 0.0);
      for (size_t j = 0; j < n; ++j) {
        if (j == i) continue;
        rest += p[j];
        for (size_t d = 0; d < D; ++d) left[d] += p[j] * values[j * D + d];
      }
    }
    // |o' - o| = w |o' - v|.
    const double scale = rest > static_cast<double>(kLeastRest) * p[i] ? 1 / rest : 0;
    for (size_t d = 0; d < D; ++d) {
      const double x = left[d] * scale - values[i * D + d];
      square += x * x;
    }
    const double distance = std::sqrt(square), w = p[i] / sum;
    to.error[i] += distance < 1e-10 * largest_norm ? 0 : w * distance;  // values all equal: a tie
    to.doubt[i] += w * tolerance * (distance + largest_norm);
  }
}

// Everything of one (b, kv head) but its victim. `scores`: fp64, of every valid slot; `doubts`: what two of
// them may differ by and still be one of the other's.
void check_item(const DecodeProblem& before, const DecodeProblem& after, size_t item,
                std::vector<double>& scores, std::vector<double>& doubts, DecodeCheck& check) {
  const DecodeShape& s = before.shape;
  const size_t D = s.head_dim, G = s.group(), S = s.n_slots;
  const double infinity = std::numeric_limits<double>::infinity();
  const int b = static_cast<int>(item) / s.n_kv_heads, h = static_cast<int>(item) % s.n_kv_heads;
  const int step = before.step_pos[b], slot = before.slot_of_new_token(b, h);
  const int n = std::max(before.held(b, h), slot + 1);

  // The cache: the new row in its slot, every other byte as it was.
  DecodeProblem want;  // this item alone
  want.shape = s;
  want.shape.batch = want.shape.n_kv_heads = 1;
  const auto part = [&](const auto& of, size_t width) {
    return std::vector(of.begin() + item * width, of.begin() + (item + 1) * width);
  };
  const auto same = [&](const auto& a, const auto& of) {
    return a.empty() || std::memcmp(a.data(), of.data() + item * a.size(), a.size() * sizeof(a[0])) == 0;
  };
  const size_t words = S * before.row_words();
  want.k = part(before.k, words), want.v = part(before.v, words);
  if (s.fp8()) {
    want.k_scale = part(before.k_scale, s.scale_stride());
    want.v_scale = part(before.v_scale, s.scale_stride());
  }
  std::vector<int32_t> positions(before.positions.begin() + item * S,
                                 before.positions.begin() + (item + 1) * S);
  if (slot >= 0) {
    want.set_row(want.k, want.k_scale, 0, slot, &before.k_new[item * D]);
    want.set_row(want.v, want.v_scale, 0, slot, &before.v_new[item * D]);
    positions[slot] = step;
  }
  if (!same(want.k, after.k) || !same(want.k_scale, after.k_scale))
    report(check, "b {} head {}: K differs from the cache with the new row in slot {}", b, h, slot);
  if (!same(want.v, after.v) || !same(want.v_scale, after.v_scale))
    report(check, "b {} head {}: V differs from the cache with the new row in slot {}", b, h, slot);
  if (!std::equal(positions.begin(), positions.end(), after.positions.begin() + item * S))
    report(check, "b {} head {}: positions differ", b, h);
  if (!before.count.empty() && step >= 0 && after.count[item] != n)
    report(check, "b {} head {}: count: expected {}, found {}", b, h, n, after.count[item]);

  std::vector<float> keys(n * D), values(n * D);
  for (int i = 0; i < n; ++i) {
    std::ranges::copy(want.row(want.k, want.k_scale, 0, i), keys.begin() + i * D);
    std::ranges::copy(want.row(want.v, want.v_scale, 0, i), values.begin() + i * D);
  }
  std::vector<double> weight(n, 0.0), norm(n, 0.0), logits(n), out(D);
  for (int i = 0; i < n; ++i)
    for (size_t d = 0; d < D; ++d) norm[i] += std::abs(static_cast<double>(values[i * D + d]));
  double largest = 0;
  LeftOut left_out{std::vector<double>(n, 0.0), std::vector<double>(n, 0.0)};
  for (size_t g = 0; g < G; ++g) {
    const size_t head = item * G + g;
    std::vector<float> q(D);
    for (size_t d = 0; d < D; ++d) q[d] = after.to_float(before.q[head * D + d]);
    double top = -infinity, sum = 0;
    for (int i = 0; i < n; ++i) {
      double dot = 0;
      for (size_t d = 0; d < D; ++d) dot += static_cast<double>(q[d]) * keys[i * D + d];
      logits[i] = dot / std::sqrt(static_cast<double>(D));
      top = std::max(top, logits[i]);
      largest = std::max(largest, std::abs(logits[i]));
    }
    for (double& l : logits) sum += l = std::exp(l - top);
    if (before.score == FusedScore::leave_one_out)
      leave_each_out(logits, values, D, 2e-5 + 2e-6 * largest, left_out);
    std::fill(out.begin(), out.end(), 0.0);
    for (int i = 0; i < n; ++i) {
      const double p = logits[i] / sum;
      weight[i] += p;
      for (size_t d = 0; d < D; ++d) out[d] += p * values[i * D + d];
    }
    double error = 0, size = 0;
    for (size_t d = 0; d < D; ++d) {
      const double found = after.to_float(after.out[head * D + d]);
      error += (found - out[d]) * (found - out[d]), size += out[d] * out[d];
      if (std::isnan(found)) error = infinity;
    }
    const double relative = error == 0 ? 0 : std::sqrt(error / std::max(size, 1e-12));
    check.output_error = std::max(check.output_error, relative);
    if (!(relative < (s.io() == DType::f16 ? 2e-3 : 6e-3) + 2e-6 * largest))
      report(check, "b {} query head {}: output error {:.3g}", b, h * G + g, relative);
  }

  scores.assign(n, 0.0), doubts.assign(n, 0.0);
  if (before.score == FusedScore::none || step < 0) return;
  const double tolerance = 2e-5 + 2e-6 * largest;
  for (int i = 0; i < n; ++i) {
    double base = weight[i];
    const size_t row = item * S + i;
    if (score_accumulates(before.score)) {
      base += i == slot ? 0 : before.accumulated[row];
      if (!(std::abs(after.accumulated[row] - base) <= tolerance * base + 1e-30))
        report(check, "b {} head {} slot {}: accumulated: expected {:.9g}, found {:.9g}", b, h, i, base,
               after.accumulated[row]);
    }
    if (score_uses_norm(before.score)) {
      if (!(std::abs(after.value_l1[row] - norm[i]) <= 1e-6 * norm[i]))
        report(check, "b {} head {} slot {}: |v|: expected {:.9g}, found {:.9g}", b, h, i, norm[i],
               after.value_l1[row]);
      base *= norm[i];
    }
    const bool leaves_out = before.score == FusedScore::leave_one_out;
    if (leaves_out) base = left_out.error[i];
    scores[i] = base * before.score_scale();
    if (leaves_out) doubts[i] = left_out.doubt[i] * before.score_scale();
    if (before.writes_importance) {
      const double found = after.importance[row];
      const double away = std::abs(found - scores[i]), error = away / std::max(scores[i], 1e-30);
      if (scores[i] > 1e-30 && scores[i] > doubts[i]) check.score_error = std::max(check.score_error, error);
      if (!(leaves_out ? away <= doubts[i] + 1e-30 : error <= tolerance))
        report(check, "b {} head {} slot {}: score: expected {:.9g}, found {:.9g}", b, h, i, scores[i],
               found);
    }
    const bool expected = should_protect(before, positions[i], slot >= 0 ? step : step - 1);
    const bool bit = (after.protect[item * protect_words(s) + i / 16] >> (i % 16)) & 1;
    if (bit != expected)
      report(check, "b {} head {} slot {} (position {}): protected: expected {}, found {}", b, h, i,
             positions[i], expected, bit);
  }
}

void check_victim(const DecodeProblem& before, const DecodeProblem& after, size_t item,
                  const std::vector<double>& scores, const std::vector<double>& doubts, DecodeCheck& check) {
  const uint64_t* keys = &after.victim_keys[item * kMaxDecodeSplits];
  const uint64_t key = *std::min_element(keys, keys + before.n_splits);
  auto is_protected = [&](int slot) {
    return (after.protect[item * protect_words(before.shape) + slot / 16] >> (slot % 16)) & 1;
  };
  const int n = static_cast<int>(scores.size());
  int best = -1;
  for (int i = 0; i < n; ++i)
    if (!is_protected(i) && (best < 0 || scores[i] < scores[best])) best = i;
  const int found = static_cast<int>(static_cast<uint32_t>(key));
  if (best < 0) {
    if (key != ~uint64_t{0}) report(check, "item {}: victim: expected none, found slot {}", item, found);
  } else if (key == ~uint64_t{0} || found >= n) {
    report(check, "item {}: victim: expected slot {}, found none", item, best);
  } else if (is_protected(found)) {
    report(check, "item {}: victim: slot {} is protected", item, found);
  } else if (found != best) {
    ++check.near_ties;
    if (!(scores[found] - doubts[found] <= scores[best] * (1 + 1e-4) + doubts[best] + 1e-30))
      report(check, "item {}: victim: expected slot {} ({:.9g}), found {} ({:.9g})", item, best, scores[best],
             found, scores[found]);
    if (scores[found] == scores[best])
      report(check, "item {}: tie: expected the lowest slot {}, found {}", item, best, found);
  }
}

}  // namespace

DecodeCheck check_decode_step(const DecodeProblem& before, const DecodeProblem& after) {
  const DecodeShape& s = before.shape;
  const size_t items = s.n_items();
  std::vector<std::vector<double>> scores(items), doubts(items);
  std::vector<DecodeCheck> checks(items);
  for_each_index(
      items, [&](size_t item) { check_item(before, after, item, scores[item], doubts[item], checks[item]); });
  for (size_t item = 0; item < items; ++item) {
    const int b = static_cast<int>(item) / s.n_kv_heads, h = static_cast<int>(item) % s.n_kv_heads;
    if (before.score == FusedScore::none || before.step_pos[b] < 0 || (before.shared && h > 0)) continue;
    for (int other = 1; before.shared && other < s.n_kv_heads; ++other)
      for (size_t i = 0; i < scores[item].size(); ++i) {
        scores[item][i] += scores[item + other][i];
        doubts[item][i] += doubts[item + other][i];
      }
    check_victim(before, after, item, scores[item], doubts[item], checks[item]);
  }
  DecodeCheck all;
  for (const DecodeCheck& c : checks) {
    if (all.failure.empty()) all.failure = c.failure;
    all.output_error = std::max(all.output_error, c.output_error);
    all.score_error = std::max(all.score_error, c.score_error);
    all.near_ties += c.near_ties;
  }
  return all;
}

}  // namespace kvlapse
