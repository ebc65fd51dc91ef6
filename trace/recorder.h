// Recorder: the StepObserver that writes a trace. Lives on the decoding thread; does there only what cannot
// wait (copies, the sketch's partial selection) and measures what it costs.
#pragma once

#include "core/engine/step_observer.h"
#include "trace/sketch.h"
#include "trace/trace_writer.h"

namespace kvlapse {

class Recorder final : public StepObserver {
 public:
  Recorder(const std::filesystem::path& file, TraceHeader header, TraceWriterOptions options = {});

  // Before the sequence's on_prompt: its seed (sampling or task) and its resolved budget. Otherwise 0 and the
  // header's.
  void set_sequence(int sequence, uint64_t seed, int budget_slots);
  // Texts, tags, task and answer of a sequence, once known. One that was interrupted before its prompt leaves
  // nothing.
  void describe_sequence(const TraceSequence& facts);
  // What a GPU profiler gathered.
  void add_gpu(GpuBatch batch) { writer_.add_gpu(std::move(batch)); }
  // Marks the file complete or interrupted and stores the measured overhead. Throws Error.
  void finish(bool interrupted);

  // Time spent in the recorder (waits included) over the time of the steps without it; generated tokens only.
  // What a device that runs ahead computed meanwhile is time of the steps.
  double overhead_ratio() const;
  const TraceWriter& writer() const { return writer_; }

  void on_prompt(int sequence, std::span<const int32_t> ids) override;
  void on_attended(int sequence, int layer, Pos pos, const TokenRows& rows, const SlotTable& table,
                   LayerInputs& inputs) override;
  void on_evicted(int sequence, int layer, const EvictionPlan& plan) override;
  void on_step(const StepSummary& summary) override;
  void on_end(int sequence, std::string_view reason) override;

 private:
  class Timer;
  TraceWriter writer_;
  struct Start {
    uint64_t seed = 0;
    int budget_slots = 0;
  };
  std::map<int, Start> starts_;    // by sequence
  std::vector<int> n_prompt_;      // [sequence]; 0: its prompt did not come yet
  std::vector<char> evicted_;      // [sequence][layer]: something was evicted before
  std::vector<int32_t> held_;      // [H]
  std::vector<SketchRow> sketch_;  // [H]
  std::vector<std::span<const float>> group_weights_, group_logits_;  // [G]
  Sketcher sketcher_;
  int64_t spent_prompt_ns_ = 0;   // in callbacks of prompt tokens
  int64_t spent_ns_ = 0;          // in callbacks of generated tokens
  int64_t spent_in_step_ns_ = 0;  // of the running step
  int64_t settled_ns_ = 0;        // spent_ns_ before the step that was counted last
  int64_t decode_ns_ = 0;         // steps, without what was spent inside them
  int64_t last_start_ns_ = -1;    // of the batch's step that was counted last
};

}  // namespace kvlapse
