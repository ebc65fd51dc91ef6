// Activity records of CUPTI: every kernel, copy and fill, also inside CUDA graphs, with the step that
// launched it. One at a time in a process (CUPTI calls back without a context). begin_step, end_step and take
// belong to the decoding thread and cost it no work a record: buffers are queued as they come, a thread of
// the source reads them and joins kernels with launches.
#pragma once

#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
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
    bool ended = false;
    std::vector<LaunchRecord> launches;
    std::vector<GpuKernel> kernels;
  };
  struct Buffer {
    CUcontext context = nullptr;
    uint32_t stream = 0;
    uint8_t* data = nullptr;
    size_t valid_bytes = 0;
  };
  struct EndedStep {
    int64_t step = 0;
    std::vector<LaunchRecord> launches;
  };
  static void CUPTIAPI request_buffer(uint8_t** buffer, size_t* size, size_t* max_records);
  static void CUPTIAPI complete_buffer(CUcontext context, uint32_t stream, uint8_t* buffer, size_t size,
                                       size_t valid_bytes);
  void disable(size_t n_enabled);
  void run();
  void stop();
  // On the source's thread; once it has stopped, on the caller's. `all`: with no hope for what is missing.
  void process(bool all);
  void read_buffer(const Buffer& buffer);
  void read_record(const CUpti_Activity& record);
  void place(GpuKernel& kernel, GpuBatch& out);
  std::string_view name_of(const char* name);
  void flush(uint32_t flags);
  void align_clock();
  void note(const CuptiProblem& problem);

  const CuptiApi& api_;
  const std::function<int64_t()> session_ns_;
  CUpti_SubscriberHandle subscriber_ = nullptr;
  // Of the decoding thread.
  int64_t running_ = -1, start_ns_ = 0;  // step
  int64_t last_take_ns_ = 0;
  size_t clocks_taken_ = 0;
  int64_t overhead_ns_ = 0;

  mutable std::mutex mutex_;
  std::condition_variable came_;
  std::vector<Buffer> buffers_;
  std::vector<EndedStep> ended_;
  std::vector<ClockPair> clocks_;  // the first and the newest
  GpuBatch ready_;
  int64_t records_ = 0, dropped_ = 0;
  CuptiProblem problem_;
  bool stopping_ = false;

  // Of the source's thread.
  GpuBatch read_;  // kernels whose call is not known yet; copies and fills as they were read
  std::vector<GpuKernel> arrived_;
  std::unordered_map<const char*, std::string_view> names_;
  std::unordered_map<uint32_t, int64_t> step_of_call_;  // by correlation
  uint32_t last_call_ = 0;
  int64_t last_call_step_ = -1;
  int64_t n_read_ = 0, n_lost_ = 0;
  std::map<int64_t, Step> steps_;          // not whole yet
  int64_t newest_ = -1, handed_out_ = -1;  // steps
  std::thread thread_;
};

}  // namespace kvlapse
