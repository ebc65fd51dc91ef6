#include "core/policy/scoring/window_vote.h"

#include <vector>

#include "core/base/vector_math.h"

namespace kvlapse {

int window_logits_of(HeadRange heads, GqaRule rule, LayerInputs& inputs, int window, int n,
                     std::vector<float>& rows) {
  const int n_rows = static_cast<int>(inputs.window_logits(heads.begin, window).size()) / n;
  rows.resize(static_cast<size_t>(n_rows) * n);
  reduce_heads(heads, rule, rows, [&](int q) { return inputs.window_logits(q, window); });
  return n_rows;
}

void vote(std::span<const float> rows, int n_rows, int n, int width, bool mean, std::span<float> importance) {
  std::vector<float> weights(width);
  std::fill(importance.begin(), importance.end(), 0.0f);
  for (int r = 0; r < n_rows; ++r) {
    softmax(rows.subspan(static_cast<size_t>(r) * n, width), weights);
    for (size_t i = 0; i < importance.size(); ++i) importance[i] += weights[i];
  }
  if (!mean) return;
  const float scale = 1.0f / static_cast<float>(n_rows);
  for (float& v : importance) v *= scale;
}

void max_pool(std::span<const float> in, int kernel, std::span<float> out) {
  const int n = static_cast<int>(in.size()), half = kernel / 2;
  for (int i = 0; i < n; ++i) {
    float most = in[i];
    for (int j = std::max(0, i - half); j <= std::min(n - 1, i + half); ++j) most = std::max(most, in[j]);
    out[i] = most;
  }
}

void average_pool(std::span<const float> in, int kernel, std::span<float> out) {
  const int n = static_cast<int>(in.size()), half = kernel / 2;
  const float scale = 1.0f / static_cast<float>(kernel);
  for (int i = 0; i < n; ++i) {
    float total = 0;
    for (int j = std::max(0, i - half); j <= std::min(n - 1, i + half); ++j) total += in[j];
    out[i] = total * scale;
  }
}

}  // namespace kvlapse
