// Arguments of the kernels of a replay on a device (kernels/gpu/replay_kernels.cuh), by value, shared by
// host, device and emulator. A block of steps [t0, t1) is processed at a time:
//   values    their norms, and in half precision
//   logits    of every step, head and token, with the bits of dense::logits_block (replay/dense_kernels.h)
//   rows      in place: exponentials; what is of the recording alone
//   decide    victims of every configuration; sums in the order of core/base/vector_math.h
//   masses    what each configuration has dropped of them
//   future    what its victims would have got
//   outputs   of what it has dropped or of what it holds: output error
//   repairs   the same in fp32, of rows that outputs leaves
// and, once at the end, close and sum_future: sums, histograms and series over all steps. All pointers are
// device memory.
//
// Weights are laid out [step][kv head][position][lanes], lanes = group rounded up to 4, so that a slot's
// numbers for all query heads of a kv head are one or two loads of 16 bytes.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/base/sketch_bins.h"
#include "core/base/victim.h"

namespace kvlapse::gpu_replay {

inline constexpr int kMaxGroup = 8;  // query heads per kv head
inline constexpr int kMaxDim = 256;
inline constexpr int kMaxCluster = 8;  // blocks that share a task whose victims the layer shares
inline constexpr int kSumLanes = 16;   // of vector_math.h
inline constexpr int kRun = 32;        // positions whose largest logit is known
inline constexpr int kHorizon = 32, kTop = 10, kSinks = 4;
inline constexpr float kHot = 0.01f;
inline constexpr float kLargestHalf = 65504.0f;
// Exponentials are stated over a base (vector_math.h) that is this far below their row's: a configuration's
// held tokens may have as little as 2^-70 of the weight.
inline constexpr float kRowHeadBits = 96, kRowHead = 0x1p96f, kLog2 = 0.693147180559945f;
inline constexpr float kHalfScale = 32768.0f;  // in half precision they stay below 2^15.6
inline constexpr int32_t kHeld = 0x7f7f7f7f;   // a step that never comes; equal bytes

struct Shape {
  int32_t n_q = 0, n_kv = 0, dim = 0;
  int32_t n_tokens = 0;
  int32_t stride = 0;  // positions of a row: n_tokens rounded up to 64
  constexpr int group() const { return n_q / n_kv; }
  constexpr int lanes() const { return (group() + 3) / 4 * 4; }
  constexpr int dim_padded() const { return (dim + 15) / 16 * 16; }
  constexpr int64_t row(int step, int head) const {  // first weight of (step of the block, kv head)
    return (static_cast<int64_t>(step) * n_kv + head) * stride * lanes();
  }
};

// weights[s][h][i][g] = factor * q[s][h * G + g] . k[i][h] for i <= t0 + s; and the largest of every kRun
// positions.
struct LogitsArgs {
  static constexpr const char* kName = "replay_logits";
  static constexpr int kThreads = 128, kRows = 64, kColumns = 32, kWalk = 512, kBuffers = 2;
  Shape shape;
  const float* q;  // [t1 - t0, Hq, D]
  const float* k;  // [T, H, D]
  float* weights;
  float* peaks;  // [t1 - t0][H][stride / kRun][lanes]
  int32_t t0, t1;
  float factor;
  constexpr int row_tiles() const { return ((t1 - t0) * shape.group() + kRows - 1) / kRows; }
  constexpr int walks() const { return (t1 + kWalk - 1) / kWalk; }
  constexpr int n_blocks() const { return row_tiles() * walks() * shape.n_kv; }
  constexpr int smem_bytes() const { return shape.dim * (kRows + kBuffers * kColumns) * 4 + kBuffers * 8; }
};

enum class Reduce : uint8_t { mean, max, sum };  // as GqaRule

// One row of scores of one configuration: the state that a launch begins with and leaves behind.
struct DecideTask {
  DeviceScore score;
  Reduce gqa;
  uint8_t last_tie;            // the last slot goes first among equal scores
  uint8_t large;               // of the block's shared memory too large: weights in `scratch`
  int32_t head, n_heads;       // kv heads that share the victim
  int32_t trigger;             // more slots than this cause an eviction
  int32_t first_free, recent;  // protected: positions below first_free, the newest `recent`
  int32_t capacity;            // of the slot arrays, a multiple of 16
  int32_t begin;               // first step that it takes part in
  uint64_t seed;               // of (seed, layer, row)
  float scale;                 // of a contribution
  int32_t count, hole;         // slots in use; vacant one, -1: none
  int32_t failed;              // step whose scores were NaN or left no candidate, -1: none
  int64_t near_ties;
  int32_t* positions;     // [capacity]
  float* sums;            // [n_heads][capacity], accumulating scores only
  const float* value_l1;  // [H][T], contributions only
  int32_t* last;          // [H][T] of the configuration
  float* scratch;         // large: [cluster][weights of a block]
};

struct DecideArgs {
  static constexpr const char* kName = "replay_decide";
  Shape shape;
  DecideTask* tasks;
  const float* weights;  // exponentials
  int32_t n_tasks, cluster;
  int32_t t0, t1, n_prompt;
  int32_t n_threads;
  int32_t smem;  // bytes
  constexpr int n_blocks() const { return n_tasks * cluster; }
};
// Whether the score reads attention at all; keeps sums; reads norms.
constexpr bool attends(DeviceScore s) {
  return s != DeviceScore::position && s != DeviceScore::random && s != DeviceScore::none;
}
constexpr bool accumulates(DeviceScore s) {
  return s == DeviceScore::accumulated || s == DeviceScore::accumulated_contribution;
}
constexpr bool reads_l1(DeviceScore s) {
  return s == DeviceScore::contribution || s == DeviceScore::accumulated_contribution;
}
// Floats of one slot's weights: padded so that slots of several heads fall on different banks.
constexpr int slot_floats(int n_heads, int lanes) {
  return n_heads * lanes + (n_heads > 1 ? 4 : 0);
}
struct DecideLayout {
  int slots = 0;                                                               // of one block
  size_t positions = 0, sums = 0, norms = 0, weights = 0, fixed = 0, end = 0;  // byte offsets
};
// Shared memory of one block of a task: small exchange areas in front, then arrays by slot.
constexpr DecideLayout decide_layout(DeviceScore score, int n_heads, int lanes, int capacity, int cluster,
                                     bool large) {
  DecideLayout l;
  l.slots = capacity / cluster;
  const auto n = static_cast<size_t>(l.slots);
  const auto width = static_cast<size_t>(n_heads) * static_cast<size_t>(lanes);
  // Barriers; candidates of warps [2][32] and of blocks; sums of lanes [2][16][width], inverse totals and
  // the newest token's weights [width], its norms [2][heads].
  l.fixed = 64 + (64 + kMaxCluster) * 16 + 4 * (2 * kSumLanes + 2) * width + 8 * static_cast<size_t>(n_heads);
  l.positions = (l.fixed + 15) / 16 * 16;
  l.sums = l.positions + n * 4;
  l.norms = l.sums + (accumulates(score) ? n * 4 * static_cast<size_t>(n_heads) : 0);
  l.weights = l.norms + (reads_l1(score) ? n * 4 * static_cast<size_t>(n_heads) : 0);
  l.weights = (l.weights + 15) / 16 * 16;
  l.end =
      l.weights + (attends(score) && !large ? n * 4 * static_cast<size_t>(slot_floats(n_heads, lanes)) : 0);
  return l;
}

// What is of one (step, query head) of the recording.
struct RowFacts {
  float inverse;  // one over the sum of exponentials
  float outside;  // weight of the tokens behind the first kSinks
  int32_t n_top;
  int32_t top[kTop];
};

struct RowsArgs {
  static constexpr const char* kName = "replay_rows";
  static constexpr int kThreads = 256, kList = 128;
  Shape shape;
  float* weights;         // logits in, exponentials out
  const float* peaks;     // of the logits
  uint16_t* half;         // the same layout: kHalfScale / 2^kRowHeadBits times these in half precision
  const float* q;         // [t1 - t0, Hq, D]
  const float* before;    // [Hq, D] of step t0 - 1; null: there is none
  RowFacts* facts;        // [t1 - t0][Hq]; null: exponentials alone
  float* older;           // [T][H][kHorizon]
  int32_t* last_hot;      // [H][T]
  float* entropy;         // [T][Hq]
  float* query_cosine;    // [T][Hq]
  int32_t* failed;        // step + 1 of a row that is not finite
  int32_t t0, t1, begin;  // steps from `begin` on are measured
  constexpr int n_blocks() const { return (t1 - t0) * shape.n_kv; }
  constexpr int smem_bytes() const { return kThreads * 3 * 4 * shape.lanes() + kMaxGroup * (kList * 8 + 16); }
};

// Per (configuration, query head, step) from t_begin on: what later kernels close. [kind][config][Hq][T].
enum MetricKind { kMissing, kMissingRest, kTopHeld, kError, kCosine, kMetricKinds };

// Products of weights, in two parts of half precision each, and of ones for tokens that are gone.
struct MassesArgs {
  static constexpr const char* kName = "replay_masses";
  static constexpr int kThreads = 256, kSteps = 16, kTokens = 128, kConfigs = 32;
  // Shared memory: bytes of a token's weights, of a configuration's ones; both are padded.
  static constexpr int kWeightBytes = kSteps * 16 + 16, kOneBytes = kTokens * 2 + 16;
  Shape shape;
  const float* weights;  // exponentials
  const RowFacts* facts;
  const int32_t* last;  // [config][H][T]
  float* metrics;
  int32_t n_configs, t0, t1, begin;  // steps [max(t0, begin), t1) are measured
  constexpr int step_tiles() const { return (t1 - t0 + kSteps - 1) / kSteps; }
  constexpr int config_tiles() const { return (n_configs + kConfigs - 1) / kConfigs; }
  constexpr int quads() const { return shape.lanes() / 4; }
  constexpr int n_blocks() const { return step_tiles() * config_tiles() * quads() * shape.n_kv; }
  // And what is gone at some steps of a tile alone.
  constexpr int smem_bytes() const {
    return kTokens * kWeightBytes + kConfigs * kOneBytes + kConfigs * kSteps * 16;
  }
};

struct FutureArgs {
  static constexpr const char* kName = "replay_future";
  static constexpr int kThreads = 256;
  Shape shape;
  const float* weights;  // exponentials
  const RowFacts* facts;
  const int32_t* last;
  float* future;  // [config][H][T]
  int32_t n_configs, t0, t1, begin, scope_begin;
  constexpr int token_blocks() const { return (t1 + kThreads - 1) / kThreads; }
  constexpr int n_blocks() const { return token_blocks() * n_configs * shape.n_kv; }
  constexpr int smem_bytes() const { return 0; }
};

// l1[h][i] = sum over D of |v[i][h]|, in the order of vector_math.h; and v as half precision [H][T][D].
struct ValuesArgs {
  static constexpr const char* kName = "replay_values";
  static constexpr int kThreads = 128;
  Shape shape;
  const float* v;  // [T, H, D]
  float* l1;
  uint16_t* half;   // [H, T, dim_padded()]
  int32_t* beyond;  // token + 1 of a value that half precision does not hold
  int32_t t0, t1;
  constexpr int n_blocks() const { return ((t1 - t0) * shape.n_kv + kThreads - 1) / kThreads; }
  constexpr int smem_bytes() const { return 0; }
};

// A (step, row) whose held tokens have too little of the weight for a difference of sums, or for weights in
// half precision.
struct Repair {
  int32_t row, step;  // row: config * Hq + query head
};

// Output and cosine error. The smaller side, dropped or held tokens, is summed: its weights and values in
// half precision, fp32 sums, the sum of the weights among them, so that both sides are of one distribution.
// The full cache's output comes first, as the `full` launch, from all tokens. That launch also turns the
// weights, where they are, into tiles of kSteps steps by as many tokens with the steps of a token next to one
// another, so that those of any list of tokens are read in runs.
struct OutputsArgs {
  static constexpr const char* kName = "replay_outputs";
  static constexpr int kThreads = 256, kSteps = 32, kChunk = 32, kBuffers = 4, kFullChunk = 64,
                       kFullBuffers = 3, kSegment = 4096, kPad = 16;
  Shape shape;
  uint16_t* weights;       // half
  const uint16_t* values;  // [H, T, dim_padded()]
  const int32_t* last;     // [config][H][T]
  const int32_t* held;     // [config] most slots in use
  float* outputs;          // [t1 - t0][Hq][dim_padded()] of the full cache
  float* totals;           // [t1 - t0][Hq] its weights
  float* metrics;
  Repair* repairs;  // those left to RepairsArgs
  uint32_t* n_repairs;
  int32_t n_configs, t0, t1, begin;
  int32_t full;
  constexpr int step_tiles() const { return (t1 - t0 + kSteps - 1) / kSteps; }
  constexpr int quads() const { return shape.lanes() / 4; }
  constexpr int n_blocks() const { return step_tiles() * shape.n_kv * quads() * (full ? 1 : n_configs); }
  constexpr int column_tiles() const { return shape.dim_padded() > 64 ? 16 : 8; }  // of 8, at a time
  // A chunk's weights and values, the list, counts of warps, barriers, sums of errors.
  constexpr int smem_bytes() const {
    return (full ? kFullBuffers * kFullChunk : kBuffers * kChunk) *
               (kSteps * 8 + column_tiles() * 16 + 2 * kPad) +
           kSegment * 2 + 128 + 3 * kSteps * 4 * 4;
  }
};

// Output and cosine error of what OutputsArgs has left, from fp32 weights and values of the held tokens.
struct RepairsArgs {
  static constexpr const char* kName = "replay_repairs";
  static constexpr int kThreads = 256, kMostBlocks = 528;
  Shape shape;
  const float* weights;  // exponentials
  const float* v;        // [T, H, D]
  const float* outputs;  // of the full cache
  const int32_t* last;
  const Repair* repairs;
  const uint32_t* n_repairs;
  float* metrics;
  int32_t n_configs, t0, t1;
  constexpr int n_blocks() const {
    const int rows = (t1 - t0) * shape.n_q * n_configs / 64 + 1;
    return rows < kMostBlocks ? rows : kMostBlocks;
  }
  constexpr int smem_bytes() const { return kThreads / 32 * (kMaxDim + 4) * 4; }
};

struct HeadSums {
  int64_t low_recall;
  double recall, recall_no_sinks, output_error, cosine_error, topk_recall, missing;
};
struct CloseArgs {
  static constexpr const char* kName = "replay_close";
  static constexpr int kThreads = 256;
  Shape shape;
  const float* metrics;
  HeadSums* sums;      // [config][Hq]
  uint32_t* sketches;  // [config][Hq][4][kBins]
  float* series;       // [config][Hq][2][n_series]
  int32_t n_configs, n_series, begin, end;
  constexpr int n_blocks() const { return n_configs * shape.n_q; }
  constexpr int smem_bytes() const { return 4 * sketch_bins::kBins * 4 + kThreads * 7 * 8 + 16; }
};

// future_missed[config][H] = sum over tokens of future.
struct SumFutureArgs {
  static constexpr const char* kName = "replay_sum_future";
  static constexpr int kThreads = 256;
  const float* future;  // [n_rows][width]
  double* sums;         // [n_rows]
  int32_t n_rows, width;
  constexpr int n_blocks() const { return n_rows; }
  constexpr int smem_bytes() const { return kThreads * 8; }
};

}  // namespace kvlapse::gpu_replay
