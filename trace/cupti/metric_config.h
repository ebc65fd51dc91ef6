// The host side of CUPTI's counters: a list of metrics for a chip as a configuration image, and values out of
// counter data. Shared by the sampler and the range profiler. Not thread-safe.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "trace/cupti/cupti_api.h"

namespace kvlapse {

class MetricConfig {
 public:
  // `availability`: of the device, may be empty. Throws CuptiFailure, also when the metrics need more than
  // one pass: counting must not run a kernel twice, which changes the cache.
  MetricConfig(const CuptiApi& api, CUpti_ProfilerType type, const std::string& chip,
               std::span<const uint8_t> availability, std::vector<const char*> metrics);
  ~MetricConfig();
  MetricConfig(const MetricConfig&) = delete;
  MetricConfig& operator=(const MetricConfig&) = delete;

  std::span<const uint8_t> image() const { return image_; }
  std::vector<const char*>& metrics() { return metrics_; }
  // Of one sample or range; one value a metric.
  std::vector<double> values(std::span<const uint8_t> counter_data, size_t index) const;

 private:
  const CuptiApi& api_;
  std::vector<const char*> metrics_;
  CUpti_Profiler_Host_Object* host_ = nullptr;
  std::vector<uint8_t> image_;
};

// Chip of a device as CUPTI names it ("GH100").
std::string chip_name(const CuptiApi& api, int device);

}  // namespace kvlapse
