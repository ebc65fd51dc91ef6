// ReplayDevice: an accelerator that replays many configurations (policy x budget) over one layer of one
// recording at once. Policies stay the definition: a configuration says what its score is made of
// (DeviceScore) and under which rule it evicts; supports() says whether a device serves it. replay/ turns
// policies into configurations and the answer into metrics; kernels/ implements it, the command line joins
// the two. One thread at a time.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/cache/geometry.h"
#include "core/policy/policy.h"

namespace kvlapse {

struct DeviceReplayConfig {
  DeviceScore score = DeviceScore::none;
  EvictionRule rule;
  int budget = 0;     // of this layer
  uint64_t seed = 0;  // of random scores
  // [H] positions that each head holds behind the cut of a prompt that exceeds the budget, in slot order;
  // empty: the prompt is held.
  std::vector<std::vector<int32_t>> prompt_kept = {};
};

// Numbers of one query head under one configuration over the measured steps.
struct DeviceHeadMetrics {
  int64_t low_recall = 0;
  double recall = 0, recall_no_sinks = 0, output_error = 0, cosine_error = 0, topk_recall = 0, missing = 0;
};

struct DeviceReplay {
  // What is asked for.
  CacheGeometry geometry;
  int layer = 0, n_tokens = 0, n_prompt = 0;
  int step_begin = 0, step_end = 0;  // positions that are measured; no step behind is replayed
  // Fills `out` with rows [first, first + n) of q [Hq, D], k or v [H, D].
  std::function<void(char kind, int first, int n, float* out)> rows;
  std::vector<DeviceReplayConfig> configs;
  bool metrics = true;  // false: `last` and `near_ties` alone

  // What comes back; spans are the device's until its next run. [config][H][T]: the step after which a token
  // is no longer held; one past the last while it is.
  std::span<const int32_t> last;
  std::vector<int64_t> near_ties;        // [config] victims within 1e-6 (relative) of the next lowest
  std::vector<DeviceHeadMetrics> heads;  // [config][Hq]
  // [config][Hq][4][sketch_bins::kBins]: missing, missing without sinks, output error, cosine error.
  std::span<const uint32_t> sketches;
  // [config][Hq][2][n_series]: mean recall and output error of the steps of each bin; NaN where it has none.
  std::span<const float> series;
  std::span<const double> future_missed;  // [config][H]
  // Of the recording. [T][H][kHorizon]: over the query heads of the kv head the sum of the weights at step t
  // of the tokens up to t - 1 - j.
  static constexpr int kHorizon = 32, kTop = 10, kSinks = 4;
  static constexpr float kHot = 0.01f;
  int n_series = 0;
  std::span<const float> older;
  std::span<const int32_t> last_hot;          // [H][T]: last measured step with a weight above kHot, -1: none
  std::vector<double> entropy, query_cosine;  // [Hq] sums over the measured steps
  // Seconds by stage: only when asked for, since each stage then waits for the one before.
  bool time_stages = false;
  std::vector<std::pair<std::string, double>> stages;
  double seconds = 0;  // all of it, transfers included
};

class ReplayDevice {
 public:
  virtual ~ReplayDevice() = default;
  virtual std::string describe() const = 0;
  // Throws Error: too little memory, logits that are not finite, no candidate for eviction.
  virtual void run(DeviceReplay& replay) = 0;

  // Whether every decision under this policy can be taken on a device: it declares its score, evicts at every
  // step and fills holes.
  static bool supports(const PolicyInfo& info) {
    const EvictionRule& rule = info.rule;
    return info.device != DeviceScore::none && info.evicts && !info.selects && !info.cache_positions &&
           rule.cadence == 1 && rule.reclaim == Reclaim::fill && !rule.ragged &&
           rule.cast == ScoreCast::fp32 && rule.ties != TieOrder::torch;
  }
};

}  // namespace kvlapse
