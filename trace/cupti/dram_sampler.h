// DRAM and L2 bytes over time: the chip's own sampler, read by a thread of its own while decode runs. Runs
// together with activity records. take and summary: any thread.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>

#include "trace/cupti/cupti_api.h"
#include "trace/cupti/metric_config.h"
#include "trace/gpu_records.h"

namespace kvlapse {

class DramSampler {
 public:
  // Throws CuptiFailure, leaving nothing running. `session_ns` is called on the sampler's thread too.
  DramSampler(const CuptiApi& api, int device, std::function<int64_t()> session_ns,
              int64_t interval_ns = 100'000);
  ~DramSampler();
  DramSampler(const DramSampler&) = delete;
  DramSampler& operator=(const DramSampler&) = delete;

  void stop();  // reads what the hardware still holds
  void take(GpuBatch& batch);
  GpuSource summary() const;

 private:
  void configure(int64_t interval_ns);
  void start();
  void run();
  void drain();
  void close();
  void clear_image();

  const CuptiApi& api_;
  const int device_;
  const std::function<int64_t()> session_ns_;
  std::unique_ptr<MetricConfig> config_;
  CUpti_PmSampling_Object* object_ = nullptr;
  std::vector<uint8_t> image_;  // counter data
  int64_t session_minus_gpu_ns_ = INT64_MAX;
  bool running_ = false;
  std::atomic<bool> stopping_{false};
  std::thread thread_;

  mutable std::mutex mutex_;
  std::vector<DramSample> samples_;
  int64_t n_samples_ = 0, n_dropped_ = 0;
  CuptiProblem problem_;
};

}  // namespace kvlapse
