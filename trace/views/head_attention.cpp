#include "trace/views/head_attention.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "core/base/error.h"
#include "core/base/vector_math.h"

namespace kvlapse {
namespace {

constexpr int kReadBlock = 256;  // rows read at once

// Keys of one kv head, [n][D].
std::vector<float> read_keys(const TraceReader& reader, int sequence, int layer, int kv_head, int n) {
  const CacheGeometry& geometry = reader.header().geometry;
  const size_t dim = static_cast<size_t>(geometry.head_dim);
  std::vector<float> keys(static_cast<size_t>(n) * dim), rows;
  for (int first = 0; first < n; first += kReadBlock) {
    const int count = std::min(kReadBlock, n - first);
    rows.resize(static_cast<size_t>(count) * geometry.n_kv_heads * dim);
    reader.read_rows(sequence, layer, RowKind::k, first, count, rows.data());
    for (int i = 0; i < count; ++i) {
      std::copy_n(rows.data() + (static_cast<size_t>(i) * geometry.n_kv_heads + kv_head) * dim, dim,
                  keys.data() + static_cast<size_t>(first + i) * dim);
    }
  }
  return keys;
}

// Adds the softmax attention of one query over keys [0, n) to `mean`, divided by the group's size.
void add_attention(const CacheGeometry& geometry, const float* query, const float* keys, int n,
                   std::vector<float>& logits, float* mean) {
  const size_t dim = static_cast<size_t>(geometry.head_dim);
  const float factor = 1.0F / std::sqrt(static_cast<float>(geometry.head_dim));
  logits.resize(static_cast<size_t>(n));
  for (int pos = 0; pos < n; ++pos)
    logits[pos] = factor * dot(query, keys + static_cast<size_t>(pos) * dim, dim);
  softmax(logits, logits);
  add_scaled(1.0F / static_cast<float>(geometry.group()), logits, {mean, static_cast<size_t>(n)});
}

HeadAttention from_sketch(const TraceReader& reader, const LayerLife& life, int kv_head,
                          const std::function<bool()>& cancelled) {
  HeadAttention attention;
  attention.from_sketch = true;
  attention.received.assign(life.n_steps, 0);
  const int heads = life.n_kv_heads;
  for (int begin = 0; begin < life.n_steps; begin += kChunkSteps * 8) {
    if (cancelled && cancelled()) break;
    int first = 0;
    const auto rows = reader.sketches(life.sequence, life.layer, begin, begin + kChunkSteps * 8, &first);
    for (size_t i = static_cast<size_t>(kv_head); i < rows.size(); i += heads) {
      const int step = first + static_cast<int>(i) / heads;
      for (int j = 0; j < kSketchTop && rows[i].pos[j] >= 0; ++j) {
        attention.points.push_back({step, rows[i].pos[j], rows[i].weight[j]});
        if (rows[i].pos[j] < life.n_steps) attention.received[rows[i].pos[j]] += rows[i].weight[j];
      }
    }
  }
  return attention;
}

}  // namespace

HeadAttention read_head_attention(const TraceReader& reader, const LayerLife& life, int kv_head,
                                  const std::function<bool()>& cancelled) {
  const TraceHeader& header = reader.header();
  if (header.has_sketch(life.layer)) return from_sketch(reader, life, kv_head, cancelled);
  HeadAttention attention;
  if (!header.has_rows(life.layer)) {
    attention.absence =
        fmt::format("attention of layer {} was not recorded (tier {}); record with --tier sketch or qkv",
                    life.layer, tier_name(header.tier));
    return attention;
  }
  const CacheGeometry& geometry = header.geometry;
  const int n = life.n_steps, group = geometry.group();
  const double work = 0.5 * n * static_cast<double>(n) * geometry.head_dim * group;
  if (work > kMostAttentionWork) {
    attention.absence = fmt::format(
        "attention of {} tokens takes {:.0f} G multiplications a head; record with --tier sketch instead", n,
        work / 1e9);
    return attention;
  }
  const std::vector<float> keys = read_keys(reader, life.sequence, life.layer, kv_head, n);
  attention.received.assign(n, 0);
  attention.missed.assign(n, 0);
  const auto evicted = life.evicted(kv_head);
  const size_t dim = static_cast<size_t>(geometry.head_dim);
  std::vector<float> queries(dim * geometry.n_q_heads * kReadBlock), logits, mean(n);
  std::vector<int32_t> order(n);
  for (int step = 0; step < n; ++step) {
    const int row = step % kReadBlock;
    if (row == 0) {
      if (cancelled && cancelled()) break;
      reader.read_rows(life.sequence, life.layer, RowKind::q, step, std::min(kReadBlock, n - step),
                       queries.data());
    }
    std::fill_n(mean.begin(), step + 1, 0.0F);
    for (int g = 0; g < group; ++g) {
      const float* query =
          queries.data() +
          (static_cast<size_t>(row) * geometry.n_q_heads + static_cast<size_t>(kv_head) * group + g) * dim;
      add_attention(geometry, query, keys.data(), step + 1, logits, mean.data());
    }
    for (int pos = 0; pos <= step; ++pos)
      (evicted[pos] >= step ? attention.received : attention.missed)[pos] += mean[pos];
    const int top = std::min(kSketchTop, step + 1);
    std::iota(order.begin(), order.begin() + step + 1, 0);
    std::nth_element(order.begin(), order.begin() + top - 1, order.begin() + step + 1,
                     [&](int32_t a, int32_t b) { return mean[a] > mean[b]; });
    for (int j = 0; j < top; ++j) attention.points.push_back({step, order[j], mean[order[j]]});
  }
  return attention;
}

std::vector<float> read_attention_row(const TraceReader& reader, int sequence, int layer, int kv_head,
                                      int step) {
  const TraceHeader& header = reader.header();
  std::vector<float> mean;
  if (header.has_sketch(layer)) {
    int first = 0;
    const auto rows = reader.sketches(sequence, layer, step, step + 1, &first);
    if (rows.empty()) return mean;
    mean.assign(step + 1, 0);
    const SketchRow& row = rows[static_cast<size_t>(kv_head)];
    for (int j = 0; j < kSketchTop && row.pos[j] >= 0; ++j) {
      if (row.pos[j] <= step) mean[row.pos[j]] = row.weight[j];
    }
    return mean;
  }
  if (!header.has_rows(layer)) return mean;
  const CacheGeometry& geometry = header.geometry;
  const std::vector<float> keys = read_keys(reader, sequence, layer, kv_head, step + 1);
  const size_t dim = static_cast<size_t>(geometry.head_dim);
  std::vector<float> queries(dim * geometry.n_q_heads), logits;
  reader.read_rows(sequence, layer, RowKind::q, step, 1, queries.data());
  mean.assign(step + 1, 0);
  for (int g = 0; g < geometry.group(); ++g) {
    add_attention(geometry, queries.data() + (static_cast<size_t>(kv_head) * geometry.group() + g) * dim,
                  keys.data(), step + 1, logits, mean.data());
  }
  return mean;
}

}  // namespace kvlapse
