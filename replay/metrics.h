// Metrics of one configuration over one (sequence, layer): what the policy's cache keeps of the full cache's
// attention. They read SharedLayer and Retention only, never the decision's own arithmetic, in fixed blocks
// of kMetricSteps steps and in order of position, so that they depend on the victims alone: not on threads,
// blocking or the other configurations. Open loop: the reference is full attention over all recorded tokens.
//
// Per query head h and step t, with alpha the full attention and S the held tokens:
//   recall            sum over S of alpha; `missing` = 1 - recall. Where held keys have moved (positions
//                     inside the cache), what the two distributions share, sum over i of min(alpha_i,
//                     beta_i), beta the cache's own attention; without moved keys the two are the same
//   recall_no_sinks   the same over positions >= kSinkTokens, renormalised
//   output_error      |o~ - o| / |o|, o~ the attention output over S; o~ - o = m / (1 - m) (o - v_E) is
//   computed from
//                     the smaller of S and its complement E
//   cosine_error      1 - cos(o, o~)
//   topk_recall       share of the kTopK heaviest tokens that are held
// Per kv head: held tokens, evictions, lifetime at eviction, revival, future missed mass, churn, prompt
// survival.
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <vector>

#include "replay/replay_memory.h"
#include "replay/sketch.h"
#include "replay/value_tile.h"

namespace kvlapse {

inline constexpr int kSeriesBins = 256;  // bins of a series over the steps of a sequence
inline constexpr double kLowRecall = 0.9;
inline constexpr int kRecentTokens = 64;  // age below which an evicted token counts as recent

// Class of a token at its eviction.
enum class TokenClass : uint8_t { sink, prompt, think, recent };
inline constexpr int kTokenClasses = 4;
constexpr TokenClass token_class(int pos, int step, int n_prompt) {
  if (pos < kSinkTokens) return TokenClass::sink;
  if (pos < n_prompt) return TokenClass::prompt;
  return step - pos < kRecentTokens ? TokenClass::recent : TokenClass::think;
}
constexpr const char* token_class_name(TokenClass c) {
  constexpr const char* kNames[kTokenClasses] = {"sink", "prompt", "think", "recent"};
  return kNames[static_cast<int>(c)];
}

struct QHeadMetrics {
  int64_t steps = 0, low_recall = 0;  // low_recall: steps with a recall below kLowRecall
  double recall = 0, recall_no_sinks = 0, output_error = 0, cosine_error = 0, topk_recall = 0,
         missing = 0;                    // sums
  double entropy = 0, query_cosine = 0;  // sums; of the recording, the same for every configuration
  Sketch missing_sketch, missing_no_sinks_sketch, error_sketch, cosine_sketch;
  void merge(const QHeadMetrics& other);
};

struct KvHeadMetrics {
  int64_t steps = 0;
  double retained = 0;   // sum over steps of held / tokens seen
  int64_t held_sum = 0;  // sum over steps
  int held_peak = 0;
  int64_t evictions = 0, prompt_evictions = 0;
  std::array<int64_t, kTokenClasses> evicted_by_class{};
  std::array<int64_t, kTokenClasses> lifetime_by_class{};  // sums of ages at eviction
  Sketch lifetime_sketch;
  int64_t revived = 0;  // evicted tokens whose full attention later exceeded kHotAttention in some query head
  double future_missed = 0, future_mass = 0;  // numerator and denominator of future missed mass
  double churn = 0;  // sum over steps of the Jaccard distance of consecutive held sets
  int64_t prompt_tokens = 0, prompt_kept = 0;  // at the end
  void merge(const KvHeadMetrics& other);
};

enum class SeriesKind : uint8_t { recall, output_error, retained };
inline constexpr int kSeriesKinds = 3;

// Sampled decisions of one layer: see ScoreProbe.
struct ProbeMetrics {
  int64_t correlations = 0;  // score rows
  double correlation = 0;    // sum of the rank correlations of score and exact leave-one-out error
  int64_t victims = 0, fp16 = 0, ulp = 0, ties = 0;  // that would differ: Evictor::Sensitivity
  void merge(const ProbeMetrics& other);
};

// Which part of a layer is measured; every head and every step still decides. Steps are positions.
struct MetricScope {
  int head_begin = 0, head_end = INT32_MAX;  // kv heads, with their query heads
  int step_begin = 0, step_end = INT32_MAX;
  bool has_head(int kv_head) const { return kv_head >= head_begin && kv_head < head_end; }
  bool has_step(int step) const { return step >= step_begin && step < step_end; }
};

struct LayerMetrics {
  MetricScope scope;  // within the layer's heads and steps
  ProbeMetrics probe;
  std::vector<QHeadMetrics> q_heads;
  std::vector<KvHeadMetrics> kv_heads;
  // [T] sum over the measured kv heads of the tokens that attention saw; 0 in the prompt and where no step is
  // measured.
  std::vector<int32_t> held_by_step;
  // [kind][Hq][kSeriesBins] means over the bin's steps; NaN where a bin has none. Step t is in bin t * bins /
  // T.
  std::vector<float> series;
};

class MetricsCollector {
 public:
  // `selects`: every token is held and on_selected says which ones attention reads.
  MetricsCollector(const SharedLayer& shared, const Retention& retention, const MetricScope& scope = {},
                   bool selects = false);
  const MetricScope& scope() const { return metrics_.scope; }

  // After attention, before the eviction: what each head holds.
  void on_attended(const SlotTable& table, int step);
  void on_evicted(const EvictionPlan& plan);
  void on_selected(const SlotTable& table, int step, const std::vector<std::vector<Slot>>& slots);
  // Before the step's block is closed: the keys that attention reads where they were not recorded.
  void on_moved(int kv_head, int step, std::span<const MovedKey> moved);
  // A sampled decision: correlations of its score rows, and the evictor's counts so far.
  void on_probe(std::span<const double> correlations, const Evictor::Sensitivity& sensitivity);
  // Every step of [begin, end), within one loaded block and the scope, was decided. Heads are independent:
  // one thread each. Per measured head, in this order: begin_outputs; add_tile for every tile of [0, end);
  // finish_outputs with the finished tile. The split lets a driver pass one range of tokens through many
  // configurations while it is in the cache.
  void begin_outputs(int kv_head, int begin, int end);
  void add_tile(int kv_head, const ValueTile& tile);
  void finish_outputs(int kv_head, const ValueTile& tile);
  LayerMetrics finish();

 private:
  // What begin_outputs leaves for the calls after it.
  struct HeadBlock {
    int begin = 0, end = 0;
    bool sum_dropped = false;      // the smaller side is summed
    std::vector<uint64_t> side;    // [T] bits: of that side at every step of the block
    std::vector<int32_t> changed;  // evicted inside the block
    std::vector<float> sums;       // as ValueTile's
    std::vector<int32_t> tokens, spans, chunks;
    std::vector<float> changed_weights, changed_rows, inverse_totals;
  };
  // What a kv head lost before the current block, and since.
  struct HeadLosses {
    std::vector<uint64_t> gone;  // [T] bits
    int n_gone = 0;
    std::vector<int32_t> fresh;       // evicted later than `gone` says
    std::vector<uint64_t> decisions;  // [T] bits: steps that evicted
    std::vector<int32_t> victims;     // positions evicted in the last kFutureHorizon steps
    std::vector<char> revived;        // [T]
  };
  // A held key that has moved, as one step's attention sees it: logits_[G] at `logits`.
  struct MovedRow {
    int step = 0, pos = 0;
    size_t logits = 0;
  };
  struct MovedBlock {
    std::vector<MovedRow> rows;  // by step
    std::vector<float> logits;
  };
  // Attention over the held tokens of one row, in double precision against its own maximum.
  struct ExactRow {
    std::vector<float> output;
    double recall = 0, recall_no_sinks = 0;
  };
  // Whether attention reads the token at that step.
  bool reads(int kv_head, int pos, int step) const;
  void add_changed(int kv_head);
  void close_rows(int kv_head, const ValueTile& tile);
  void future(int kv_head);
  struct Shared {
    double recall = 0, recall_no_sinks = 0;
    bool far_above = false;  // a moved key outweighs the row: only an ExactRow will do
  };
  Shared shared_mass(int q_head, int step, double kept, std::span<const MovedRow> moved,
                     const std::array<bool, kSinkTokens>& reads_sink) const;
  ExactRow exact_row(int q_head, int step, std::span<const MovedRow> moved) const;
  // Puts what the moved keys weigh now in the place of what they weighed when recorded.
  void add_moved(int kv_head);
  size_t series_bin(int step) const;
  void add_series(SeriesKind kind, int q_head, size_t bin, double value);

  const SharedLayer& shared_;
  const Retention& retention_;
  bool selects_;
  // Per kv head and block of kMetricSteps: [T], bit (step % kMetricSteps) set when the token is selected.
  std::vector<std::map<int, std::vector<uint32_t>>> selected_;
  LayerMetrics metrics_;
  std::vector<double> series_sums_;  // like LayerMetrics::series
  std::vector<int32_t> series_counts_;
  std::vector<int> previous_held_, previous_drops_;
  std::vector<HeadLosses> losses_;  // [H]
  std::vector<HeadBlock> blocks_;   // [H]
  std::vector<MovedBlock> moved_;   // [H]
};

}  // namespace kvlapse
