// What the GPU did during a recording, for views: kernels by name, single launches over time, DRAM traffic by
// step. Read from the tables of Nsight Systems' export and ours beside them (trace/FORMAT.md). A trace
// without them, or with empty ones, says why.
#pragma once

#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

// Session time; the whole recording by default.
struct TimeSpan {
  int64_t begin_ns = INT64_MIN, end_ns = INT64_MAX;
};
// Of the steps [begin, end) of a sequence; empty (begin = end) when none of them was timed.
TimeSpan step_span(const TraceReader& reader, int sequence, int begin, int end);

struct KernelRow {
  std::string name;
  int64_t launches = 0;
  double total_ms = 0, mean_us = 0, min_us = 0, max_us = 0;  // measured
  double modelled_bytes = NAN;                               // of a launch, mean; NaN: not modelled
  // Of the launches that were counted, means; NaN: none was.
  double dram_bytes = NAN, bytes_ratio = NAN, warps_percent = NAN;
  int64_t counted = 0;
};
struct KernelSummary {
  std::vector<KernelRow> rows;  // the most time first
  std::string absence;          // why there are none and what to do
};
KernelSummary read_kernels(const TraceReader& reader, const TimeSpan& span = {});

struct KernelLaunch {
  int64_t start_ns = 0, end_ns = 0;
  int name = 0;    // index into KernelLaunches::names
  int layer = -1;  // -1: of no layer
  int stream = 0;
  double modelled_bytes = NAN;
};
struct KernelLaunches {
  std::vector<std::string> names;
  std::vector<KernelLaunch> launches;  // by start
  bool cut = false;                    // more than `most` lie in the span; the first ones are here
};
KernelLaunches read_launches(const TraceReader& reader, const TimeSpan& span, int most);

// DRAM traffic of the timed steps of a sequence, from samples: a sample counts for each step by the share of
// its time that overlaps. Empty vectors: none was sampled, `absence` says why.
struct DramTimeline {
  std::vector<float> mib;    // read and written, a step
  std::vector<float> gibps;  // mean rate while the step ran
  std::string absence;
};
DramTimeline read_dram(const TraceReader& reader, int sequence);

// Nanoseconds of a phase in each of these steps: of the kernels that were launched for it while the step ran
// where they were recorded, else as the step says; 0: not known. Measured.
std::vector<int64_t> phase_times(const TraceReader& reader, const std::vector<TraceStep>& steps,
                                 StepPhase phase);

// Steps whose kernels were counted one by one: their times are no timing figures. Positions in `sequence`.
std::vector<int> counted_steps(const TraceReader& reader, int sequence);

// Why hardware counters are missing, from the recorded facts; "" when they are there.
std::string counters_absence(const TraceReader& reader);

}  // namespace kvlapse
