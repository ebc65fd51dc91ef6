#include "tests/support/kernels/rkv_problem.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <set>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/model/tensor_file.h"

namespace kvlapse {
namespace {

uint16_t to_bits16(float value, DType dtype) {
  if (dtype == DType::bf16) return f32_to_bf16(value);
  return f32_to_f16(value);
}
float from_bits16(uint16_t bits, DType dtype) {
  return dtype == DType::bf16 ? bf16_to_f32(bits) : f16_to_f32(bits);
}

// Z by rank in fp64.
std::vector<double> oracle(const RkvProblem& p, int item) {
  const RkvShape& s = p.shape;
  const int n = p.count[item], d = s.head_dim, group = s.n_q_heads / s.n_kv_heads, prefix = n - s.window;
  const int b = item / s.n_kv_heads, h = item % s.n_kv_heads;
  std::vector<std::vector<double>> key(n, std::vector<double>(d)), unit = key;
  for (int r = 0; r < n; ++r) {
    const int slot = p.order[static_cast<size_t>(item) * s.n_slots + r];
    double square = 0;
    for (int i = 0; i < d; ++i) {
      key[r][i] = p.get(p.k, (static_cast<size_t>(item) * s.n_slots + slot) * d + i);
      square += key[r][i] * key[r][i];
    }
    for (int i = 0; i < d; ++i) unit[r][i] = key[r][i] / (std::sqrt(square) + 1e-8);
  }
  std::vector<double> importance(prefix, 0.0);
  for (int w = 0; w < s.window; ++w) {
    std::vector<double> logit(prefix, -INFINITY);
    for (int g = 0; g < group; ++g)
      for (int r = 0; r < prefix; ++r) {
        double dot = 0;
        for (int i = 0; i < d; ++i)
          dot += key[r][i] *
                 p.get(p.q, ((static_cast<size_t>(b) * s.window + w) * s.n_q_heads + h * group + g) * d + i);
        logit[r] = std::max(logit[r], dot / std::sqrt(static_cast<double>(d)));
      }
    const double top = *std::max_element(logit.begin(), logit.end());
    double sum = 0;
    for (double x : logit) sum += std::exp(x - top);
    for (int r = 0; r < prefix; ++r) importance[r] += std::exp(logit[r] - top) / sum / s.window;
  }
  std::vector<double> mean(n, 0.0);
  for (int i = 0; i < n; ++i) {
    std::vector<double> row(n);
    int last = 0;
    for (int j = 0; j < n; ++j) {
      row[j] = 0;
      for (int e = 0; e < d && j != i; ++e) row[j] += unit[i][e] * unit[j][e];
      if (row[j] > s.threshold) last = j;
    }
    row[last] = 0;
    for (int j = 0; j < n; ++j) mean[j] += row[j] / n;
  }
  const double top = *std::max_element(mean.begin(), mean.end());
  double sum = 0;
  for (double x : mean) sum += std::exp(x - top);
  std::vector<double> z(prefix);
  for (int r = 0; r < prefix; ++r) {
    double pooled = 0;
    for (int j = std::max(0, r - s.kernel / 2); j <= std::min(prefix - 1, r + s.kernel / 2); ++j)
      pooled = std::max(pooled, importance[j]);
    z[r] = s.lambda * pooled - (1 - static_cast<double>(s.lambda)) * std::exp(mean[r] - top) / sum;
  }
  return z;
}

}  // namespace

RkvProblem::RkvProblem(const RkvShape& s) : shape(s) {
  const size_t bytes = dtype_bytes(s.dtype), slots = static_cast<size_t>(s.n_items()) * s.n_slots;
  q.resize(static_cast<size_t>(s.batch) * s.window * s.n_q_heads * s.head_dim * bytes);
  k.resize(slots * s.head_dim * bytes);
  v = k;
  order.resize(slots);
  for (size_t i = 0; i < slots; ++i) order[i] = static_cast<int32_t>(i % s.n_slots);
  positions.assign(slots, -1);
  value_l1.assign(slots, 0);
  scores.assign(slots, 0);
  count.assign(s.n_items(), 0);
  evicted.assign(static_cast<size_t>(s.n_items()) * (s.n_slots - s.budget), -1);
}

void RkvProblem::set(std::vector<std::byte>& to, size_t index, float value) const {
  if (shape.dtype == DType::f32) {
    std::memcpy(to.data() + index * 4, &value, 4);
  } else {
    const uint16_t bits = to_bits16(value, shape.dtype);
    std::memcpy(to.data() + index * 2, &bits, 2);
  }
}
float RkvProblem::get(const std::vector<std::byte>& from, size_t index) const {
  if (shape.dtype == DType::f32) {
    float value;
    std::memcpy(&value, from.data() + index * 4, 4);
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, from.data() + index * 2, 2);
  return from_bits16(bits, shape.dtype);
}

void RkvProblem::append(int b, int pos, const float* k_rows, const float* v_rows) {
  for (int h = 0; h < shape.n_kv_heads; ++h) {
    const int item = b * shape.n_kv_heads + h, rank = count[item]++;
    const size_t row = static_cast<size_t>(item) * shape.n_slots, slot = row + order[row + rank];
    float l1 = 0;
    for (int i = 0; i < shape.head_dim; ++i) {
      set(k, slot * shape.head_dim + i, k_rows[h * shape.head_dim + i]);
      set(v, slot * shape.head_dim + i, v_rows[h * shape.head_dim + i]);
      l1 += std::fabs(get(v, slot * shape.head_dim + i));
    }
    positions[slot] = pos;
    value_l1[slot] = l1;
  }
}

void RkvProblem::set_queries(int b, const float* rows) {
  const size_t n = static_cast<size_t>(shape.window) * shape.n_q_heads * shape.head_dim;
  for (size_t i = 0; i < n; ++i) set(q, b * n + i, rows[i]);
}

RkvProblem make_rkv_problem(const RkvShape& shape, const std::vector<int>& held, uint64_t seed) {
  RkvProblem p(shape);
  const int d = shape.head_dim;
  const auto normal = [&](uint64_t a, uint64_t b, uint64_t c) {
    float sum = 0;
    for (uint64_t i = 0; i < 4; ++i) sum += unit_float(counter_random({seed, a, b, c, i}));
    return (sum - 2.0f) * 1.7f;
  };
  for (int b = 0; b < shape.batch; ++b) {
    std::vector<float> k(static_cast<size_t>(shape.n_kv_heads) * d), v = k;
    for (int h = 0; h < shape.n_kv_heads; ++h) {  // ranks in another order than slots
      const int item = b * shape.n_kv_heads + h;
      auto begin = p.order.begin() + static_cast<ptrdiff_t>(item) * shape.n_slots;
      for (int i = shape.budget - 1; i > 0; --i)
        std::swap(begin[i],
                  begin[counter_random({seed, 9, static_cast<uint64_t>(item), static_cast<uint64_t>(i)}) %
                        static_cast<uint64_t>(i + 1)]);
    }
    for (int pos = 0; pos < held[b]; ++pos) {
      for (int h = 0; h < shape.n_kv_heads; ++h)
        for (int i = 0; i < d; ++i) {
          // A third of the tokens lies near one of 20 centres.
          const auto item = static_cast<uint64_t>(b * shape.n_kv_heads + h);
          const auto at = static_cast<uint64_t>(pos), e = static_cast<uint64_t>(i);
          const uint64_t centre = counter_random({seed, 5, item, at}) % 60;
          k[h * d + i] = normal(1 + item, at, e) * (centre < 20 ? 0.6f : 1.0f) +
                         (centre < 20 ? normal(1000 + item, centre, e) : 0.0f);
          v[h * d + i] = normal(2000 + item, at, e);
        }
      p.append(b, pos, k.data(), v.data());
    }
    std::vector<float> queries(static_cast<size_t>(shape.window) * shape.n_q_heads * d);
    for (size_t i = 0; i < queries.size(); ++i)
      queries[i] = normal(3000 + static_cast<uint64_t>(b), i, 0) * 1.5f;
    p.set_queries(b, queries.data());
  }
  return p;
}

RkvCheck check_rkv(const RkvProblem& before, const RkvProblem& after, bool has_scores) {
  RkvCheck check;
  const RkvShape& s = before.shape;
  const auto wrong = [&](int item, const std::string& what) {
    if (check.failure.empty()) check.failure = fmt::format("head {}: {}", item, what);
  };
  const size_t row_bytes = s.head_dim * dtype_bytes(s.dtype);
  for (int item = 0; item < s.n_items(); ++item) {
    const size_t base = static_cast<size_t>(item) * s.n_slots;
    const int n = before.count[item];
    if (n < s.budget) {
      if (after.count[item] != n || !std::equal(before.order.begin() + static_cast<ptrdiff_t>(base),
                                                before.order.begin() + static_cast<ptrdiff_t>(base) + n,
                                                after.order.begin() + static_cast<ptrdiff_t>(base)))
        wrong(item, "changed below the budget");
      continue;
    }
    if (after.count[item] != s.budget) {
      wrong(item, fmt::format("expected {} tokens, found {}", s.budget, after.count[item]));
      continue;
    }
    const std::vector<double> z = oracle(before, item);
    std::vector<int> slot_of(1 << 16, -1), rank_of(1 << 16, -1);  // by position, before
    for (int r = 0; r < n; ++r) {
      const int slot = before.order[base + r];
      slot_of[before.positions[base + slot]] = slot;
      rank_of[before.positions[base + slot]] = r;
    }
    const int prefix = n - s.window, kept = s.budget - s.window;
    std::vector<double> sorted = z;
    std::sort(sorted.begin(), sorted.end(), std::greater<>());
    const double most = std::max(std::fabs(sorted.front()), std::fabs(sorted.back()));
    const double cut = prefix > kept ? 0.5 * (sorted[kept - 1] + sorted[kept]) : -INFINITY,
                 close = 2e-6 * most;
    std::set<int> slots;
    double last = INFINITY;
    for (int r = 0; r < s.budget; ++r) {
      const int slot = after.order[base + r];
      if (slot < 0 || slot >= s.budget || !slots.insert(slot).second) {
        wrong(item, fmt::format("rank {}: slot {} is out of range or taken twice", r, slot));
        break;
      }
      const int pos = after.positions[base + slot];
      if (pos < 0 || rank_of[pos] < 0) {
        wrong(item, fmt::format("rank {}: position {} was not held", r, pos));
        break;
      }
      const size_t from = (base + slot_of[pos]) * row_bytes, to = (base + slot) * row_bytes;
      if (std::memcmp(&before.k[from], &after.k[to], row_bytes) != 0 ||
          std::memcmp(&before.v[from], &after.v[to], row_bytes) != 0 ||
          before.value_l1[base + slot_of[pos]] != after.value_l1[base + slot])
        wrong(item, fmt::format("position {}: its row changed", pos));
      const int old = rank_of[pos];
      if (r >= kept) {
        if (old != prefix + r - kept) wrong(item, fmt::format("rank {}: expected the window's token", r));
        continue;
      }
      if (old >= prefix) {
        wrong(item, fmt::format("rank {}: a token of the window", r));
        continue;
      }
      if (z[old] < cut - close)
        wrong(item, fmt::format("kept position {} of score {}, the cut is {}", pos, z[old], cut));
      if (z[old] > last + close) wrong(item, fmt::format("rank {}: order of scores", r));
      check.near_ties += z[old] < sorted[kept - 1] ? 1 : 0;
      last = z[old];
    }
    if (has_scores)
      for (int r = 0; r < prefix; ++r)
        check.score_error = std::max(check.score_error, std::fabs(after.scores[base + r] - z[r]) / most);
    int gone = 0;
    for (int i = 0; i < s.n_slots - s.budget; ++i) {
      const int pos = after.evicted[static_cast<size_t>(item) * (s.n_slots - s.budget) + i];
      if (i >= n - s.budget) {
        if (pos != -1) wrong(item, "evicted: expected -1 behind the victims");
        continue;
      }
      ++gone;
      if (pos < 0 || rank_of[pos] < 0 || z[rank_of[pos]] > cut + close)
        wrong(item, fmt::format("evicted position {}", pos));
    }
    if (gone != n - s.budget) wrong(item, "evicted: not all victims");
  }
  return check;
}

std::string run_rkv_golden(const std::string& path, int batch,
                           const std::function<void(RkvProblem&)>& compact) {
  const auto file = open_safetensors(path);
  const auto number = [&](const char* key) {
    for (const auto& [name, value] : file->metadata())
      if (name == key) return std::stoi(value);
    fail("{}: no metadata {}", path, key);
  };
  const auto floats = [&](const char* name) { return reinterpret_cast<const float*>(file->get(name).data); };
  const auto ints = [&](const char* name) { return reinterpret_cast<const int32_t*>(file->get(name).data); };
  RkvShape shape;
  shape.batch = batch;
  shape.n_q_heads = number("Hq"), shape.n_kv_heads = number("Hkv"), shape.head_dim = number("D");
  shape.budget = number("budget");
  shape.dtype = DType::f32;
  const int T = number("T"), prompt = number("prompt"), divide = number("divide");
  shape.n_slots = shape.budget + divide;
  RkvProblem p(shape);
  const float *q = floats("q"), *k = floats("k"), *v = floats("v");
  const int32_t *steps = ints("rkv_zefancai.step"), *kept = ints("rkv_zefancai.kept");
  const int kv = shape.n_kv_heads * shape.head_dim, width = shape.n_q_heads * shape.head_dim;
  int step = 0;
  for (int t = 0; t < T; ++t) {
    for (int b = 0; b < shape.batch; ++b) p.append(b, t, k + t * kv, v + t * kv);
    if (t < prompt || step >= static_cast<int>(file->get("rkv_zefancai.step").elements()) || t != steps[step])
      continue;
    for (int b = 0; b < shape.batch; ++b) p.set_queries(b, q + (t - shape.window + 1) * width);
    const RkvProblem before = p;
    compact(p);
    if (const RkvCheck check = check_rkv(before, p, false); !check.failure.empty())
      return fmt::format("step {}: {}", t, check.failure);
    for (int item = 0; item < p.n_items(); ++item) {
      std::vector<int> found;
      for (int r = 0; r < p.count[item]; ++r)
        found.push_back(p.positions[static_cast<size_t>(item) * shape.n_slots +
                                    p.order[static_cast<size_t>(item) * shape.n_slots + r]]);
      std::sort(found.begin(), found.end());
      const int32_t* want =
          kept + (static_cast<ptrdiff_t>(step) * shape.n_kv_heads + item % shape.n_kv_heads) * shape.budget;
      if (!std::equal(found.begin(), found.end(), want, want + shape.budget)) {
        int differ = 0;
        for (int pos : found) differ += !std::binary_search(want, want + shape.budget, pos);
        return fmt::format("step {}, head {}: {} of {} positions differ from the reference", t, item, differ,
                           shape.budget);
      }
    }
    ++step;
  }
  return step > 10 ? "" : "too few steps";
}

}  // namespace kvlapse
