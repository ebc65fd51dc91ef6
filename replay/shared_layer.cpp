#include "replay/shared_layer.h"

#include <tbb/task_arena.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "core/base/error.h"
#include "core/base/row_math.h"
#include "core/base/vector_math.h"
#include "replay/dense_kernels.h"
#include "replay/parallel_for.h"

namespace kvlapse {
namespace {

constexpr size_t kPad = 16;
constexpr int kReadTokens = 256;  // rows asked of the source at a time

size_t padded(int n) {
  return (static_cast<size_t>(n) + kPad - 1) / kPad * kPad + kPad;
}

int ring_rows(int window) {
  return kMetricSteps + (window + kMetricSteps - 1) / kMetricSteps * kMetricSteps;
}

bool compares_keys(const CacheGeometry& geometry, int n_tokens, const SharedLayerNeeds& needs) {
  return needs.alike_above > 0 && AlikeKeys::memory_bytes(geometry, n_tokens) <= AlikeKeys::kMostBytes;
}

}  // namespace

SharedLayer::SharedLayer(const RowSource& source, int sequence, int layer, SharedLayerNeeds needs)
    : source_(source),
      geometry_(source.geometry()),
      sequence_(source.sequence(sequence)),
      sequence_index_(sequence),
      layer_(layer),
      n_tokens_(sequence_.n_tokens),
      needs_(needs),
      row_capacity_(ring_rows(needs.window)),
      group_(geometry_.group()),
      stride_(padded(n_tokens_)),
      scale_(attention_scale(geometry_.head_dim)) {
  const int n_kv = geometry_.n_kv_heads, n_q = geometry_.n_q_heads, dim = geometry_.head_dim;
  keys_t_.assign(static_cast<size_t>(n_kv) * dim * stride_, 0.0f);
  values_.resize(static_cast<size_t>(n_kv) * n_tokens_ * dim);
  if (needs_.keys) keys_.resize(values_.size());
  value_l1_.resize(static_cast<size_t>(n_kv) * n_tokens_);
  queries_.resize(static_cast<size_t>(needs_.all_queries ? n_tokens_ : needs.window + kMetricSteps) * n_q *
                  dim);
  logits_.resize(static_cast<size_t>(n_q) * row_capacity_ * stride_);
  exps_.resize(static_cast<size_t>(n_q) * kMetricSteps * stride_);
  token_weights_.resize(exps_.size());
  if (needs_.outputs) outputs_.resize(static_cast<size_t>(n_q) * kMetricSteps * dim);
  rows_.resize(static_cast<size_t>(n_q) * kMetricSteps);
  if (compares_keys(geometry_, n_tokens_, needs_)) alike_.emplace(geometry_, n_tokens_, needs_.alike_above);

  std::vector<float> read(static_cast<size_t>(kReadTokens) * n_kv * dim);
  for (int first = 0; first < n_tokens_; first += kReadTokens) {
    const int n = std::min(kReadTokens, n_tokens_ - first);
    source_.rows(sequence, layer, RowKind::k, first, n, read.data());
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < n_kv; ++h) {
        const float* row = read.data() + (static_cast<size_t>(i) * n_kv + h) * dim;
        float* column = keys_t_.data() + static_cast<size_t>(h) * dim * stride_ + first + i;
        for (int d = 0; d < dim; ++d) column[static_cast<size_t>(d) * stride_] = row[d];
        if (needs_.keys) std::copy_n(row, dim, keys_.data() + kv_index(h, first + i));
      }
    source_.rows(sequence, layer, RowKind::v, first, n, read.data());
    for (int i = 0; i < n; ++i)
      for (int h = 0; h < n_kv; ++h) {
        const float* row = read.data() + (static_cast<size_t>(i) * n_kv + h) * dim;
        std::copy_n(row, dim, values_.data() + kv_index(h, first + i));
        value_l1_[static_cast<size_t>(h) * n_tokens_ + first + i] = l1_norm({row, static_cast<size_t>(dim)});
      }
  }
}

size_t SharedLayer::memory_bytes(const CacheGeometry& g, int n_tokens, SharedLayerNeeds needs) {
  const size_t rows = static_cast<size_t>(ring_rows(needs.window)), stride = padded(n_tokens);
  size_t floats = static_cast<size_t>(g.n_kv_heads) * g.head_dim * stride * (needs.keys ? 3 : 2);
  floats += static_cast<size_t>(g.n_kv_heads) * stride;
  floats += (needs.all_queries ? static_cast<size_t>(n_tokens) : rows) * g.n_q_heads * g.head_dim;
  floats += static_cast<size_t>(g.n_q_heads) * (rows + 2 * kMetricSteps) * stride;
  floats += static_cast<size_t>(g.n_q_heads) * kMetricSteps * g.head_dim;
  return floats * sizeof(float) +
         (compares_keys(g, n_tokens, needs) ? AlikeKeys::memory_bytes(g, n_tokens) : 0) +
         static_cast<size_t>(g.n_q_heads) * kMetricSteps * (sizeof(AttentionRow) + 256);
}

void SharedLayer::load(int begin, int end) {
  assert(end - begin <= kMetricSteps && end <= n_tokens_ && begin % kMetricSteps == 0);
  const int first = std::max(0, begin - needs_.window);
  const size_t query_floats = static_cast<size_t>(geometry_.n_q_heads) * geometry_.head_dim;
  int from = first;  // first row to compute
  if (end_ > 0 && begin == end_) {
    // The queries of the window before this block are still here: move them to the front. Their logits stay.
    if (!needs_.all_queries)
      std::move(queries_.begin() + static_cast<ptrdiff_t>((first - first_query_) * query_floats),
                queries_.begin() + static_cast<ptrdiff_t>((end_ - first_query_) * query_floats),
                queries_.begin());
    from = end_;
  }
  begin_ = begin;
  end_ = end;
  first_query_ = needs_.all_queries ? 0 : first;
  const int read_from = needs_.all_queries && from == first ? 0 : from;
  source_.rows(sequence_index_, layer_, RowKind::q, read_from, end - read_from,
               queries_.data() + static_cast<size_t>(read_from - first_query_) * query_floats);
  // Isolated: a caller may hold a lock that other work of this arena waits for.
  tbb::this_task_arena::isolate(
      [&] { parallel_for(0, geometry_.n_kv_heads, [&](int h) { load_head(h, from); }); });
  n_compared_ = end;
}

void SharedLayer::load_head(int h, int from) {
  const int dim = geometry_.head_dim;
  const auto group = static_cast<size_t>(group_);
  if (alike_)
    for (int first = n_compared_; first < end_;) {
      const int last = std::min(end_, (first / AlikeKeys::kBlock + 1) * AlikeKeys::kBlock);
      alike_->add(h, first, last, [&](int pos) { return key(h, pos); });
      first = last;
    }
  const size_t n_keys = padded(end_) - kPad;
  // As far as a later step looks back at a row.
  const size_t seen = std::min(stride_, static_cast<size_t>(end_ + needs_.window + kMetricSteps));
  for (int q = h * group_; q < (h + 1) * group_; ++q) {
    for (int first = from; first < end_;) {
      const int last =
          std::min(end_, (first / kMetricSteps + 1) * kMetricSteps);  // the ring's rows up to there touch
      dense::logits_block(keys_t_.data() + static_cast<size_t>(h) * dim * stride_, stride_, dim,
                          query(first) + static_cast<size_t>(q) * dim,
                          static_cast<size_t>(geometry_.n_q_heads) * dim, static_cast<size_t>(last - first),
                          n_keys, scale_, logits_.data() + row_index(q, first) * stride_, stride_);
      first = last;
    }
    for (int t = from; t < end_; ++t) {
      float* row = logits_.data() + row_index(q, t) * stride_;
      std::fill(row + t + 1, row + seen, -std::numeric_limits<float>::infinity());
    }
  }

  const size_t columns = token_columns(), used = static_cast<size_t>(end_ - begin_) * group;
  float* rows = exps_.data() + static_cast<size_t>(h) * columns * stride_;
  for (int t = begin_; t < end_; ++t)
    for (size_t g = 0; g < group; ++g)
      summarise(h * group_ + static_cast<int>(g), t,
                rows + (static_cast<size_t>(t - begin_) * group + g) * stride_);
  for (size_t m = used; m < columns; ++m) std::fill_n(rows + m * stride_, end_, 0.0f);
  dense::transpose(rows, stride_, columns, static_cast<size_t>(end_),
                   token_weights_.data() + static_cast<size_t>(h) * stride_ * columns, columns);
  if (needs_.outputs) sum_outputs(h);
}

void SharedLayer::sum_outputs(int h) {
  const auto dim = static_cast<size_t>(geometry_.head_dim);
  const size_t columns = token_columns();
  std::vector<float> sums(columns * dim);
  dense::weighted_rows(token_weights(h), columns, columns, nullptr, static_cast<size_t>(end_),
                       values_.data() + kv_index(h, 0), dim, sums.data());
  for (int t = begin_; t < end_; ++t)
    for (int q = h * group_; q < (h + 1) * group_; ++q) {
      AttentionRow& r = rows_[row_of(q, t)];
      float* o = outputs_.data() + row_of(q, t) * dim;
      const float* sum_row = sums.data() + column(q, t) * dim;
      for (size_t d = 0; d < dim; ++d) o[d] = sum_row[d] / r.total;
      r.output_norm2 = dot(o, o, dim);
    }
}

void SharedLayer::summarise(int q, int t, float* e) {
  const size_t n = static_cast<size_t>(t) + 1;
  const float* logit = logits(q, t);
  AttentionRow& r = rows_[row_of(q, t)];
  r.max = max_value({logit, n});
  if (std::isinf(r.max))
    fail("replay: layer {}, q head {}, step {}: expected finite logits, found {}", layer_, q, t, r.max);
  r.base = softmax_base(r.max);
  exp_over({logit, n}, r.base, {e, n});
  std::fill(e + n, e + end_, 0.0f);
  r.total = sum({e, n});
  if (!(r.total >= kLeastSharedSum))
    fail("replay: layer {}, q head {}, step {}: expected finite logits, found NaN", layer_, q, t);
  if (!needs_.metrics || t < needs_.measured_from) return;

  r.sinks = 0;
  for (size_t i = 0; i < std::min<size_t>(n, kSinkTokens); ++i) r.sinks += e[i];
  const float inverse = 1.0f / r.total;
  r.newest[0] = 0;
  r.older = 0;
  for (int j = 1; j <= kFutureHorizon; ++j) {
    r.newest[j] =
        r.newest[j - 1] + (static_cast<size_t>(j) <= n ? e[n - static_cast<size_t>(j)] * inverse : 0.0f);
    r.older += 1.0 - r.newest[j];
  }
  // log of the sum less the mean logit.
  r.entropy = log_over(r.total, r.base) - dot(e, logit, n) / r.total;

  if (t > 0) {
    const auto dim = static_cast<size_t>(geometry_.head_dim);
    const float *a = query(t) + static_cast<size_t>(q) * dim,
                *b = query(t - 1) + static_cast<size_t>(q) * dim;
    const float norms = std::sqrt(dot(a, a, dim) * dot(b, b, dim));
    r.query_cosine = norms > 0 ? dot(a, b, dim) / norms : 0.0f;
  }
  find_top(e, n, r);
}

// Candidates are the tokens above a threshold that falls until there are enough.
void SharedLayer::find_top(const float* e, size_t n, AttentionRow& r) const {
  constexpr float kFall = 0.0625f, kLeast = 1e-30f;
  thread_local std::vector<int32_t> candidates;
  candidates.resize(n);
  float threshold = kHotAttention * r.total;
  size_t found = dense::find_above(e, n, threshold, candidates.data());
  r.hot.assign(candidates.begin(), candidates.begin() + static_cast<ptrdiff_t>(found));
  r.n_top = static_cast<int>(std::min<size_t>(n, kTopK));
  const auto wanted = static_cast<size_t>(r.n_top);
  while (found < wanted && threshold > kLeast)
    found = dense::find_above(e, n, threshold *= kFall, candidates.data());
  if (found < wanted) found = dense::find_above(e, n, -1.0f, candidates.data());
  const auto end = candidates.begin() + static_cast<ptrdiff_t>(found);
  std::partial_sort(candidates.begin(), candidates.begin() + r.n_top, end,
                    [&](int32_t a, int32_t b) { return e[a] != e[b] ? e[a] > e[b] : a < b; });
  std::copy_n(candidates.begin(), r.n_top, r.top.begin());
}

}  // namespace kvlapse
