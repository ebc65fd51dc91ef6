#include "replay/replay_memory.h"

#include <algorithm>
#include <limits>

#include "core/base/row_math.h"
#include "core/base/vector_math.h"
#include "replay/dense_kernels.h"

namespace kvlapse {
namespace {

void gather(const float* values, const int32_t* index, size_t n, float* out) {
  for (size_t i = 0; i < n; ++i) out[i] = values[index[i]];
}

}  // namespace

ReplayMemory::ReplayMemory(const SharedLayer& shared, int capacity)
    : shared_(shared), capacity_(static_cast<size_t>(capacity)) {
  const CacheGeometry& g = shared.geometry();
  logits_.resize(capacity_);
  output_.resize(static_cast<size_t>(g.n_q_heads) * g.head_dim);
  norms_.resize(g.n_kv_heads);
  ahead_.resize(g.n_kv_heads);
  moved_.resize(g.n_kv_heads);
  has_attention_.resize(g.n_q_heads);
  has_output_.resize(g.n_q_heads);
}

void ReplayMemory::store(const SlotTable& table, Pos pos, const TokenRows&) {
  const int group = shared_.geometry().group(), step = raw(pos);
  for (int h = 0; h < table.n_kv_heads(); ++h) {
    const auto slot = static_cast<size_t>(raw(table.next_slot(h)));
    if (!norms_[h].empty()) norms_[h][slot] = shared_.value_l1(h)[step];
    if (step >= ahead_[h].end) continue;
    const size_t columns = shared_.token_columns();
    const float* weights =
        shared_.token_weights(h) + static_cast<size_t>(step) * columns + shared_.column(h * group, step);
    for (int t = std::max(step, ahead_[h].begin); t < ahead_[h].end; ++t)
      for (int g = 0; g < group; ++g) ahead_row(h * group + g, t)[slot] = *weights++;
  }
}

void ReplayMemory::apply(const EvictionPlan& plan) {
  if (plan.reclaim == Reclaim::fill) return;
  for (std::vector<float>& norms : norms_) norms.clear();
  for (Ahead& ahead : ahead_) ahead.end = 0;
}

void ReplayMemory::attend(const SlotTable& table, Pos pos) {
  table_ = &table;
  step_ = raw(pos);
  std::fill(has_attention_.begin(), has_attention_.end(), char{0});
  std::fill(has_output_.begin(), has_output_.end(), char{0});
}

float* ReplayMemory::ahead_row(int q_head, int step) {
  const int group = shared_.geometry().group();
  Ahead& ahead = ahead_[q_head / group];
  return ahead.weights.data() +
         static_cast<size_t>((step - ahead.begin) * group + q_head % group) * capacity_;
}

// From this step to the end of its eight, or of this step alone when the one before was not asked for either.
void ReplayMemory::gather_ahead(int h) {
  Ahead& ahead = ahead_[h];
  const int group = shared_.geometry().group();
  ahead.begin = step_;
  ahead.end =
      ahead.asked == step_ - 1 ? std::min((step_ / kAheadSteps + 1) * kAheadSteps, shared_.end()) : step_ + 1;
  ahead.weights.resize(static_cast<size_t>(kAheadSteps) * group * capacity_);
  dense::gather_columns(shared_.token_weights(h) + shared_.column(h * group, step_), shared_.token_columns(),
                        static_cast<size_t>(ahead.end - ahead.begin) * group, index(h), count(h),
                        ahead.weights.data(), capacity_);
}

std::span<const float> ReplayMemory::logits(int q_head) {
  const int h = shared_.geometry().kv_head_of(q_head);
  gather(shared_.logits(q_head, step_), index(h), count(h), logits_.data());
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  for (const MovedKey& key : moved_[h])
    logits_[raw(key.slot)] =
        dot(shared_.query(step_) + static_cast<size_t>(q_head) * dim, key.turned.data(), dim) *
        shared_.scale();
  return {logits_.data(), count(h)};
}

// The shared exponentials are those of the held slots, unless these have so little of the weight that some of
// theirs are lost.
std::span<const float> ReplayMemory::attention(int q_head) {
  const int h = shared_.geometry().kv_head_of(q_head);
  if (step_ >= ahead_[h].end) gather_ahead(h);
  ahead_[h].asked = step_;
  const std::span<float> out(ahead_row(q_head, step_), count(h));
  if (has_attention_[q_head]) return out;
  has_attention_[q_head] = 1;
  const float total = moved_[h].empty() ? sum(out) : 0.0f;
  if (total >= kLeastSharedSum)
    scale(1.0f / total, out);  // the tail of softmax
  else
    softmax(logits(q_head), out);
  return out;
}

std::span<const float> ReplayMemory::output(int q_head) {
  const CacheGeometry& g = shared_.geometry();
  const int h = g.kv_head_of(q_head);
  const auto dim = static_cast<size_t>(g.head_dim);
  const std::span<float> out(output_.data() + static_cast<size_t>(q_head) * dim, dim);
  if (has_output_[q_head]) return out;
  has_output_[q_head] = 1;
  const std::span<const float> weights = attention(q_head);
  attention_output({shared_.value(h, 0), DType::f32, dim, index(h)}, weights.size(), dim, weights.data(), 0,
                   1, out.data(), 0);
  return out;
}

std::span<const float> ReplayMemory::value_l1(int kv_head) {
  std::vector<float>& norms = norms_[kv_head];
  if (norms.empty()) {
    norms.resize(capacity_);
    gather(shared_.value_l1(kv_head), index(kv_head), count(kv_head), norms.data());
  }
  return {norms.data(), count(kv_head)};
}

std::span<const float> ReplayMemory::keys(int kv_head) {
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  keys_.resize(std::max(keys_.size(), count(kv_head) * dim));
  for (size_t i = 0; i < count(kv_head); ++i)
    std::copy_n(shared_.key(kv_head, index(kv_head)[i]), dim, keys_.data() + i * dim);
  for (const MovedKey& key : moved_[kv_head])
    std::copy_n(key.turned.data(), dim, keys_.data() + static_cast<size_t>(raw(key.slot)) * dim);
  return {keys_.data(), count(kv_head) * dim};
}

std::span<const float> ReplayMemory::values(int kv_head) {
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  values_.resize(std::max(values_.size(), count(kv_head) * dim));
  for (size_t i = 0; i < count(kv_head); ++i)
    std::copy_n(shared_.value(kv_head, index(kv_head)[i]), dim, values_.data() + i * dim);
  return {values_.data(), count(kv_head) * dim};
}

bool ReplayMemory::last_alike(int kv_head, float threshold, std::span<int32_t> out) {
  const AlikeKeys* alike = shared_.alike();
  if (alike == nullptr || alike->threshold() != threshold) return false;
  alike->last_alike(kv_head, table_->positions(kv_head), out);
  return true;
}

std::span<const float> ReplayMemory::window_queries(int w) {
  const CacheGeometry& g = shared_.geometry();
  const int rows = std::min(w, step_ + 1);
  return {shared_.query(step_ + 1 - rows), static_cast<size_t>(rows) * g.n_q_heads * g.head_dim};
}

std::span<const float> ReplayMemory::window_logits(int q_head, int w) {
  const int h = shared_.geometry().kv_head_of(q_head);
  const int rows = std::min(w, step_ + 1);
  window_.resize(static_cast<size_t>(rows) * count(h));
  const auto dim = static_cast<size_t>(shared_.geometry().head_dim);
  for (int r = 0; r < rows; ++r) {
    const int step = step_ + 1 - rows + r;
    float* out = window_.data() + static_cast<size_t>(r) * count(h);
    if (step >= shared_.begin() - shared_.window()) {
      gather(shared_.logits(q_head, step), index(h), count(h), out);
      continue;
    }
    const float* query = shared_.query(step) + static_cast<size_t>(q_head) * dim;
    for (size_t i = 0; i < count(h); ++i)
      out[i] = index(h)[i] > step ? -std::numeric_limits<float>::infinity()
                                  : dot(query, shared_.key(h, index(h)[i]), dim) * shared_.scale();
  }
  return window_;
}

}  // namespace kvlapse
