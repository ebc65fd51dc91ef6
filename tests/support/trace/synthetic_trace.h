// Traces of a made-up process, for tests of whoever reads traces: plausible shapes (sinks, recent tokens, a
// few heavy ones; a policy that keeps its budget), no model behind them, `model` = "synthetic" in the file.
// Deterministic.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <vector>

#include "trace/trace_writer.h"

namespace kvlapse::test {

struct SyntheticProcess {
  CacheGeometry geometry{
      .n_layers = 2, .n_q_heads = 4, .n_kv_heads = 2, .head_dim = 8, .n_slots = 4096, .dtype = DType::f32};
  TraceTier tier = TraceTier::qkv;
  int layer_begin = 0, layer_end = -1;  // of rows and sketches; -1: all layers
  int n_sequences = 1;
  int n_prompt = 20;
  int n_steps = 300;    // forward passes, prompt included
  int budget = 0;       // 0: nothing is evicted
  int cadence = 1;      // 1: the victim's slot is taken by the next token; above: compaction
  bool shared = false;  // victims shared by the layer's heads
  uint64_t seed = 1;
  // Called before a step is written, with the tokens that attention saw of each kv head of the last layer;
  // may change the summary and add to the trace.
  std::function<void(TraceWriter&, const SyntheticProcess&, StepSummary&, int64_t held)> on_step = {};

  TraceHeader header() const;
};

// The recorded values of one position: q [Hq][D], k or v [H][D], rounded to the dtype.
std::vector<float> synthetic_row(const SyntheticProcess& process, int sequence, int layer, RowKind kind,
                                 int pos);
int32_t synthetic_token(const SyntheticProcess& process, int sequence, int pos);

// Writes the process step by step.
class SyntheticRun {
 public:
  SyntheticRun(TraceWriter& writer, const SyntheticProcess& process);
  ~SyntheticRun();
  bool step();  // the next position of every sequence; false: all done
  void end(std::string_view reason);
  int position() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// The whole process, finished.
void write_synthetic_trace(const std::filesystem::path& file, const SyntheticProcess& process,
                           TraceWriterOptions options = {});

// A folder of its own for a test, removed at the end.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  std::filesystem::path operator/(std::string_view name) const { return path_ / name; }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace kvlapse::test
