// Arguments of the exact kernels, by value, shared by host, device and emulator: a decode step in which every
// sum is taken in the order of core/base/vector_math.h, so that a GPU gives the CPU's bits. All pointers are
// device memory; activations are fp32; blocks have kThreads threads, sixteen of which (a team) stand for
// the sixteen lanes of a sum. n_blocks() is what a launch needs;
// bytes() what it should move (modelled, each operand once), slot_bytes() that for each (row, kv head, slot)
// attended.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/base/dtype.h"

namespace kvlapse::exact {

inline constexpr int kThreads = 128;
inline constexpr int kTeam = 16;
inline constexpr int kTeams = kThreads / kTeam;
inline constexpr int kMaxGroup = 8;       // query heads per kv head
inline constexpr int kVectorsAtOnce = 4;  // activation rows that pass a weight row together
inline constexpr int kTeamSlots = 4;      // slots whose logits a team computes
inline constexpr int kBlockSlots = kTeams * kTeamSlots;
inline constexpr int kChunkSlots = 256;  // kValueChunk of core/base/row_math.h
inline constexpr int kSharedBytes = 2048;

constexpr int blocks_for(int64_t n, int per_block) {
  return static_cast<int>((n + per_block - 1) / per_block);
}

// K/V of one (sequence, layer) and what attention leaves there.
struct SiteView {
  void* k = nullptr;             // [H, S, D]
  void* v = nullptr;             // [H, S, D]
  float* value_l1 = nullptr;     // [H, S]
  int32_t* positions = nullptr;  // [H, S]
  float* logits = nullptr;       // [Hq, stride]
  float* weights = nullptr;      // [Hq, stride]
  float* partials = nullptr;     // [chunks, Hq, D]
  float* output = nullptr;       // [Hq, D]
  float* query = nullptr;        // [Hq, D] of the newest stored token
  float* ring = nullptr;         // [query window, Hq, D]
  int32_t n_slots = 0;           // S
  int32_t stride = 0;
};

// Geometry that all sites of a launch share.
struct Heads {
  int32_t n_q = 0, n_kv = 0, dim = 0;
  DType dtype = DType::f32;  // of K and V
  constexpr int group() const { return n_q / n_kv; }
};

// x[r] = embedding[token[r]].
struct EmbedArgs {
  const void* embedding;  // [V, width]
  DType type;
  const int32_t* tokens;  // [R]
  float* x;               // [R, width]
  int32_t n_rows, width;
  static constexpr const char* kName = "exact_embed";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n_rows) * width * (dtype_bytes(type) + 4); }
  constexpr int n_blocks() const { return blocks_for(static_cast<int64_t>(n_rows) * width, kThreads); }
};

// out[i] = x[rows[i]] / sqrt(mean(x^2) + eps) * weight.
struct NormArgs {
  const float* x;       // [.., width]
  const int32_t* rows;  // [n_rows]; null: i
  const float* weight;  // [width]
  float* out;           // [n_rows, width]
  int32_t n_rows, width;
  float eps;
  static constexpr const char* kName = "exact_norm";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n_rows) * width * 8; }
  constexpr int n_blocks() const { return blocks_for(n_rows, kTeams); }
};

// out[p][j * stride + r] (+)= W_p[r] . x[j] for up to three matrices p of the same width.
struct MatmulPart {
  const void* data = nullptr;  // [rows, columns]
  float* out = nullptr;
  int32_t rows = 0, stride = 0;
};
struct MatmulArgs {
  MatmulPart parts[3];
  DType type;      // of the matrices
  const float* x;  // [n_x, columns]
  int32_t n_x, columns;
  bool add;
  constexpr int total_rows() const { return parts[0].rows + parts[1].rows + parts[2].rows; }
  static constexpr const char* kName = "exact_matmul";
  constexpr uint64_t bytes() const {
    return static_cast<uint64_t>(total_rows()) * columns * dtype_bytes(type) +
           static_cast<uint64_t>(n_x) * (columns + total_rows()) * 4;
  }
  constexpr int n_blocks() const {
    return blocks_for(total_rows(), kTeams) * blocks_for(n_x, kVectorsAtOnce);
  }
};

// Biases, QK-norm, rotation and rounding of q, k, v in place.
struct FinishQkvArgs {
  float* q;                               // [R, Hq, D]
  float* k;                               // [R, H, D]
  float* v;                               // [R, H, D]
  const float *q_bias, *k_bias, *v_bias;  // [rows] or null
  const float *q_norm, *k_norm;           // [D] or null
  const float *cos, *sin;                 // [R, D/2]
  Heads heads;
  int32_t n_rows;
  float eps;
  static constexpr const char* kName = "exact_finish_qkv";
  constexpr uint64_t bytes() const {
    return static_cast<uint64_t>(n_rows) * (heads.n_q + 2 * heads.n_kv) * heads.dim * 8;
  }
  constexpr int n_blocks() const {
    return blocks_for(static_cast<int64_t>(n_rows) * (heads.n_q + 2 * heads.n_kv), kTeams);
  }
};

// Puts row r's k, v into slot slots[r, h] of every head of its site.
struct StoreArgs {
  const SiteView* sites;  // [R]
  const float* q;         // [R, Hq, D]
  const float* k;         // [R, H, D]
  const float* v;         // [R, H, D]
  const int32_t* slots;   // [R, H]
  const int32_t* pos;     // [R]
  const int32_t* ring;    // [R] row of the query ring, -1: none; kKeepsQuery added when `query` is written
  Heads heads;
  int32_t n_rows;
  static constexpr const char* kName = "exact_store";
  constexpr uint64_t bytes() const {
    return static_cast<uint64_t>(n_rows) * heads.n_kv * heads.dim * (8 + 2 * dtype_bytes(heads.dtype));
  }
  constexpr int n_blocks() const { return blocks_for(static_cast<int64_t>(n_rows) * heads.n_kv, kTeams); }
};
inline constexpr int32_t kKeepsQuery = 1 << 30;
inline constexpr int32_t kNoRing = kKeepsQuery - 1;

// Attention of row r over the first counts[r, h] slots of its site with site.query.
struct AttendArgs {
  const SiteView* sites;  // [R]
  const int32_t* counts;  // [R, H]
  float* out;             // [R, Hq, D] or null: only the site keeps it
  Heads heads;
  int32_t n_rows;
  int32_t most;  // at least every count
  float factor;  // 1 / sqrt(D)
};
struct LogitsArgs : AttendArgs {
  static constexpr const char* kName = "exact_logits";
  constexpr uint64_t slot_bytes() const { return heads.dim * dtype_bytes(heads.dtype); }
  constexpr int n_blocks() const { return n_rows * heads.n_kv * blocks_for(most, kBlockSlots); }
};
struct SoftmaxArgs : AttendArgs {
  static constexpr const char* kName = "exact_softmax";
  constexpr uint64_t slot_bytes() const { return static_cast<uint64_t>(heads.group()) * 12; }
  constexpr int n_blocks() const { return n_rows * heads.n_q; }
};
struct ValuesArgs : AttendArgs {
  static constexpr const char* kName = "exact_values";
  constexpr uint64_t slot_bytes() const { return heads.dim * dtype_bytes(heads.dtype); }
  constexpr int n_blocks() const { return n_rows * heads.n_kv * blocks_for(most, kChunkSlots); }
};
struct SumChunksArgs : AttendArgs {
  static constexpr const char* kName = "exact_sum_chunks";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n_rows) * heads.n_q * heads.dim * 8; }
  constexpr int n_blocks() const {
    return blocks_for(static_cast<int64_t>(n_rows) * heads.n_q * heads.dim, kThreads);
  }
};

// gate = silu(gate) * up.
struct SiluArgs {
  float* gate;
  const float* up;
  int64_t n;
  static constexpr const char* kName = "exact_silu";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n) * 12; }
  constexpr int n_blocks() const { return blocks_for(n, kThreads); }
};

// What the host makes a SampleResult of.
struct Choice {
  int32_t best;        // first maximum
  float best_logit;    // its logit
  float second;        // largest other logit
  float total;         // sum of exponentials over the best one's base (vector_math.h)
  float forced_logit;  // of the forced token
};
struct ChooseArgs {
  const float* logits;    // [R, V]
  const int32_t* forced;  // [R], -1: none
  Choice* choices;        // [R]
  int32_t n_rows, n_vocab;
  static constexpr const char* kName = "exact_choose";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n_rows) * n_vocab * 4; }
  constexpr int n_blocks() const { return n_rows; }
};

// The least contribution of a step (LongFlow): score = scale * sum over query heads of weight * |v|_1.
struct Victim {
  int32_t slot;  // first minimum among the unprotected; -1: none
  float score;
  float next;  // second lowest; +inf: none
  int32_t has_nan;
};
struct VictimArgs {
  const SiteView* sites;      // [R]
  const int32_t* counts;      // [R, H]
  const int32_t* first_free;  // [R] positions below are protected
  const int32_t* last_free;   // [R] positions above are protected
  Victim* victims;            // [R, H], or [R] when shared
  Heads heads;
  int32_t n_rows;
  bool shared;
  float scale;
  constexpr int n_score_rows() const { return shared ? 1 : heads.n_kv; }
  static constexpr const char* kName = "exact_victim";
  constexpr uint64_t slot_bytes() const { return static_cast<uint64_t>(heads.group() + 1) * 4; }
  constexpr int n_blocks() const { return n_rows * n_score_rows(); }
};

// to[i] = from[order[i]] for the rows of one kv head of K, V and what goes with a slot; then back with a null
// order.
struct GatherArgs {
  const uint32_t* from[4];
  uint32_t* to[4];
  int32_t words[4];      // of a row of each
  const int32_t* order;  // [n]; null: i
  int32_t n;
  constexpr int total_words() const { return words[0] + words[1] + words[2] + words[3]; }
  static constexpr const char* kName = "exact_gather";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(n) * total_words() * 8; }
  constexpr int n_blocks() const { return blocks_for(static_cast<int64_t>(n) * total_words(), kThreads); }
};

// R-KV's redundancy among the first counts[h] keys of every head of a site
// (core/policy/scoring/redundancy.h), in three launches; what is left for the host is a sum and a softmax a
// head. All by [H, most].
struct UnitKeysArgs {
  const void* k;          // [H, n_slots, D]
  const int32_t* counts;  // [H]
  float* unit;            // [H, most, D] keys over their norms
  float* own;             // product with itself
  Heads heads;
  int32_t n_slots, most;
  static constexpr const char* kName = "exact_unit_keys";
  constexpr uint64_t bytes() const {
    return static_cast<uint64_t>(heads.n_kv) * most * heads.dim * (dtype_bytes(heads.dtype) + 4);
  }
  constexpr int n_blocks() const { return heads.n_kv * blocks_for(most, kTeams); }
};
struct MeanKeyArgs {
  const float* unit;
  const int32_t* counts;
  float* mean;  // [H, D]
  Heads heads;
  int32_t most;
  static constexpr const char* kName = "exact_mean_key";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(heads.n_kv) * most * heads.dim * 4; }
  constexpr int n_blocks() const { return heads.n_kv; }
};
struct SimilarKeyArgs {
  const float* unit;
  const float* mean;
  const int32_t* counts;
  float* projection;  // product with the mean
  int32_t* similar;   // the last other key whose cosine is above the threshold, or 0
  float* cosine;      // with that one; 0 with itself
  Heads heads;
  int32_t most;
  float threshold;
  static constexpr const char* kName = "exact_similar_key";
  constexpr uint64_t bytes() const { return static_cast<uint64_t>(heads.n_kv) * most * (heads.dim + 3) * 4; }
  constexpr int n_blocks() const { return heads.n_kv * blocks_for(most, kTeams); }
};

}  // namespace kvlapse::exact
