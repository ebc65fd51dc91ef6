#include "trace/cupti/metric_config.h"

#include <fmt/format.h>

namespace kvlapse {

MetricConfig::MetricConfig(const CuptiApi& api, CUpti_ProfilerType type, const std::string& chip,
                           std::span<const uint8_t> availability, std::vector<const char*> metrics)
    : api_(api), metrics_(std::move(metrics)) {
  auto init =
      cupti_params<CUpti_Profiler_Host_Initialize_Params>(CUpti_Profiler_Host_Initialize_Params_STRUCT_SIZE);
  init.profilerType = type;
  init.pChipName = chip.c_str();
  init.pCounterAvailabilityImage = availability.empty() ? nullptr : availability.data();
  KVLAPSE_CUPTI(api_, cuptiProfilerHostInitialize, &init);
  host_ = init.pHostObject;
  try {
    auto add = cupti_params<CUpti_Profiler_Host_ConfigAddMetrics_Params>(
        CUpti_Profiler_Host_ConfigAddMetrics_Params_STRUCT_SIZE);
    add.pHostObject = host_;
    add.ppMetricNames = metrics_.data();
    add.numMetrics = metrics_.size();
    KVLAPSE_CUPTI(api_, cuptiProfilerHostConfigAddMetrics, &add);
    auto size = cupti_params<CUpti_Profiler_Host_GetConfigImageSize_Params>(
        CUpti_Profiler_Host_GetConfigImageSize_Params_STRUCT_SIZE);
    size.pHostObject = host_;
    KVLAPSE_CUPTI(api_, cuptiProfilerHostGetConfigImageSize, &size);
    image_.resize(size.configImageSize);
    auto get = cupti_params<CUpti_Profiler_Host_GetConfigImage_Params>(
        CUpti_Profiler_Host_GetConfigImage_Params_STRUCT_SIZE);
    get.pHostObject = host_;
    get.configImageSize = image_.size();
    get.pConfigImage = image_.data();
    KVLAPSE_CUPTI(api_, cuptiProfilerHostGetConfigImage, &get);
    auto passes = cupti_params<CUpti_Profiler_Host_GetNumOfPasses_Params>(
        CUpti_Profiler_Host_GetNumOfPasses_Params_STRUCT_SIZE);
    passes.configImageSize = image_.size();
    passes.pConfigImage = image_.data();
    KVLAPSE_CUPTI(api_, cuptiProfilerHostGetNumOfPasses, &passes);
    if (passes.numOfPasses != 1)
      throw CuptiFailure{
          {fmt::format("the counters need {} passes on {}, expected 1", passes.numOfPasses, chip),
           "use --counters activity"}};
  } catch (...) {
    auto end = cupti_params<CUpti_Profiler_Host_Deinitialize_Params>(
        CUpti_Profiler_Host_Deinitialize_Params_STRUCT_SIZE);
    end.pHostObject = host_;
    api_.cuptiProfilerHostDeinitialize(&end);
    throw;
  }
}

MetricConfig::~MetricConfig() {
  auto end = cupti_params<CUpti_Profiler_Host_Deinitialize_Params>(
      CUpti_Profiler_Host_Deinitialize_Params_STRUCT_SIZE);
  end.pHostObject = host_;
  api_.cuptiProfilerHostDeinitialize(&end);
}

std::vector<double> MetricConfig::values(std::span<const uint8_t> counter_data, size_t index) const {
  std::vector<double> out(metrics_.size());
  auto get = cupti_params<CUpti_Profiler_Host_EvaluateToGpuValues_Params>(
      CUpti_Profiler_Host_EvaluateToGpuValues_Params_STRUCT_SIZE);
  get.pHostObject = host_;
  get.pCounterDataImage = counter_data.data();
  get.counterDataImageSize = counter_data.size();
  get.rangeIndex = index;
  get.ppMetricNames = const_cast<const char**>(metrics_.data());
  get.numMetrics = metrics_.size();
  get.pMetricValues = out.data();
  KVLAPSE_CUPTI(api_, cuptiProfilerHostEvaluateToGpuValues, &get);
  return out;
}

std::string chip_name(const CuptiApi& api, int device) {
  auto get = cupti_params<CUpti_Device_GetChipName_Params>(CUpti_Device_GetChipName_Params_STRUCT_SIZE);
  get.deviceIndex = static_cast<size_t>(device);
  KVLAPSE_CUPTI(api, cuptiDeviceGetChipName, &get);
  return get.pChipName != nullptr ? get.pChipName : "";
}

}  // namespace kvlapse
