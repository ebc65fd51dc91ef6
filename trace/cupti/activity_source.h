// Activity records of CUPTI: every kernel, copy and fill, also inside CUDA graphs, with the step that
// launched it. One at a time in a process (CUPTI calls back without a context). begin_step, end_step and take
// belong to the decoding thread; records arrive on CUPTI's own.
#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

#include "trace/cupti/cupti_api.h"
#include "trace/gpu_records.h"

namespace kvlapse {

class ActivitySource {
 public:
  // `session_ns` reads the session's clock. Throws CuptiFailure, leaving nothing enabled.
  ActivitySource(const CuptiApi& api, std::function<int64_t()> session_ns);
  ~ActivitySource();
  ActivitySource(const ActivitySource&) = delete;
  ActivitySource& operator=(const ActivitySource&) = delete;

  void begin_step(int64_t step);
  // `launches` in order; empty when the backend does not say.
  void end_step(std::vector<LaunchRecord> launches);
  bool in_step() const { return running_ >= 0; }
  // What is whole; nothing when it was asked a moment ago. `all`: everything that the profiler still holds,
  // with no hope for what is missing.
  void take(GpuBatch& batch, bool all);
  GpuSource summary() const;

 private:
  struct Step {
    int64_t start_ns = 0, end_ns = 0;
    std::vector<LaunchRecord> launches;
    std::vector<GpuKernel> kernels;
  };
  static void CUPTIAPI request_buffer(uint8_t** buffer, size_t* size, size_t* max_records);
  static void CUPTIAPI complete_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                                       size_t valid_bytes);
  void enable();
  void disable(size_t n_enabled);
  void read_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t valid_bytes);
  void read_record(const CUpti_Activity& record);
  std::string_view name_of(const char* name);
  void flush(uint32_t flags);
  void align_clock();
  void forget_calls();
  int64_t session_time(uint64_t profiler_ns) const;
  void note(const CuptiProblem& problem);

  const CuptiApi& api_;
  const std::function<int64_t()> session_ns_;
  CUpti_SubscriberHandle subscriber_ = nullptr;
  std::vector<ClockPair> clocks_;
  size_t clocks_taken_ = 0;
  int64_t running_ = -1;  // step
  int64_t last_flush_ns_ = 0, last_take_ns_ = 0;
  int64_t overhead_ns_ = 0;

  mutable std::mutex mutex_;  // what CUPTI's threads fill
  std::vector<GpuKernel> kernels_;
  std::vector<GpuCopy> copies_;
  std::vector<GpuFill> fills_;
  std::unordered_map<const char*, std::string_view> names_;
  std::unordered_map<uint32_t, int64_t> step_of_call_;  // by correlation
  int64_t records_ = 0, dropped_ = 0;
  CuptiProblem problem_;

  std::map<int64_t, Step> steps_;  // not taken yet
  std::vector<GpuStepRange> ranges_;
};

}  // namespace kvlapse
