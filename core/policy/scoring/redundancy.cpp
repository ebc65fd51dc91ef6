#include "core/policy/scoring/redundancy.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/base/row_math.h"
#include "core/base/vector_math.h"

namespace kvlapse {
namespace {

constexpr float kEpsilon = 1e-8f;
constexpr size_t kRows = 6, kChunk = 64;  // of the search for similar keys

std::vector<float> scaled_keys(std::span<const float> keys, int head_dim, bool by_square) {
  std::vector<float> unit(keys.size());
  const size_t d = head_dim;
  for (size_t i = 0; i < keys.size(); i += d) {
    if (!by_square) {
      unit_key(keys.subspan(i, d), &unit[i]);
      continue;
    }
    const float norm = std::sqrt(dot(&keys[i], &keys[i], d)), divisor = norm * norm + kEpsilon;
    for (size_t j = 0; j < d; ++j) unit[i + j] = keys[i + j] / divisor;
  }
  return unit;
}

// out[j] = mean over i of u_i . u_j, which is the product with the mean of all.
void mean_products(std::span<const float> unit, int head_dim, std::span<float> out) {
  const size_t n = out.size(), d = head_dim;
  std::vector<double> total(d, 0.0);
  for (size_t i = 0; i < n; ++i)
    for (size_t j = 0; j < d; ++j) total[j] += unit[i * d + j];
  std::vector<float> mean(d);
  for (size_t j = 0; j < d; ++j) mean[j] = static_cast<float>(total[j] / static_cast<double>(n));
  for (size_t j = 0; j < n; ++j) out[j] = dot(mean.data(), &unit[j * d], d);
}

// Softmax of the means without what is forgiven.
void weigh(std::span<const float> forgiven, std::span<float> out) {
  const float scale = 1.0f / static_cast<float>(out.size());
  for (size_t j = 0; j < out.size(); ++j) out[j] -= forgiven[j] * scale;
  softmax(out, out);
}

// Each row's forgiven entry, added to its column. Only the last cosine above the threshold must be known:
// found from the end, most rows need few products; kRows rows share the keys that they look at.
void search_forgiven(std::span<const float> unit, size_t d, float threshold, std::span<float> forgiven) {
  const size_t n = forgiven.size();
  std::vector<float> cosines(kRows * kChunk);
  for (size_t first = 0; first < n; first += kRows) {
    const size_t rows = std::min(kRows, n - first);
    bool found[kRows] = {};
    size_t left = rows;
    for (size_t end = n; end > 0 && left > 0;) {
      const size_t begin = end > kChunk ? end - kChunk : 0;
      dot_rows({&unit[begin * d], DType::f32, d, nullptr}, end - begin, d, &unit[first * d], d, rows, 1.0f,
               cosines.data(), kChunk);
      for (size_t r = 0; r < rows; ++r) {
        for (size_t j = end; j-- > begin && !found[r];) {
          const float cosine = j == first + r ? 0.0f : cosines[r * kChunk + j - begin];
          if (!(cosine > threshold) && j > 0) continue;
          forgiven[j] += cosine;  // slot 0 when nothing is alike
          found[r] = true;
          --left;
        }
      }
      end = begin;
    }
  }
}

}  // namespace

void unit_key(std::span<const float> key, float* out) {
  const float divisor = std::sqrt(dot(key.data(), key.data(), key.size())) + kEpsilon;
  for (size_t j = 0; j < key.size(); ++j) out[j] = key[j] / divisor;
}

void forgiving_redundancy(LayerInputs& inputs, int kv_head, int head_dim, float threshold,
                          std::span<float> out) {
  if (inputs.redundancy(kv_head, threshold, out)) return;
  const std::vector<float> unit = scaled_keys(inputs.keys(kv_head), head_dim, false);
  const size_t n = out.size(), d = head_dim;
  mean_products(unit, head_dim, out);
  std::vector<float> forgiven(n, 0.0f);
  std::vector<int32_t> alike(n);
  if (inputs.last_alike(kv_head, threshold, alike)) {
    for (size_t i = 0; i < n; ++i) {
      const auto j = static_cast<size_t>(std::max(alike[i], 0));  // slot 0 when nothing is alike
      if (j != i) forgiven[j] += dot(&unit[i * d], &unit[j * d], d);
    }
  } else {
    search_forgiven(unit, d, threshold, forgiven);
  }
  for (size_t i = 0; i < n; ++i) forgiven[i] += dot(&unit[i * d], &unit[i * d], d);
  weigh(forgiven, out);
}

void forgive(std::span<const float> own, std::span<const int32_t> similar, std::span<const float> cosine,
             std::span<float> out) {
  std::vector<float> forgiven(out.size(), 0.0f);
  for (size_t i = 0; i < out.size(); ++i) forgiven[static_cast<size_t>(similar[i])] += cosine[i];
  for (size_t i = 0; i < out.size(); ++i) forgiven[i] += own[i];
  weigh(forgiven, out);
}

void plain_redundancy(std::span<const float> keys, int head_dim, std::span<float> out) {
  mean_products(scaled_keys(keys, head_dim, true), head_dim, out);
  softmax(out, out);
}

}  // namespace kvlapse
