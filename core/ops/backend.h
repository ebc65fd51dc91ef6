// Backend: the operations that a decoder-only transformer needs, over opaque buffers, for a batch of rows. A
// row is one token of one sequence; decode has a row per live sequence, prefill a row per token of a block.
// Activations are fp32 and stay with the backend: between begin_step and the reads at the step's end nothing
// comes back to the host, so that a device backend may queue every call of a step on one stream and capture
// it as a graph. The CPU backend is the reference; another one must match it within the bound that its parity
// test states.
//
// Results do not depend on the number of rows or threads. One session at a time calls a backend. Each
// operation returns the bytes that it is expected to move (modelled, never measured).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/victim.h"
#include "core/cache/geometry.h"
#include "core/cache/slot_table.h"
#include "core/ops/launch_log.h"
#include "core/ops/weights.h"

namespace kvlapse {

// Bytes that an operation is expected to read and write: weights, K/V and activations, each once.
struct OpBytes {
  uint64_t read = 0;
  uint64_t written = 0;
  OpBytes& operator+=(OpBytes other) { return read += other.read, written += other.written, *this; }
};

struct BatchRow {
  int32_t token = 0;
  Pos pos{0};
  bool prompt = false;  // all rows of a step alike
};

// How activations are multiplied with quantised matrices; everything else is exact fp32 in either mode.
enum class MatmulMode : uint8_t {
  exact,  // dequantised weights times fp32 activations
  int16,  // activations rounded to 16-bit integers per block of 32, products summed in integers within a
          // block
};

// K/V of one (sequence, layer) on a backend, planes as CacheGeometry lays them out, with what attention
// leaves behind: the logits, weights and outputs of the newest attended token. Host views are valid until the
// next call.
class KvStore {
 public:
  virtual ~KvStore() = default;
  virtual const CacheGeometry& geometry() const = 0;
  // Rows q [Hq, D], k and v [H, D], fp32 values already rounded to the cache's dtype, at table.next_slot(h).
  virtual void store(const SlotTable& table, const float* q, const float* k, const float* v) = 0;
  // Keeps the rows `order` of a head, renumbered 0.. .
  virtual void compact(int kv_head, std::span<const Slot> order) = 0;
  // Overwrites one K row with fp32 values [D], rounded to the cache's dtype. Between steps.
  virtual void replace_key(int kv_head, Slot slot, const float* row) = 0;

  virtual std::span<const float> logits(int q_head, int n) = 0;     // [n]
  virtual std::span<const float> attention(int q_head, int n) = 0;  // [n]
  virtual std::span<const float> output(int q_head) = 0;            // [D]
  virtual std::span<const float> value_l1(int kv_head, int n) = 0;  // [n]
  virtual std::span<const float> keys(int kv_head, int n) = 0;      // [n, D] fp32
  virtual std::span<const float> values(int kv_head, int n) = 0;    // [n, D] fp32
  // One V row [D] fp32, without widening the others.
  virtual std::span<const float> value_row(int kv_head, Slot slot) = 0;
  // The newest min(w, stored) queries, oldest first, and their logits; -inf where the key is newer than the
  // query.
  virtual std::span<const float> window_queries(int w) = 0;  // [rows, Hq, D]
  virtual std::span<const float> window_logits(const SlotTable& table, int q_head, int w) = 0;  // [rows, n]

  // LayerInputs::redundancy of the held keys.
  virtual bool redundancy(const SlotTable& /*table*/, int /*kv_head*/, float /*threshold*/,
                          std::span<float> /*out*/) {
    return false;
  }

  // What AttendRow::choice of the last attention asked for, a row per kv head or one for the layer; null: the
  // backend leaves the choice to the host.
  virtual const Lowest* fused_lowest(int /*score_row*/) { return nullptr; }
};

// Attention of the newest token that `store` was given, over all slots that `table` holds.
struct AttendRow {
  KvStore* store = nullptr;
  const SlotTable* table = nullptr;
  int row = -1;             // of the step, whose attention output it becomes; -1: only the store keeps it
  FusedChoice choice = {};  // of a victim, when the backend can
};

struct SampleRow {
  double temperature = 0;  // 0: greedy
  int top_k = 0;           // 0: all
  double top_p = 1;
  uint64_t random = 0;  // 64 random bits of this (seed, position)
  int32_t forced = -1;  // >= 0: this token is taken (teacher forcing)
};

struct SampleResult {
  int32_t token = 0;
  float logprob = 0;  // of token, at temperature 1
  float margin = 0;   // logit of token minus the best other logit
};

class Backend {
 public:
  virtual ~Backend() = default;
  virtual std::string describe() const = 0;  // "cpu AVX2, 2 threads"

  // Activations for at most n_rows rows of this model; made once per session. The weights must outlive it.
  virtual void prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) = 0;
  virtual std::unique_ptr<KvStore> make_kv_store(const CacheGeometry& geometry, int query_window) = 0;

  // x[r] = embedding of rows[r]; RoPE angles of every row.
  virtual OpBytes embed(std::span<const BatchRow> rows) = 0;
  // q, k, v of a layer: norm, projections, biases, QK-norm, RoPE; rounded to the K/V dtype.
  virtual OpBytes project_qkv(int layer) = 0;
  // Where row r's q, k, v lie: [Hq, D], [H, D], [H, D]. Addresses of the backend's memory space, which for
  // the CPU is the host's.
  struct QkvRow {
    const float* q;
    const float* k;
    const float* v;
  };
  virtual QkvRow qkv_row(int row) const = 0;

  // A backend that queues steps only takes down what a decode step asks for, layer by layer, and runs it all
  // in head(): what the step computes can be read after that.
  virtual bool queues_steps() const { return false; }
  // Of a backend whose device computes steps before they are asked for: how long the last head() waited for
  // it. What the host did since the head() before took nothing of the device's time then.
  virtual int64_t waited_ns() const { return 0; }
  // Whether host_row() will be asked for in decode steps.
  virtual void keep_rows(bool) {}
  // Row r's q, k, v of a layer in host memory: of the layer in progress, or of any when steps are queued.
  virtual QkvRow host_row(int /*layer*/, int row) { return qkv_row(row); }
  virtual OpBytes attend(std::span<const AttendRow> attend) = 0;
  // Causal attention of a prefill block of one sequence: its rows' K/V are stored, nothing was evicted, and
  // row r attends slots [0, first_slots + r]. The store keeps nothing of it. Same bits as attend() token by
  // token.
  virtual OpBytes attend_block(KvStore& store, int first_slots) = 0;
  // x += O(attention); x += down(silu(gate(norm x)) * up(norm x)).
  virtual OpBytes output_and_ffn(int layer) = 0;
  // What sample() will be asked for behind the coming head(), one a row of it: a backend that queues steps
  // chooses tokens in the same queue, so that a step waits for the device once.
  virtual void expect_samples(std::span<const SampleRow> /*rows*/) {}
  // Final norm and logits of the given rows, logits row i for rows[i].
  virtual OpBytes head(std::span<const int> rows) = 0;
  // A token for each logits row.
  virtual void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) = 0;
  // Logits row i of the last head(): [V].
  virtual std::span<const float> logits(int row) = 0;

  // The residual stream [width] of a row of the step in progress, for comparisons with a reference. Empty:
  // this backend does not show it.
  virtual std::span<const float> residual(int /*row*/) { return {}; }

  // Runs task(i) for i in [0, n) on the backend's host threads; tasks are independent. For policies'
  // decisions.
  virtual void parallel(int n, const std::function<void(int)>& task) = 0;

  // Whether the steps to come launch their kernels one by one, never as a graph, whose kernels a profiler
  // does not count one by one.
  virtual void launch_singly(bool /*on*/) {}
  // Kernels that the step that ended last launched, in order; empty: none, or the backend does not say.
  virtual std::vector<LaunchRecord> take_launches() { return {}; }
};

}  // namespace kvlapse
