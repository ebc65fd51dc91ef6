// TraceRows: a recorded trace as the RowSource of a replay. Thread-safe, as its reader is.
#pragma once

#include "replay/row_source.h"
#include "trace/trace_reader.h"

namespace kvlapse {

class TraceRows final : public RowSource {
 public:
  // `reader` outlives the object. Throws Error when the trace holds no q, k, v. max_tokens > 0: the first
  // ones only.
  explicit TraceRows(const TraceReader& reader, int max_tokens = 0);

  const TraceReader& reader() const { return reader_; }
  const CacheGeometry& geometry() const override { return reader_.header().geometry; }
  int layer_begin() const override { return reader_.header().layer_begin; }
  int layer_end() const override { return reader_.header().layer_end; }
  int n_sequences() const override { return reader_.n_sequences(); }
  RowSequence sequence(int sequence) const override { return sequences_[sequence]; }
  double rope_theta() const override { return reader_.header().rope_theta; }
  void rows(int sequence, int layer, RowKind kind, int first, int n, float* out) const override {
    reader_.read_rows(sequence, layer, kind, first, n, out);
  }

 private:
  const TraceReader& reader_;
  std::vector<RowSequence> sequences_;
};

}  // namespace kvlapse
