#include "kernels/cpu/cpu_attention.h"

#include <algorithm>

#include "core/base/vector_math.h"
#include "kernels/cpu/activations.h"

namespace kvlapse {
namespace {

constexpr int kChunk = static_cast<int>(kValueChunk);
constexpr int kBlockRows = 8;  // queries of a prefill block that pass over K and V together

int chunks_of(int n_slots) {
  return (n_slots + kChunk - 1) / kChunk;
}

}  // namespace

void CpuAttention::decode(std::span<const CpuAttendRow> rows) {
  if (rows.empty()) return;
  const CacheGeometry& g = rows[0].store->geometry();
  const auto dim = static_cast<size_t>(g.head_dim), group = static_cast<size_t>(g.group());
  const float factor = attention_scale(g.head_dim);

  units_.clear();
  size_t most_units = 0;
  for (const CpuAttendRow& row : rows)
    most_units += static_cast<size_t>(g.n_kv_heads) * chunks_of(row.store->geometry().n_slots);
  units_.reserve(most_units);  // grows with the capacity, not with the tokens held
  for (int r = 0; r < static_cast<int>(rows.size()); ++r)
    for (int h = 0; h < g.n_kv_heads; ++h) {
      const int n = rows[r].table->count(h);
      for (int c = 0; c < chunks_of(n); ++c) units_.push_back({r, h, c, std::min(kChunk, n - c * kChunk)});
    }
  const int n_heads = static_cast<int>(rows.size()) * g.n_q_heads;
  const int64_t n_units = static_cast<int64_t>(units_.size());

  team_.run([&](int thread) {
    const Share mine = share_of(n_units, thread, team_.size());
    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const Unit& u = units_[i];
      CpuKvStore& store = *rows[u.row].store;
      const int q_head = u.kv_head * g.group(), first = u.chunk * kChunk;
      dot_rows(store.key_rows(u.kv_head, first), u.n_slots, dim, store.query() + q_head * dim, dim, group,
               factor, store.logits_row(q_head) + first, store.stride());
    }
    team_.barrier();

    const Share heads = share_of(n_heads, thread, team_.size());
    for (int64_t i = heads.begin; i < heads.end; ++i) {
      const CpuAttendRow& row = rows[i / g.n_q_heads];
      const int q_head = static_cast<int>(i % g.n_q_heads);
      const auto n = static_cast<size_t>(row.table->count(g.kv_head_of(q_head)));
      softmax({row.store->logits_row(q_head), n}, {row.store->weights_row(q_head), n});
    }
    team_.barrier();

    for (int64_t i = mine.begin; i < mine.end; ++i) {
      const Unit& u = units_[i];
      CpuKvStore& store = *rows[u.row].store;
      const int q_head = u.kv_head * g.group(), first = u.chunk * kChunk;
      weighted_rows(store.value_rows(u.kv_head, first), u.n_slots, dim, store.weights_row(q_head) + first,
                    store.stride(), group, store.partial(u.kv_head, u.chunk), dim);
    }
    team_.barrier();

    for (int64_t i = heads.begin; i < heads.end; ++i) {
      const CpuAttendRow& row = rows[i / g.n_q_heads];
      const int q_head = static_cast<int>(i % g.n_q_heads), h = g.kv_head_of(q_head);
      float* out = row.store->output_row(q_head);
      std::fill_n(out, dim, 0.0f);
      for (int c = 0; c < chunks_of(row.table->count(h)); ++c) {
        const float* partial = row.store->partial(h, c) + (q_head % g.group()) * dim;
        for (size_t d = 0; d < dim; ++d) out[d] += partial[d];
      }
      if (row.out) std::copy_n(out, dim, row.out + q_head * dim);
    }
  });
}

void CpuAttention::block(const CpuKvStore& store, int n_rows, int first_slots, const float* q,
                         size_t q_stride, float* out, size_t out_stride) {
  const int n_tiles = (n_rows + kBlockRows - 1) / kBlockRows, n_heads = store.geometry().n_kv_heads;
  std::atomic<int> next{0};
  team_.run([&](int thread) {
    // Later rows attend more: taken one by one so that the threads end together.
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n_tiles * n_heads;) {
      const int row = i / n_heads * kBlockRows;
      block_tile(store, row, std::min(kBlockRows, n_rows - row), first_slots, i % n_heads, q, q_stride, out,
                 out_stride, scratch_[thread]);
    }
  });
}

void CpuAttention::block_tile(const CpuKvStore& store, int row, int n_rows, int first_slots, int kv_head,
                              const float* q, size_t q_stride, float* out, size_t out_stride,
                              std::vector<float>& scratch) {
  const CacheGeometry& g = store.geometry();
  const auto dim = static_cast<size_t>(g.head_dim), group = static_cast<size_t>(g.group());
  const size_t q_head = static_cast<size_t>(kv_head) * group;
  const size_t fewest = static_cast<size_t>(first_slots + row) + 1, most = fewest + n_rows - 1;
  // The odd 16 keep the vectors' weights of one slot out of one cache set.
  const size_t stride = (most + 31) / 32 * 32 + 16, n_vectors = group * n_rows;
  // Queries of the tile side by side, their weights, their partial and total sums, and widened rows.
  const size_t widened_floats = std::max(g.dtype == DType::f32 ? 0 : kValueChunk, kColumnRows) * dim;
  scratch.resize(std::max(scratch.size(), n_vectors * (stride + 3 * dim) + widened_floats));
  float* queries = scratch.data();
  float* weights = queries + n_vectors * dim;
  float* partials = weights + n_vectors * stride;
  float* totals = partials + n_vectors * dim;
  float* widened = totals + n_vectors * dim;
  // Rows are widened once for all vectors of the tile.
  auto wide_rows = [&](RowView rows, size_t n) {
    if (rows.type == DType::f32) return rows;
    widen(rows.type, rows.data, n * dim, widened);
    return RowView{widened, DType::f32, dim, nullptr};
  };
  for (int r = 0; r < n_rows; ++r)
    std::copy_n(q + (row + r) * q_stride + q_head * dim, group * dim, queries + r * group * dim);

  // Slots that a query may not see are computed and left alone.
  for (size_t first = 0; first < most; first += kColumnRows) {
    const size_t n = std::min(kColumnRows, most - first);
    to_columns(store.key_rows(kv_head, static_cast<int>(first)), n, dim, widened);
    dot_columns(widened, n, dim, queries, dim, n_vectors, attention_scale(g.head_dim), weights + first,
                stride);
  }
  for (int r = 0; r < n_rows; ++r)
    for (size_t k = 0; k < group; ++k) {
      const std::span<float> row_weights(weights + (r * group + k) * stride, fewest + r);
      softmax(row_weights, row_weights);
    }

  std::fill_n(totals, n_vectors * dim, 0.0f);
  for (size_t first = 0; first < most; first += kValueChunk) {
    const RowView rows =
        wide_rows(store.value_rows(kv_head, static_cast<int>(first)), std::min(kValueChunk, most - first));
    if (first + kValueChunk <= fewest) {
      weighted_rows(rows, kValueChunk, dim, weights + first, stride, n_vectors, partials, dim);
    } else {
      for (int r = 0; r < n_rows; ++r) {
        const size_t seen = fewest + r, n = seen > first ? std::min(kValueChunk, seen - first) : 0;
        weighted_rows(rows, n, dim, weights + r * group * stride + first, stride, group,
                      partials + r * group * dim, dim);
      }
    }
    for (size_t i = 0; i < n_vectors * dim; ++i) totals[i] += partials[i];
  }
  for (int r = 0; r < n_rows; ++r)
    std::copy_n(totals + r * group * dim, group * dim, out + (row + r) * out_stride + q_head * dim);
}

}  // namespace kvlapse
