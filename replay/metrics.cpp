#include "replay/metrics.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cmath>
#include <limits>
#include <optional>

#include "core/base/vector_math.h"
#include "replay/dense_kernels.h"

namespace kvlapse {
namespace {

// Below this share of the full mass the held tokens' exponentials may have underflowed: such a row is
// recomputed against its own maximum.
constexpr float kTinyMass = 1e-6f;
// So does a moved key whose logit lies this far above the row's maximum.
constexpr float kFarAbove = 10.0f;

constexpr int kWord = 64;
size_t words(int n) {
  return static_cast<size_t>((n + kWord - 1) / kWord);
}
void set_bit(std::vector<uint64_t>& bits, int at) {
  bits[static_cast<size_t>(at / kWord)] |= uint64_t{1} << (at % kWord);
}
// Bits [at - 32, at); below zero they are clear.
uint32_t bits_before(const std::vector<uint64_t>& bits, int at) {
  if (at <= 0) return 0;
  const auto word = static_cast<size_t>((at - 1) / kWord);
  const int used = at - static_cast<int>(word) * kWord;  // 1 .. 64 bits of that word
  const uint64_t low = word > 0 && used < 32 ? bits[word - 1] >> (kWord - (32 - used)) : 0;
  const uint64_t high = used < kWord ? bits[word] & ((uint64_t{1} << used) - 1) : bits[word];
  return static_cast<uint32_t>(used >= 32 ? high >> (used - 32) : high << (32 - used) | low);
}

}  // namespace

void QHeadMetrics::merge(const QHeadMetrics& other) {
  steps += other.steps;
  low_recall += other.low_recall;
  recall += other.recall;
  recall_no_sinks += other.recall_no_sinks;
  output_error += other.output_error;
  cosine_error += other.cosine_error;
  topk_recall += other.topk_recall;
  missing += other.missing;
  entropy += other.entropy;
  query_cosine += other.query_cosine;
  missing_sketch.merge(other.missing_sketch);
  missing_no_sinks_sketch.merge(other.missing_no_sinks_sketch);
  error_sketch.merge(other.error_sketch);
  cosine_sketch.merge(other.cosine_sketch);
}

void ProbeMetrics::merge(const ProbeMetrics& other) {
  correlations += other.correlations;
  correlation += other.correlation;
  victims += other.victims;
  fp16 += other.fp16;
  ulp += other.ulp;
  ties += other.ties;
}

void KvHeadMetrics::merge(const KvHeadMetrics& other) {
  steps += other.steps;
  retained += other.retained;
  held_sum += other.held_sum;
  held_peak = std::max(held_peak, other.held_peak);
  evictions += other.evictions;
  prompt_evictions += other.prompt_evictions;
  for (int c = 0; c < kTokenClasses; ++c) {
    evicted_by_class[c] += other.evicted_by_class[c];
    lifetime_by_class[c] += other.lifetime_by_class[c];
  }
  lifetime_sketch.merge(other.lifetime_sketch);
  revived += other.revived;
  future_missed += other.future_missed;
  future_mass += other.future_mass;
  churn += other.churn;
  prompt_tokens += other.prompt_tokens;
  prompt_kept += other.prompt_kept;
}

MetricsCollector::MetricsCollector(const SharedLayer& shared, const Retention& retention,
                                   const MetricScope& scope, bool selects)
    : shared_(shared), retention_(retention), selects_(selects), selected_(shared.geometry().n_kv_heads) {
  static_assert(kMetricSteps <= 32, "a step of a block is a bit");
  const CacheGeometry& g = shared.geometry();
  const int n_tokens = shared.sequence().n_tokens;
  metrics_.scope = {std::max(0, scope.head_begin), std::min(g.n_kv_heads, scope.head_end),
                    std::max(0, scope.step_begin), std::min(n_tokens, scope.step_end)};
  metrics_.q_heads.resize(g.n_q_heads);
  metrics_.kv_heads.resize(g.n_kv_heads);
  metrics_.held_by_step.resize(n_tokens);
  series_sums_.resize(static_cast<size_t>(kSeriesKinds) * g.n_q_heads * kSeriesBins);
  series_counts_.resize(series_sums_.size());
  previous_held_.assign(g.n_kv_heads, -1);
  previous_drops_.assign(g.n_kv_heads, 0);
  blocks_.resize(g.n_kv_heads);
  losses_.resize(g.n_kv_heads);
  moved_.resize(g.n_kv_heads);
  for (HeadLosses& losses : losses_) {
    losses.gone.resize(words(n_tokens));
    losses.decisions.resize(words(n_tokens));
    losses.revived.resize(n_tokens);
  }
}

size_t MetricsCollector::series_bin(int step) const {
  return static_cast<size_t>(step) * kSeriesBins / static_cast<size_t>(shared_.sequence().n_tokens);
}

void MetricsCollector::add_series(SeriesKind kind, int q_head, size_t bin, double value) {
  const size_t at = (static_cast<size_t>(kind) * metrics_.q_heads.size() + q_head) * kSeriesBins + bin;
  series_sums_[at] += value;
  ++series_counts_[at];
}

void MetricsCollector::on_attended(const SlotTable& table, int step) {
  const int group = shared_.geometry().group();
  const size_t bin = series_bin(step);
  const bool measured = metrics_.scope.has_step(step);
  for (int h = metrics_.scope.head_begin; h < metrics_.scope.head_end; ++h) {
    KvHeadMetrics& m = metrics_.kv_heads[h];
    const int held = table.count(h), before = previous_held_[h], drops = previous_drops_[h];
    previous_held_[h] = held;
    previous_drops_[h] = 0;
    if (!measured) continue;
    const double retained = static_cast<double>(held) / (step + 1);
    ++m.steps;
    m.retained += retained;
    m.held_sum += held;
    m.held_peak = std::max(m.held_peak, held);
    metrics_.held_by_step[step] += held;
    if (before >= 0) {
      const int both = before - drops, either = held + drops;
      m.churn += 1.0 - static_cast<double>(both) / either;
    }
    for (int q = h * group; q < (h + 1) * group; ++q) add_series(SeriesKind::retained, q, bin, retained);
  }
}

void MetricsCollector::on_evicted(const EvictionPlan& plan) {
  const int n_heads = shared_.geometry().n_kv_heads, step = raw(plan.step);
  const bool measured = metrics_.scope.has_step(step);
  for (const Drop& drop : plan.drops) {
    const int first = drop.kv_head == kWholeLayer ? 0 : drop.kv_head;
    const int end = drop.kv_head == kWholeLayer ? n_heads : drop.kv_head + 1;
    const int pos = raw(drop.pos);
    const auto c = static_cast<size_t>(token_class(pos, step, shared_.sequence().n_prompt));
    for (int h = first; h < end; ++h) {
      losses_[h].fresh.push_back(pos);
      ++previous_drops_[h];
      if (!measured || !metrics_.scope.has_head(h)) continue;
      KvHeadMetrics& m = metrics_.kv_heads[h];
      ++m.evictions;
      if (plan.reason == EvictionReason::prompt_over_budget) ++m.prompt_evictions;
      ++m.evicted_by_class[c];
      m.lifetime_by_class[c] += step - pos;
      m.lifetime_sketch.add(static_cast<float>(step - pos));
      losses_[h].victims.push_back(pos);
      set_bit(losses_[h].decisions, step);
    }
  }
}

void MetricsCollector::on_selected(const SlotTable& table, int step,
                                   const std::vector<std::vector<Slot>>& slots) {
  if (!metrics_.scope.has_step(step)) return;
  for (int h = metrics_.scope.head_begin; h < metrics_.scope.head_end; ++h) {
    std::vector<uint32_t>& mask = selected_[h][step / kMetricSteps];
    mask.resize(shared_.sequence().n_tokens, 0u);
    std::span<const Pos> positions = table.positions(h);
    for (Slot slot : slots[h]) mask[raw(positions[raw(slot)])] |= 1u << (step % kMetricSteps);
  }
}

bool MetricsCollector::reads(int h, int pos, int step) const {
  if (!selects_) return retention_.last(h)[pos] >= step;
  const auto block = selected_[h].find(step / kMetricSteps);
  return block != selected_[h].end() && ((block->second[pos] >> (step % kMetricSteps)) & 1u) != 0;
}

void MetricsCollector::on_moved(int h, int step, std::span<const MovedKey> moved) {
  if (!metrics_.scope.has_step(step) || !metrics_.scope.has_head(h)) return;
  const int group = shared_.geometry().group();
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  MovedBlock& block = moved_[h];
  for (const MovedKey& key : moved) {
    block.rows.push_back({step, raw(key.pos), block.logits.size()});
    for (int q = h * group; q < (h + 1) * group; ++q)
      block.logits.push_back(dot(shared_.query(step) + static_cast<size_t>(q) * dim, key.turned.data(), dim) *
                             shared_.scale());
  }
}

MetricsCollector::ExactRow MetricsCollector::exact_row(int q_head, int step,
                                                       std::span<const MovedRow> moved) const {
  const int h = shared_.geometry().kv_head_of(q_head), dim = shared_.geometry().head_dim;
  const int g = q_head % shared_.geometry().group();
  const float* logits = shared_.logits(q_head, step);
  const AttentionRow& row = shared_.row(q_head, step);
  std::vector<double> own(static_cast<size_t>(step) + 1, -std::numeric_limits<double>::infinity());
  for (int i = 0; i <= step; ++i)
    if (reads(h, i, step)) own[i] = logits[i];
  for (const MovedRow& key : moved) own[key.pos] = moved_[h].logits[key.logits + static_cast<size_t>(g)];
  const double most = *std::max_element(own.begin(), own.end());
  double total = 0, total_rest = 0, rest = 0;
  std::vector<double> sum(dim);
  for (int i = 0; i <= step; ++i) {
    own[i] = std::exp(own[i] - most);
    total += own[i];
    if (i < kSinkTokens) continue;
    total_rest += own[i];
    rest += std::exp(static_cast<double>(logits[i]) - row.unit());
  }
  ExactRow exact;
  for (int i = 0; i <= step; ++i) {
    if (own[i] == 0) continue;
    const float* value = shared_.value(h, i);
    for (int d = 0; d < dim; ++d) sum[d] += own[i] * value[d];
    const double weight = std::exp(static_cast<double>(logits[i]) - row.unit());
    exact.recall += std::min(weight / row.total, own[i] / total);
    if (i >= kSinkTokens && rest > 0) exact.recall_no_sinks += std::min(weight / rest, own[i] / total_rest);
  }
  exact.output.resize(dim);
  for (int d = 0; d < dim; ++d) exact.output[d] = static_cast<float>(sum[d] / total);
  return exact;
}

void MetricsCollector::on_probe(std::span<const double> correlations,
                                const Evictor::Sensitivity& sensitivity) {
  ProbeMetrics& m = metrics_.probe;
  for (size_t row = 0; row < correlations.size(); ++row) {
    const double correlation = correlations[row];
    const bool measured = correlations.size() == 1 || metrics_.scope.has_head(static_cast<int>(row));
    if (std::isnan(correlation) || !measured) continue;
    ++m.correlations;
    m.correlation += correlation;
  }
  m.victims = sensitivity.victims;
  m.fp16 = sensitivity.fp16;
  m.ulp = sensitivity.ulp;
  m.ties = sensitivity.ties;
}

void MetricsCollector::begin_outputs(int h, int begin, int end) {
  assert(begin / kMetricSteps == (end - 1) / kMetricSteps);
  const int32_t* last = retention_.last(h);
  HeadBlock& b = blocks_[h];
  HeadLosses& losses = losses_[h];
  b.begin = begin;
  b.end = end;
  b.changed.clear();
  b.side.assign(words(end), 0);
  if (selects_) {
    b.sum_dropped = false;
    for (int i = 0; i < end; ++i) b.changed.push_back(i);  // any token may come and go
  } else {
    std::erase_if(losses.fresh, [&](int32_t i) {
      if (last[i] >= begin) return false;
      set_bit(losses.gone, i);
      ++losses.n_gone;
      return true;
    });
    for (int32_t i : losses.fresh)
      if (last[i] < end - 1) b.changed.push_back(i);
    std::sort(b.changed.begin(), b.changed.end());
    const int n_kept = end - losses.n_gone - static_cast<int>(b.changed.size());
    b.sum_dropped = losses.n_gone <= n_kept;
    std::copy_n(losses.gone.begin(), b.side.size(), b.side.begin());
    if (!b.sum_dropped) {
      for (uint64_t& word : b.side) word = ~word;
      for (int32_t i : b.changed) b.side[static_cast<size_t>(i / kWord)] &= ~(uint64_t{1} << (i % kWord));
      if (end % kWord != 0) b.side.back() &= (uint64_t{1} << (end % kWord)) - 1;
    }
  }
  b.sums.assign(shared_.token_columns() * (static_cast<size_t>(shared_.geometry().head_dim) + 1), 0.0f);
}

void MetricsCollector::add_tile(int h, const ValueTile& tile) {
  static_assert(ValueTile::kTokens % kWord == 0 && ValueTile::kSpan == 2 * kWord && ValueTile::kChunk == 16);
  if (selects_) return;
  HeadBlock& b = blocks_[h];
  b.tokens.clear();
  b.spans.clear();
  b.chunks.clear();
  const size_t first = static_cast<size_t>(tile.first() / kWord), end = words(tile.end());
  constexpr uint64_t kAll = ~uint64_t{0};
  for (size_t w = first; w < end; ++w) {
    if (w % 2 == 0 && w + 1 < end && b.side[w] == kAll && b.side[w + 1] == kAll) {
      b.spans.push_back(static_cast<int32_t>(w / 2));
      ++w;
      continue;
    }
    const auto base = static_cast<int32_t>(w * kWord);
    for (int piece = 0; piece < kWord / ValueTile::kChunk; ++piece) {
      auto bits = static_cast<uint32_t>(b.side[w] >> (piece * ValueTile::kChunk)) & 0xffffu;
      if (bits == 0xffffu) {
        b.chunks.push_back(base / ValueTile::kChunk + piece);
        continue;
      }
      for (; bits != 0; bits &= bits - 1)
        b.tokens.push_back(base + piece * ValueTile::kChunk + std::countr_zero(bits));
    }
  }
  tile.add(b.tokens, b.spans, b.chunks, b.sums.data());
}

void MetricsCollector::finish_outputs(int h, const ValueTile& tile) {
  add_changed(h);
  add_moved(h);
  close_rows(h, tile);
  future(h);
  moved_[h].rows.clear();
  moved_[h].logits.clear();
  selected_[h].erase(blocks_[h].begin / kMetricSteps);
}

// Tokens evicted inside the block are part of the sum on one side of their eviction only.
void MetricsCollector::add_changed(int h) {
  HeadBlock& b = blocks_[h];
  const size_t n = b.changed.size(), columns = shared_.token_columns(),
               group = static_cast<size_t>(shared_.geometry().group());
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  if (n == 0) return;
  const int32_t* last = retention_.last(h);
  const float* weights = shared_.token_weights(h);
  b.changed_weights.resize(std::max(b.changed_weights.size(), n * columns));
  b.changed_rows.resize(std::max(b.changed_rows.size(), n * dim));
  for (size_t u = 0; u < n; ++u) {
    const int i = b.changed[u];
    const auto gone = static_cast<size_t>(last[i] + 1 - b.begin / kMetricSteps * kMetricSteps) * group;
    float* row = b.changed_weights.data() + u * columns;
    std::copy_n(weights + static_cast<size_t>(i) * columns, columns, row);
    if (selects_) {
      for (int t = b.begin; t < b.end; ++t)
        if (!reads(h, i, t)) std::fill_n(row + static_cast<size_t>(t % kMetricSteps) * group, group, 0.0f);
      std::copy_n(shared_.value(h, i), dim, b.changed_rows.data() + u * dim);
      continue;
    }
    std::fill(row + (b.sum_dropped ? 0 : gone), row + (b.sum_dropped ? gone : columns), 0.0f);
    std::copy_n(shared_.value(h, i), dim, b.changed_rows.data() + u * dim);
  }
  dense::weighted_rows(b.changed_weights.data(), columns, columns, nullptr, n, b.changed_rows.data(), dim,
                       b.sums.data());
  dense::sum_rows(b.changed_weights.data(), columns, columns, nullptr, n, b.sums.data() + columns * dim);
}

// What full attention and the cache's share of one row, `kept` being the mass of the held tokens as they
// stand now, in units of the full one.
MetricsCollector::Shared MetricsCollector::shared_mass(
    int q, int t, double kept, std::span<const MovedRow> moved,
    const std::array<bool, kSinkTokens>& reads_sink) const {
  const int h = shared_.geometry().kv_head_of(q), g = q % shared_.geometry().group();
  const AttentionRow& row = shared_.row(q, t);
  // Of the held tokens that stand as recorded: their mass, and that without sinks.
  const double outside = static_cast<double>(row.total) - row.sinks;
  Shared out;
  double now = 0, held_sinks = 0, now_rest = 0;
  for (int i = 0; i < std::min(kSinkTokens, t + 1); ++i)
    if (reads_sink[i]) held_sinks += shared_.exp_of(q, t, i);
  double now_sinks = held_sinks;
  std::vector<std::pair<double, double>> weights;  // as recorded, as it stands now
  for (const MovedRow& key : moved) {
    const double logit = moved_[h].logits[key.logits + static_cast<size_t>(g)];
    out.far_above |= logit - row.max > kFarAbove;
    const double before = shared_.exp_of(q, t, key.pos), after = std::exp(logit - row.unit());
    weights.emplace_back(before, after);
    now += after;
    if (key.pos < kSinkTokens)
      now_sinks += after - before;
    else
      now_rest += after;
  }
  const double total = kept * row.total, total_rest = total - now_sinks;
  const double still = std::max(0.0, total - now);
  out.recall = still * std::min(1 / static_cast<double>(row.total), 1 / total);
  const double still_rest = std::max(0.0, total_rest - now_rest);
  if (outside > 0 && total_rest > 0) out.recall_no_sinks = still_rest * std::min(1 / outside, 1 / total_rest);
  for (size_t i = 0; i < moved.size(); ++i) {
    const auto [before, after] = weights[i];
    out.recall += std::min(before / row.total, after / total);
    if (moved[i].pos >= kSinkTokens && outside > 0 && total_rest > 0)
      out.recall_no_sinks += std::min(before / outside, after / total_rest);
  }
  if (outside <= 1e-6 * row.total) out.recall_no_sinks = 1;
  return out;
}

void MetricsCollector::add_moved(int h) {
  HeadBlock& b = blocks_[h];
  const size_t columns = shared_.token_columns();
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  const int group = shared_.geometry().group();
  float* masses = b.sums.data() + columns * dim;
  for (const MovedRow& key : moved_[h].rows)
    for (int g = 0; g < group; ++g) {
      const int q = h * group + g;
      const size_t r = shared_.column(q, key.step);
      const AttentionRow& row = shared_.row(q, key.step);
      const float logit = moved_[h].logits[key.logits + static_cast<size_t>(g)];
      if (logit - row.max > kFarAbove) continue;  // close_rows computes that row anew
      float more = static_cast<float>(std::exp(logit - row.unit())) - shared_.exp_of(q, key.step, key.pos);
      if (b.sum_dropped) more = -more;
      masses[r] += more;
      float* sum = b.sums.data() + r * dim;
      const float* value = shared_.value(h, key.pos);
      for (size_t d = 0; d < dim; ++d) sum[d] += more * value[d];
    }
}

void MetricsCollector::close_rows(int h, const ValueTile& tile) {
  HeadBlock& b = blocks_[h];
  const int begin = b.begin, end = b.end, group = shared_.geometry().group();
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  const size_t columns = shared_.token_columns();
  const bool sum_dropped = b.sum_dropped;
  const float *weights = shared_.token_weights(h), *masses = b.sums.data() + columns * dim;
  const std::vector<MovedRow>& all_moved = moved_[h].rows;
  size_t first_moved = 0;
  for (int t = begin; t < end; ++t) {
    const size_t bin = series_bin(t);
    while (first_moved < all_moved.size() && all_moved[first_moved].step < t) ++first_moved;
    size_t end_moved = first_moved;
    while (end_moved < all_moved.size() && all_moved[end_moved].step == t) ++end_moved;
    const std::span<const MovedRow> moved(all_moved.data() + first_moved, end_moved - first_moved);
    std::array<bool, kSinkTokens> reads_sink{};
    for (int i = 0; i < std::min(kSinkTokens, t + 1); ++i) reads_sink[i] = reads(h, i, t);
    for (int q = h * group; q < (h + 1) * group; ++q) {
      const size_t r = shared_.column(q, t);
      const AttentionRow& row = shared_.row(q, t);
      const float* o = tile.output(r);
      const float mass = masses[r], total_inverse = 1.0f / row.total;
      double missing = sum_dropped ? mass / row.total : 1.0 - static_cast<double>(mass) / row.total;
      if (moved.empty()) missing = std::clamp(missing, 0.0, 1.0);
      double recall =
          1.0 - missing;  // where keys have moved: what the held tokens weigh now, above 1 perhaps
      if (!sum_dropped && moved.empty()) recall = std::min(1.0, static_cast<double>(mass) / row.total);

      // x = o~ - o.
      dense::Products products;
      std::optional<Shared> shared;
      if (!moved.empty()) shared = shared_mass(q, t, recall, moved, reads_sink);
      if (recall < kTinyMass || (shared && shared->far_above)) {
        const ExactRow exact = exact_row(q, t, moved);
        products = dense::combine_products(o, -1.0f, exact.output.data(), 1.0f, dim);
        if (shared) shared = {exact.recall, exact.recall_no_sinks};
      } else if (sum_dropped) {
        const auto kept_inverse = static_cast<float>(1.0 / recall);
        products = dense::combine_products(o, static_cast<float>(missing) * kept_inverse,
                                           b.sums.data() + r * dim, -total_inverse * kept_inverse, dim);
      } else {
        products = dense::combine_products(o, -1.0f, b.sums.data() + r * dim, 1.0f / mass, dim);
      }
      // 1 - cos from sin^2, which does not cancel.
      const double oo = tile.output_norm2(r), xx = products.xx, ox = products.ax;
      const double error = oo > 0 ? std::sqrt(xx / oo) : xx > 0 ? 1.0 : 0.0;
      const double tt = std::max(0.0, oo + 2 * ox + xx);
      double cosine_error = 0;
      if (oo > 0 && tt > 0) {
        const double cosine = (oo + ox) / std::sqrt(oo * tt);
        const double sine2 = std::max(0.0, oo * xx - ox * ox) / (oo * tt);
        cosine_error = cosine > 0 ? sine2 / (1 + std::min(1.0, cosine)) : 1 - cosine;
      }

      double held_sinks = 0;
      for (size_t i = 0; i < reads_sink.size(); ++i)
        if (reads_sink[i]) held_sinks += weights[i * columns + r];
      const double outside = static_cast<double>(row.total) - row.sinks;
      double missing_no_sinks = 0;
      if (outside > 1e-6 * row.total)
        missing_no_sinks = std::clamp(
            (missing * row.total - (static_cast<double>(row.sinks) - held_sinks)) / outside, 0.0, 1.0);
      if (shared) {
        recall = std::clamp(shared->recall, 0.0, 1.0);
        missing = 1.0 - recall;
        missing_no_sinks = 1.0 - std::clamp(shared->recall_no_sinks, 0.0, 1.0);
      }
      int top_held = 0;
      for (int i = 0; i < row.n_top; ++i) top_held += reads(h, row.top[i], t);

      QHeadMetrics& m = metrics_.q_heads[q];
      ++m.steps;
      m.low_recall += recall < kLowRecall;
      m.recall += recall;
      m.missing += missing;
      m.entropy += row.entropy;
      m.query_cosine += row.query_cosine;
      m.recall_no_sinks += 1.0 - missing_no_sinks;
      m.output_error += error;
      m.cosine_error += cosine_error;
      m.topk_recall += static_cast<double>(top_held) / row.n_top;
      m.missing_sketch.add(static_cast<float>(missing));
      m.missing_no_sinks_sketch.add(static_cast<float>(missing_no_sinks));
      m.error_sketch.add(static_cast<float>(error));
      m.cosine_sketch.add(static_cast<float>(cosine_error));
      add_series(SeriesKind::recall, q, bin, recall);
      add_series(SeriesKind::output_error, q, bin, error);
    }
  }
}

void MetricsCollector::future(int h) {
  static_assert(kFutureHorizon == 32, "a word of decisions");
  std::vector<float>& inverse_totals = blocks_[h].inverse_totals;
  const int begin = blocks_[h].begin, end = blocks_[h].end;
  const int group = shared_.geometry().group();
  const int32_t* last = retention_.last(h);
  KvHeadMetrics& m = metrics_.kv_heads[h];
  HeadLosses& losses = losses_[h];
  const size_t columns = shared_.token_columns();
  const float* weights = shared_.token_weights(h);
  inverse_totals.assign(columns, 0.0f);
  for (int t = begin; t < end; ++t)
    for (int q = h * group; q < (h + 1) * group; ++q)
      inverse_totals[shared_.column(q, t)] = 1.0f / shared_.row(q, t).total;
  for (int i : losses.victims) {
    const int from = std::max(begin, last[i] + 1), to = std::min(end, last[i] + kFutureHorizon + 1);
    if (from >= to) continue;
    const size_t first = shared_.column(h * group, from), n = static_cast<size_t>(to - from) * group;
    m.future_missed +=
        dot(weights + static_cast<size_t>(i) * columns + first, inverse_totals.data() + first, n);
  }
  for (int t = begin; t < end; ++t) {
    // Bit 32 - j: the step j before this one evicted.
    const uint32_t decided = bits_before(losses.decisions, t);
    for (int q = h * group; q < (h + 1) * group; ++q) {
      const AttentionRow& row = shared_.row(q, t);
      if (decided == ~uint32_t{0})
        m.future_mass += row.older;
      else
        for (uint32_t left = decided; left != 0; left &= left - 1)
          m.future_mass += 1.0 - row.newest[static_cast<size_t>(kFutureHorizon - std::countr_zero(left))];
      for (int32_t i : row.hot)
        if (last[i] < t && last[i] >= metrics_.scope.step_begin && !losses.revived[i]) {
          losses.revived[i] = 1;
          ++m.revived;
        }
    }
  }
  std::erase_if(losses.victims, [&](int i) { return last[i] + kFutureHorizon < end; });
}

LayerMetrics MetricsCollector::finish() {
  const RowSequence& sequence = shared_.sequence();
  for (int h = metrics_.scope.head_begin; h < metrics_.scope.head_end; ++h) {
    KvHeadMetrics& m = metrics_.kv_heads[h];
    m.prompt_tokens = sequence.n_prompt;
    for (int i = 0; i < sequence.n_prompt; ++i) m.prompt_kept += retention_.last(h)[i] == Retention::kHeld;
  }
  metrics_.series.resize(series_sums_.size());
  for (size_t i = 0; i < series_sums_.size(); ++i)
    metrics_.series[i] = series_counts_[i] > 0 ? static_cast<float>(series_sums_[i] / series_counts_[i])
                                               : std::numeric_limits<float>::quiet_NaN();
  return std::move(metrics_);
}

}  // namespace kvlapse
