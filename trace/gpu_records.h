// What the GPU did, as plain data between a profiler and the trace. Units and provenance: trace/FORMAT.md
// (tables of Nsight Systems' export, KV_LAUNCH, KV_DRAM_SAMPLE, KV_KERNEL_COUNTER, KV_SOURCE). All times are
// nanoseconds since the session began.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "core/ops/launch_log.h"

namespace kvlapse {

struct GpuKernel {
  int64_t start_ns = 0, end_ns = 0;
  uint32_t device = 0, context = 0, stream = 0, correlation = 0, graph = 0;
  uint64_t graph_node = 0;  // 0: not of a graph
  int64_t grid_id = 0;
  std::string_view mangled_name;  // lives as long as the program (intern_name)
  int32_t grid[3] = {}, block[3] = {};
  uint32_t cluster[3] = {};
  uint32_t registers = 0, local_bytes_per_thread = 0, max_cluster = 0, max_active_clusters = 0;
  int32_t static_smem_bytes = 0, dynamic_smem_bytes = 0;
  uint64_t local_bytes = 0, executed_smem_bytes = 0;
  uint8_t launch_type = 0;
  // Joined by us.
  int64_t step = -1;  // ordinal of the batch's step; -1: outside any
  std::optional<LaunchRecord> launch;
};

struct GpuCopy {
  int64_t start_ns = 0, end_ns = 0;
  uint32_t device = 0, context = 0, stream = 0, correlation = 0;
  uint64_t graph_node = 0, bytes = 0, copies = 0;
  uint8_t copy_kind = 0, source_kind = 0, target_kind = 0;
};

struct GpuFill {
  int64_t start_ns = 0, end_ns = 0;
  uint32_t device = 0, context = 0, stream = 0, correlation = 0, value = 0;
  uint64_t graph_node = 0, bytes = 0;
  uint16_t memory_kind = 0;
};

struct GpuStepRange {
  int64_t step = 0, start_ns = 0, end_ns = 0;
};

struct DramSample {
  int64_t start_ns = 0, end_ns = 0;
  int64_t read_bytes = 0, write_bytes = 0, l2_bytes = 0;
};

// Hardware counters of one kernel on a step that was counted.
struct KernelCounters {
  int64_t step = 0;
  int ordinal = 0;  // of the kernel in its step
  double duration_ns = 0, dram_read_bytes = 0, dram_write_bytes = 0, l2_bytes = 0;
  double dram_percent = 0, warps_percent = 0;
  std::optional<LaunchRecord> launch;
};

struct ClockPair {
  int64_t profiler_ns = 0, session_ns = 0;
};

// A source that was asked for. `reason` empty and records > 0: recorded.
struct GpuSource {
  std::string name, provenance, reason, advice;
  int64_t records = 0, dropped = 0, overhead_ns = 0;
  std::string_view state() const { return reason.empty() ? "recorded" : records > 0 ? "partial" : "missing"; }
};

struct GpuDevice {
  int id = 0;
  std::string name, chip;
  int64_t memory_bytes = 0, l2_bytes = 0;
  int multiprocessors = 0, compute_major = 0, compute_minor = 0;
  int64_t clock_hz = 0;  // highest of the multiprocessors; 0: not known
};

// A copy of `name` that lives as long as the program; there are few kernels. Any thread.
std::string_view intern_name(std::string_view name);

// What was gathered since the last batch; appended to the trace as it is.
struct GpuBatch {
  std::vector<GpuKernel> kernels;
  std::vector<GpuCopy> copies;
  std::vector<GpuFill> fills;
  std::vector<GpuStepRange> steps;
  std::vector<DramSample> dram;
  std::vector<KernelCounters> counters;
  std::vector<ClockPair> clocks;
  std::vector<GpuDevice> devices;
  std::vector<GpuSource> sources;       // replace rows of the same name
  std::optional<int64_t> utc_epoch_ns;  // of the session's start

  bool empty() const {
    return kernels.empty() && copies.empty() && fills.empty() && steps.empty() && dram.empty() &&
           counters.empty() && clocks.empty() && devices.empty() && sources.empty() && !utc_epoch_ns;
  }
};

}  // namespace kvlapse
