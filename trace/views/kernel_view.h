// Kernels of a recording by name, when GPU activity was recorded (tables of Nsight Systems' export). Counters
// that are absent say why.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

struct KernelRow {
  std::string name;
  int64_t launches = 0;
  double total_ms = 0, mean_us = 0, min_us = 0, max_us = 0;  // measured
  double modelled_bytes = 0;                                 // of all launches; 0: not modelled
  double counted_ratio =
      0;  // measured DRAM bytes over modelled ones, on the steps that were counted; 0: none
};
struct KernelSummary {
  std::vector<KernelRow> rows;  // the most time first
  std::string absence;          // why there are none and what to do
};
KernelSummary read_kernels(const TraceReader& reader);

// Why hardware counters are missing, from the recorded facts; "" when they are there.
std::string counters_absence(const TraceReader& reader);

}  // namespace kvlapse
