#include "replay/shared_layer.h"

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>

#include "core/base/error.h"
#include "core/base/row_math.h"
#include "core/base/vector_math.h"
#include "replay/dense_kernels.h"

namespace kvlapse {
namespace {

constexpr size_t kPad = 16;
constexpr int kReadTokens = 256;  // rows asked of the source at a time

size_t padded(int n) {
  return (static_cast<size_t>(n) + kPad - 1) / kPad * kPad + kPad;
}

}  // namespace

SharedLayer::SharedLayer(const RowSource& source, int sequence, int layer, SharedLayerNeeds needs,
                         int block_rows)
    : source_(source),
      geometry_(source.geometry()),
      sequence_(source.sequence(sequence)),
      sequence_index_(sequence),
      layer_(layer),
      n_tokens_(sequence_.n_tokens),
      needs_(needs),
      block_rows_(block_rows),
      row_capacity_(block_rows + needs.window),
      group_(geometry_.group()),
      stride_(padded(n_tokens_)),
      scale_(attention_scale(geometry_.head_dim)) {
  const int n_kv = geometry_.n_kv_heads, n_q = geometry_.n_q_heads, dim = geometry_.head_dim;
  keys_t_.assign(static_cast<size_t>(n_kv) * dim * stride_, 0.0f);
  values_.resize(static_cast<size_t>(n_kv) * n_tokens_ * dim);
  if (needs_.keys) keys_.resize(values_.size());
  value_l1_.resize(static_cast<size_t>(n_kv) * n_tokens_);
  queries_.resize(static_cast<size_t>(needs_.all_queries ? n_tokens_ : row_capacity_) * n_q * dim);
  logits_.resize(static_cast<size_t>(n_q) * row_capacity_ * stride_);
  exps_.resize(static_cast<size_t>(n_q) * block_rows_ * stride_);
  if (needs_.metrics) token_weights_.resize(exps_.size());
  if (needs_.metrics) outputs_.resize(static_cast<size_t>(n_q) * block_rows_ * dim);
  rows_.resize(static_cast<size_t>(n_q) * block_rows_);

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

size_t SharedLayer::memory_bytes(const CacheGeometry& g, int n_tokens, SharedLayerNeeds needs,
                                 int block_rows) {
  const size_t rows = static_cast<size_t>(block_rows) + needs.window, stride = padded(n_tokens);
  size_t floats = static_cast<size_t>(g.n_kv_heads) * g.head_dim * stride * (needs.keys ? 3 : 2);
  floats += static_cast<size_t>(g.n_kv_heads) * stride;
  if (needs.all_queries) floats += static_cast<size_t>(n_tokens) * g.n_q_heads * g.head_dim;
  floats += static_cast<size_t>(g.n_q_heads) *
            (rows + static_cast<size_t>(block_rows) * (needs.metrics ? 2 : 1)) * (stride + g.head_dim);
  floats += static_cast<size_t>(g.group()) * kMetricSteps * stride;
  return floats * sizeof(float) +
         static_cast<size_t>(g.n_q_heads) * block_rows * (sizeof(AttentionRow) + 256);
}

void SharedLayer::load(int begin, int end) {
  assert(end - begin <= block_rows_ && end <= n_tokens_ && begin % kMetricSteps == 0);
  const int first = std::max(0, begin - needs_.window);
  const size_t query_floats = static_cast<size_t>(geometry_.n_q_heads) * geometry_.head_dim;
  int from = first;  // first row to compute
  if (end_ > 0 && begin == end_) {
    // The window before this block is still here: move it to the front.
    const int kept = end_ - first;
    if (!needs_.all_queries)
      std::move(queries_.begin() + static_cast<ptrdiff_t>((first - first_row_) * query_floats),
                queries_.begin() + static_cast<ptrdiff_t>((end_ - first_row_) * query_floats),
                queries_.begin());
    for (int q = 0; q < geometry_.n_q_heads && kept > 0; ++q) {
      float* rows = logits_.data() + static_cast<size_t>(q) * row_capacity_ * stride_;
      float* source = rows + static_cast<size_t>(first - first_row_) * stride_;
      std::move(source, source + static_cast<size_t>(kept) * stride_, rows);
    }
    from = end_;
  }
  first_row_ = first;
  begin_ = begin;
  end_ = end;
  first_query_ = needs_.all_queries ? 0 : first;
  const int read_from = needs_.all_queries && from == first ? 0 : from;
  source_.rows(sequence_index_, layer_, RowKind::q, read_from, end - read_from,
               queries_.data() + static_cast<size_t>(read_from - first_query_) * query_floats);
  // Isolated: a caller may hold a lock that other work of this arena waits for.
  tbb::this_task_arena::isolate(
      [&] { tbb::parallel_for(0, geometry_.n_kv_heads, [&](int h) { load_head(h, from); }); });
}

void SharedLayer::load_head(int h, int from) {
  const int dim = geometry_.head_dim;
  const auto group = static_cast<size_t>(group_);
  const size_t n_keys = padded(end_) - kPad;
  for (int q = h * group_; q < (h + 1) * group_; ++q) {
    dense::logits_block(keys_t_.data() + static_cast<size_t>(h) * dim * stride_, stride_, dim,
                        query(from) + static_cast<size_t>(q) * dim,
                        static_cast<size_t>(geometry_.n_q_heads) * dim, static_cast<size_t>(end_ - from),
                        n_keys, scale_, logits_.data() + row_index(q, from) * stride_, stride_);
    for (int t = from; t < end_; ++t) {
      float* row = logits_.data() + row_index(q, t) * stride_;
      // As far as a later step looks back at this row.
      const size_t seen = std::min(stride_, static_cast<size_t>(end_) + needs_.window + block_rows_);
      std::fill(row + t + 1, row + seen, -std::numeric_limits<float>::infinity());
    }
  }

  // Rows of one block of metrics, [step * G + g][stride], then laid out as their readers want them.
  const size_t columns = token_columns();
  std::vector<float> rows(columns * stride_);
  for (int first = begin_; first < end_; first += kMetricSteps) {
    const int last = std::min(end_, first + kMetricSteps);
    for (int t = first; t < last; ++t)
      for (size_t g = 0; g < group; ++g)
        summarise(h * group_ + static_cast<int>(g), t,
                  rows.data() + (static_cast<size_t>(t - first) * group + g) * stride_);
    const size_t used = static_cast<size_t>(last - first) * group;
    for (size_t m = used; m < columns; ++m) std::fill_n(rows.data() + m * stride_, end_, 0.0f);
    const auto n = static_cast<size_t>(last);
    for (int t = first; t < last; ++t) {
      const float* from_rows = rows.data() + static_cast<size_t>(t - first) * group * stride_;
      float* out = exps_.data() +
                   (static_cast<size_t>(h) * block_rows_ + static_cast<size_t>(t - begin_)) * stride_ * group;
      for (size_t i = 0; i < n; ++i)
        for (size_t g = 0; g < group; ++g) out[i * group + g] = from_rows[g * stride_ + i];
    }
    if (!needs_.metrics) continue;
    auto* weights = const_cast<float*>(token_weights(h, first));
    constexpr size_t kTile = 16;
    for (size_t tile = 0; tile < n; tile += kTile)
      for (size_t i = tile; i < std::min(n, tile + kTile); ++i)
        for (size_t m = 0; m < columns; ++m) weights[i * columns + m] = rows[m * stride_ + i];
    std::vector<float> sums(columns * static_cast<size_t>(dim));
    dense::weighted_rows(weights, columns, columns, nullptr, n, values_.data() + kv_index(h, 0),
                         static_cast<size_t>(dim), sums.data());
    for (int t = first; t < last; ++t)
      for (size_t g = 0; g < group; ++g) {
        const int q = h * group_ + static_cast<int>(g);
        AttentionRow& r = rows_[row_of(q, t)];
        float* o = outputs_.data() + row_of(q, t) * static_cast<size_t>(dim);
        const float* sum_row =
            sums.data() + (static_cast<size_t>(t - first) * group + g) * static_cast<size_t>(dim);
        for (int d = 0; d < dim; ++d) o[d] = sum_row[d] / r.total;
        r.output_norm2 = dot(o, o, static_cast<size_t>(dim));
      }
  }
}

void SharedLayer::summarise(int q, int t, float* e) {
  const size_t n = static_cast<size_t>(t) + 1;
  const float* logit = logits(q, t);
  AttentionRow& r = rows_[row_of(q, t)];
  const dense::Peak most = dense::find_peak(logit, n);
  if (static_cast<size_t>(most.index) >= n || std::isinf(most.value))
    fail("replay: layer {}, q head {}, step {}: expected finite logits, found {}", layer_, q, t, most.value);
  r.max = most.value;
  r.argmax = most.index;
  exp_minus({logit, n}, r.max, {e, n});
  std::fill(e + n, e + end_, 0.0f);
  r.total = sum({e, n});
  if (!(r.total >= 1))
    fail("replay: layer {}, q head {}, step {}: expected finite logits, found NaN", layer_, q, t);
  if (!needs_.metrics) return;

  r.sinks = 0;
  for (size_t i = 0; i < std::min<size_t>(n, kSinkTokens); ++i) r.sinks += e[i];
  r.newest[0] = 0;
  for (int j = 1; j <= kFutureHorizon; ++j)
    r.newest[j] =
        r.newest[j - 1] + (static_cast<size_t>(j) <= n ? e[n - static_cast<size_t>(j)] / r.total : 0.0f);
  // E[logit - max] as a sum of e (logit - max) / total; terms with e = 0 vanish.
  r.entropy = std::log(r.total) - (dot(e, logit, n) / r.total - r.max);

  if (t > 0) {
    const auto dim = static_cast<size_t>(geometry_.head_dim);
    const float *a = query(t) + static_cast<size_t>(q) * dim,
                *b = query(t - 1) + static_cast<size_t>(q) * dim;
    const float norms = std::sqrt(dot(a, a, dim) * dot(b, b, dim));
    r.query_cosine = norms > 0 ? dot(a, b, dim) / norms : 0.0f;
  }

  r.hot.clear();
  const float hot = kHotAttention * r.total;
  for (size_t i = 0; i < n; ++i)
    if (e[i] > hot) r.hot.push_back(static_cast<int32_t>(i));
  r.n_top = static_cast<int>(std::min<size_t>(n, kTopK));
  auto heavier = [&](int32_t a, int32_t b) { return e[a] != e[b] ? e[a] > e[b] : a < b; };
  if (static_cast<int>(r.hot.size()) >= r.n_top) {
    std::vector<int32_t> best(r.n_top);
    std::partial_sort_copy(r.hot.begin(), r.hot.end(), best.begin(), best.end(), heavier);
    std::copy(best.begin(), best.end(), r.top.begin());
    return;
  }
  int held = 0;
  float lowest = -1;  // weight of the last entry once the list is full
  for (size_t i = 0; i < n; ++i) {
    if (held == r.n_top && !(e[i] > lowest)) continue;
    int at = held < r.n_top ? held++ : held - 1;
    for (; at > 0 && e[r.top[at - 1]] < e[i]; --at) r.top[at] = r.top[at - 1];
    r.top[at] = static_cast<int32_t>(i);
    lowest = held == r.n_top ? e[r.top[held - 1]] : -1;
  }
}

}  // namespace kvlapse
