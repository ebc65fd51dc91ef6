// RowSource: where a replay reads post-RoPE q, k and v from: a trace, or arrays in memory. Values are fp32,
// exactly those that the recording cache held. Implementations are thread-safe.
#pragma once

#include <vector>

#include "trace/trace_types.h"

namespace kvlapse {

struct RowSequence {
  int n_tokens = 0;  // T: positions [0, T) have rows
  int n_prompt = 0;
  int think_begin = -1, think_end = -1;  // positions of the tags, -1: none
};

class RowSource {
 public:
  virtual ~RowSource() = default;
  virtual const CacheGeometry& geometry() const = 0;  // n_slots has no meaning here
  virtual int layer_begin() const = 0;
  virtual int layer_end() const = 0;
  virtual int n_sequences() const = 0;
  virtual RowSequence sequence(int sequence) const = 0;
  virtual double rope_theta() const { return 0; }  // base of the half-split rotation of q and k; 0: unknown
  // out [n, heads, D] of positions [first, first + n); heads: Hq for q, H for k and v.
  virtual void rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const = 0;
};

// Rows held in memory, [T, heads, D] per (sequence, layer, kind).
class MemoryRows final : public RowSource {
 public:
  MemoryRows(CacheGeometry geometry, std::vector<RowSequence> sequences);
  float* row(int sequence, int layer, RowKind kind, int pos);

  const CacheGeometry& geometry() const override { return geometry_; }
  int layer_begin() const override { return 0; }
  int layer_end() const override { return geometry_.n_layers; }
  int n_sequences() const override { return static_cast<int>(sequences_.size()); }
  RowSequence sequence(int sequence) const override { return sequences_[sequence]; }
  void rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const override;

 private:
  size_t index(int sequence, int layer, RowKind kind) const {
    return (static_cast<size_t>(sequence) * geometry_.n_layers + layer) * 3 + static_cast<size_t>(kind);
  }
  int width(RowKind kind) const {
    return (kind == RowKind::q ? geometry_.n_q_heads : geometry_.n_kv_heads) * geometry_.head_dim;
  }
  CacheGeometry geometry_;
  std::vector<RowSequence> sequences_;
  std::vector<std::vector<float>> data_;
};

}  // namespace kvlapse
