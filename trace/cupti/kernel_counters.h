// Counters of single kernels by the range profiler: one pass, so that no kernel runs twice. Costs tens of
// milliseconds a kernel, so it belongs on sampled steps only, and counts no kernel of a graph (CUDA 13.0: a
// graph is one range, and with a range a kernel none): such steps launch kernel by kernel. Belongs to the
// decoding thread, whose CUDA context is current.
#pragma once

#include <functional>
#include <memory>
#include <span>

#include "trace/cupti/cupti_api.h"
#include "trace/cupti/metric_config.h"
#include "trace/gpu_records.h"

namespace kvlapse {

class KernelCounterSource {
 public:
  // Throws CuptiFailure.
  KernelCounterSource(const CuptiApi& api, int device, std::function<int64_t()> session_ns);
  ~KernelCounterSource();
  KernelCounterSource(const KernelCounterSource&) = delete;
  KernelCounterSource& operator=(const KernelCounterSource&) = delete;

  // A problem ends the source: both do nothing afterwards.
  void begin_step(int64_t step);
  void end_step(std::span<const LaunchRecord> launches);
  bool ended() const { return !problem_.reason.empty(); }
  void disable();  // no step may follow
  void take(GpuBatch& batch);
  GpuSource summary() const;

 private:
  const CuptiApi& api_;
  const std::function<int64_t()> session_ns_;
  std::unique_ptr<MetricConfig> config_;
  CUpti_RangeProfiler_Object* object_ = nullptr;
  std::vector<uint8_t> image_;
  int64_t step_ = -1;
  std::vector<KernelCounters> rows_;
  int64_t n_rows_ = 0, n_dropped_ = 0, overhead_ns_ = 0;
  CuptiProblem problem_;
};

}  // namespace kvlapse
