#include "kernels/cpu/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/base/rng.h"
#include "core/base/vector_math.h"

namespace kvlapse {
namespace {

int32_t first_maximum(std::span<const float> logits) {
  const float most = max_value(logits);
  return static_cast<int32_t>(std::find(logits.begin(), logits.end(), most) - logits.begin());
}

int32_t draw(std::span<const float> logits, const SampleRow& row, float most) {
  const auto n = static_cast<int32_t>(logits.size());
  std::vector<int32_t> order(n);
  std::iota(order.begin(), order.end(), 0);
  auto likelier = [&](int32_t a, int32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  const int32_t kept = row.top_k > 0 ? std::min<int32_t>(row.top_k, n) : n;
  std::partial_sort(order.begin(), order.begin() + kept, order.end(), likelier);
  order.resize(kept);

  // Sums in fp64 and in a fixed order.
  std::vector<double> mass(kept);
  double total = 0;
  for (int32_t i = 0; i < kept; ++i)
    total += mass[i] = std::exp((double{logits[order[i]]} - most) / row.temperature);
  int32_t n_nucleus = kept;
  if (row.top_p < 1) {
    double before = 0;
    for (n_nucleus = 0; n_nucleus < kept && (n_nucleus == 0 || before < row.top_p * total); ++n_nucleus)
      before += mass[n_nucleus];
    total = before;
  }
  double target = unit_double(row.random) * total;
  for (int32_t i = 0; i < n_nucleus; ++i) {
    target -= mass[i];
    if (target < 0) return order[i];
  }
  return order[n_nucleus - 1];
}

}  // namespace

SampleResult sample_token(std::span<const float> logits, const SampleRow& row, std::vector<float>& scratch) {
  SampleResult result;
  const int32_t best = first_maximum(logits);
  result.token = row.forced >= 0 ? row.forced : row.temperature > 0 ? draw(logits, row, logits[best]) : best;
  scratch.resize(std::max(scratch.size(), logits.size()));
  const float log_sum = softmax(logits, std::span(scratch).first(logits.size()));
  result.logprob = logits[result.token] - log_sum;
  float other = -std::numeric_limits<float>::infinity();
  if (result.token != best) {
    other = logits[best];
  } else {
    const auto at = static_cast<size_t>(best);
    other = std::max(max_value(logits.first(at)), max_value(logits.subspan(at + 1)));
  }
  result.margin = logits[result.token] - other;
  return result;
}

}  // namespace kvlapse
