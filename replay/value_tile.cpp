#include "replay/value_tile.h"

#include <algorithm>
#include <array>
#include <cassert>

#include "core/base/vector_math.h"
#include "replay/dense_kernels.h"

namespace kvlapse {

void ValueTile::begin(const SharedLayer& shared, int kv_head) {
  shared_ = &shared;
  kv_head_ = kv_head;
  columns_ = shared.token_columns();
  dim_ = static_cast<size_t>(shared.geometry().head_dim);
  weights_ = shared.token_weights(kv_head);
  values_ = shared.value(kv_head, 0);
  first_ = end_ = 0;
  chunks_.resize(static_cast<size_t>(kTokens / kChunk) * sum_size());
  spans_.resize(static_cast<size_t>(kTokens / kSpan) * sum_size());
  totals_.assign(sum_size(), 0.0f);
  norms_.assign(columns_, 0.0f);
}

void ValueTile::add_rows(const int32_t* tokens, size_t first, size_t n, float* sum) const {
  const float *weights = weights_ + first * columns_, *values = values_ + first * dim_;
  dense::weighted_rows(weights, columns_, columns_, tokens, n, values, dim_, sum);
  dense::sum_rows(weights, columns_, columns_, tokens, n, sum + columns_ * dim_);
}

void ValueTile::load(int first, int end) {
  assert(first % kTokens == 0 && end - first <= kTokens);
  first_ = first;
  end_ = end;
  std::array<const float*, kSpan / kChunk> parts;
  const int n_chunks = (end - first + kChunk - 1) / kChunk;
  std::fill_n(chunks_.begin(), static_cast<size_t>(n_chunks) * sum_size(), 0.0f);
  for (int span = first; span < end; span += kSpan) {
    size_t n_parts = 0;
    for (int chunk = span; chunk < std::min(end, span + kSpan); chunk += kChunk) {
      float* sum = chunks_.data() + static_cast<size_t>((chunk - first) / kChunk) * sum_size();
      add_rows(nullptr, static_cast<size_t>(chunk), static_cast<size_t>(std::min(end - chunk, kChunk)), sum);
      parts[n_parts++] = sum;
    }
    float* sum = spans_.data() + static_cast<size_t>((span - first) / kSpan) * sum_size();
    std::fill_n(sum, sum_size(), 0.0f);
    dense::add_parts(parts.data(), n_parts, sum_size(), sum);
    const float* const whole = sum;
    dense::add_parts(&whole, 1, sum_size(), totals_.data());
  }
}

void ValueTile::add(std::span<const int32_t> tokens, std::span<const int32_t> spans,
                    std::span<const int32_t> chunks, float* sum) const {
  if (!tokens.empty()) add_rows(tokens.data(), 0, tokens.size(), sum);
  std::array<const float*, kTokens / kChunk> parts;
  size_t n_parts = 0;
  for (int32_t span : spans)
    parts[n_parts++] = spans_.data() + static_cast<size_t>(span - first_ / kSpan) * sum_size();
  for (int32_t chunk : chunks)
    parts[n_parts++] = chunks_.data() + static_cast<size_t>(chunk - first_ / kChunk) * sum_size();
  if (n_parts > 0) dense::add_parts(parts.data(), n_parts, sum_size(), sum);
}

size_t ValueTile::memory_bytes(const CacheGeometry& g) {
  const size_t columns = static_cast<size_t>(kMetricSteps) * g.group();
  return (kTokens / kChunk + kTokens / kSpan + 2) * columns * (static_cast<size_t>(g.head_dim) + 1) *
         sizeof(float);
}

void ValueTile::finish() {
  const int group = shared_->geometry().group();
  for (int t = shared_->begin(); t < shared_->end(); ++t)
    for (int q = kv_head_ * group; q < (kv_head_ + 1) * group; ++q) {
      const size_t column = shared_->column(q, t);
      float* o = totals_.data() + column * dim_;
      const float total = shared_->row(q, t).total;
      for (size_t d = 0; d < dim_; ++d) o[d] /= total;
      norms_[column] = dot(o, o, dim_);
    }
}

}  // namespace kvlapse
