// What the GPU does while a session decodes: activity of every kernel, memory traffic over time, counters of
// single kernels. A source that is not to be had is named with its reason and recording goes on without it;
// nothing here throws once it is made. All calls come from the decoding thread.
//
// Per step: begin_step; the step; end_step with the backend's launches; add take() to the trace. At the end:
// add finish().
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "trace/gpu_records.h"

namespace kvlapse {

enum class GpuCounters : uint8_t { none, activity, dram, kernels };
std::string_view counters_name(GpuCounters counters);
GpuCounters parse_counters(std::string_view name);  // throws UsageError

struct GpuCaptureOptions {
  GpuCounters counters = GpuCounters::activity;
  int counter_steps = 16;  // steps whose kernels are counted, of `kernels`
  int device = 0;
  std::vector<GpuDevice> devices;       // facts of the devices, stored as they are
  std::function<int64_t()> session_ns;  // nanoseconds since the session began; any thread
};

class GpuCapture {
 public:
  virtual ~GpuCapture() = default;
  // `step` counts from 0. True when this step's kernels are counted: its times are no timing figures.
  virtual bool begin_step(int64_t step) = 0;
  virtual void end_step(std::vector<LaunchRecord> launches) = 0;
  virtual GpuBatch take() = 0;
  virtual GpuBatch finish() = 0;
  // As they stand; a source whose reason is not empty is missing or ended early.
  virtual std::vector<GpuSource> sources() const = 0;
};

// Never fails: sources that cannot start say so.
std::unique_ptr<GpuCapture> make_gpu_capture(const GpuCaptureOptions& options);

// Whether the profiler is there, without starting it: {} or what is missing and what to do.
struct GpuProfilerState {
  bool found = false;
  std::string detail, advice;
};
GpuProfilerState probe_gpu_profiler();

}  // namespace kvlapse
