// SharedLayer: what every configuration of a replay has in common about one (sequence, layer): K and V of all
// tokens and, for a block of consecutive queries at a time, logits, exponentials and full-cache attention.
// Computed once, read by any number of configurations. load() is for one thread at a time (it uses the TBB
// arena it runs in); everything else is const and thread-safe between loads.
//
// Memory: [T] keys and values in fp32, (window + block) rows of Hq x T logits and two layouts of one block's
// exponentials.
#pragma once

#include <array>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>
#include <vector>

#include "replay/alike_keys.h"
#include "replay/row_source.h"

namespace kvlapse {

inline constexpr int kMetricSteps = 32;    // steps of one block of metrics; blocks start at multiples of it
inline constexpr int kTopK = 10;           // top-k recall
inline constexpr int kFutureHorizon = 32;  // steps of future missed mass
inline constexpr int kSinkTokens = 4;      // positions that "without sinks" leaves out
inline constexpr float kHotAttention = 0.01f;  // weight from which a token counts as attended (revival)

// About one query head at one step, over all tokens up to it.
struct AttentionRow {
  float max = 0;                                            // largest logit
  float base = 0;                                           // of exponentials (vector_math.h)
  float total = 0;                                          // their sum, vector_math order by position
  double unit() const { return std::numbers::ln2 * base; }  // an exponential is exp(logit - unit)
  float sinks = 0;                                          // part of it at positions below kSinkTokens
  float entropy = 0;                                        // nats
  float output_norm2 = 0;                                   // |o|^2 of the full cache's output
  float query_cosine = 1;                                   // with the query of the step before
  int n_top = 0;
  std::array<int32_t, kTopK> top{};                // positions of the largest weights
  std::vector<int32_t> hot;                        // positions with a weight above kHotAttention
  std::array<float, kFutureHorizon + 1> newest{};  // newest[j]: weight of the newest j tokens
  double older = 0;                                // sum over j in [1, kFutureHorizon] of 1 - newest[j]
};

struct SharedLayerNeeds {
  int window = 0;            // queries before a step whose logits are asked for
  bool all_queries = false;  // queries of every earlier step, not only the window's
  bool keys = false;         // K rows themselves, not only logits
  bool metrics = true;       // top, hot, newest and entropy
  int measured_from = 0;     // the first step that these are asked for
  float alike_above = 0;     // cosine above which keys count as alike; 0: not asked
  bool outputs = false;      // outputs of the full cache (the metrics make their own: ValueTile)
};

class SharedLayer {
 public:
  SharedLayer(const RowSource& source, int sequence, int layer, SharedLayerNeeds needs);

  // Makes steps [begin, end) current; end - begin <= kMetricSteps, begin a multiple of it. Blocks ascend and
  // touch.
  void load(int begin, int end);
  int begin() const { return begin_; }
  int end() const { return end_; }

  const CacheGeometry& geometry() const { return geometry_; }
  const RowSequence& sequence() const { return sequence_; }
  int layer() const { return layer_; }
  float scale() const { return scale_; }
  double rope_theta() const { return source_.rope_theta(); }

  // [T], step in [begin - window, end); -inf after the step.
  const float* logits(int q_head, int step) const {
    return logits_.data() + row_index(q_head, step) * stride_;
  }
  // exp(logit) / 2^base of one kv head's group: [T][columns], column (step - begin) * G + g; 0 after the
  // step.
  const float* token_weights(int kv_head) const {
    return token_weights_.data() + static_cast<size_t>(kv_head) * stride_ * token_columns();
  }
  size_t token_columns() const { return static_cast<size_t>(kMetricSteps) * group_; }
  size_t column(int q_head, int step) const {
    return static_cast<size_t>(step - begin_) * group_ + static_cast<size_t>(q_head % group_);
  }
  float exp_of(int q_head, int step, int pos) const {
    return token_weights(q_head / group_)[static_cast<size_t>(pos) * token_columns() + column(q_head, step)];
  }
  // The same as a row: [end()].
  const float* exps(int q_head, int step) const {
    return exps_.data() +
           (static_cast<size_t>(q_head / group_) * token_columns() + column(q_head, step)) * stride_;
  }
  const AttentionRow& row(int q_head, int step) const { return rows_[row_of(q_head, step)]; }
  // [D] output of the full cache. Only with needs.outputs, as AttentionRow::output_norm2.
  const float* output(int q_head, int step) const {
    return outputs_.data() + row_of(q_head, step) * geometry_.head_dim;
  }
  // [Hq, D], step in [begin - window, end), or [0, end) when all queries are kept; consecutive steps are
  // contiguous.
  const float* query(int step) const {
    return queries_.data() +
           static_cast<size_t>(step - first_query_) * geometry_.n_q_heads * geometry_.head_dim;
  }
  int window() const { return needs_.window; }
  const float* key(int kv_head, int pos) const { return keys_.data() + kv_index(kv_head, pos); }      // [D]
  const float* value(int kv_head, int pos) const { return values_.data() + kv_index(kv_head, pos); }  // [D]
  const float* value_l1(int kv_head) const {
    return value_l1_.data() + static_cast<size_t>(kv_head) * n_tokens_;
  }

  // Which keys up to end() are alike; null: not asked, or too many tokens for a matrix.
  const AlikeKeys* alike() const { return alike_ ? &*alike_ : nullptr; }

  // Bytes of one instance for a sequence of n_tokens.
  static size_t memory_bytes(const CacheGeometry& geometry, int n_tokens, SharedLayerNeeds needs);

 private:
  void load_head(int kv_head, int from);
  void summarise(int q_head, int step, float* exps);
  void find_top(const float* exps, size_t n, AttentionRow& row) const;
  void sum_outputs(int kv_head);
  size_t row_index(int q_head, int step) const {  // logits are a ring of rows
    return static_cast<size_t>(q_head) * row_capacity_ + static_cast<size_t>(step % row_capacity_);
  }
  size_t row_of(int q_head, int step) const {
    return static_cast<size_t>(q_head) * kMetricSteps + static_cast<size_t>(step - begin_);
  }
  size_t kv_index(int kv_head, int pos) const {
    return (static_cast<size_t>(kv_head) * n_tokens_ + pos) * geometry_.head_dim;
  }

  const RowSource& source_;
  CacheGeometry geometry_;
  RowSequence sequence_;
  int sequence_index_, layer_, n_tokens_;
  SharedLayerNeeds needs_;
  int row_capacity_, group_;  // row_capacity_: a multiple of kMetricSteps
  size_t stride_;  // T rounded up to 16, and 16 more so that rows do not fall on the same cache sets
  float scale_;
  int begin_ = 0, end_ = 0, first_query_ = 0;
  std::vector<float> keys_t_;         // [H, D, stride]
  std::vector<float> keys_, values_;  // [H, T, D]
  std::vector<float> value_l1_;       // [H, T]
  std::vector<float> queries_;        // [window + kMetricSteps or T, Hq, D]
  std::vector<float> logits_;         // [Hq, row_capacity, stride]
  std::vector<float> exps_;           // [H, kMetricSteps * G, stride]
  std::vector<float> token_weights_;  // [H, stride, kMetricSteps * G]
  std::vector<float> outputs_;        // [Hq, kMetricSteps, D]
  std::vector<AttentionRow> rows_;    // [Hq, kMetricSteps]
  std::optional<AlikeKeys> alike_;
  int n_compared_ = 0;  // tokens that alike_ holds
};

}  // namespace kvlapse
