#include "trace/cupti/kernel_counters.h"

namespace kvlapse {
namespace {

constexpr const char* kMetrics[] = {"gpu__time_duration.sum",
                                    "dram__bytes_read.sum",
                                    "dram__bytes_write.sum",
                                    "lts__t_bytes.sum",
                                    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
                                    "sm__warps_active.avg.pct_of_peak_sustained_active"};
constexpr size_t kMaxKernels = 2048;  // of one step

// Null would be taken, and count nothing.
CUcontext current_context(const CuptiApi& api) {
  CUcontext context = nullptr;
  if (api.cuCtxGetCurrent == nullptr || api.cuCtxGetCurrent(&context) != CUDA_SUCCESS || context == nullptr)
    throw CuptiFailure{{"no CUDA context is current", "record with --device cuda"}};
  return context;
}

}  // namespace

KernelCounterSource::KernelCounterSource(const CuptiApi& api, int device, std::function<int64_t()> session_ns)
    : api_(api), session_ns_(std::move(session_ns)) {
  auto init = cupti_params<CUpti_Profiler_Initialize_Params>(CUpti_Profiler_Initialize_Params_STRUCT_SIZE);
  KVLAPSE_CUPTI(api_, cuptiProfilerInitialize, &init);
  const std::string chip = chip_name(api_, device);
  auto enable =
      cupti_params<CUpti_RangeProfiler_Enable_Params>(CUpti_RangeProfiler_Enable_Params_STRUCT_SIZE);
  enable.ctx = current_context(api_);
  KVLAPSE_CUPTI(api_, cuptiRangeProfilerEnable, &enable);
  object_ = enable.pRangeProfilerObject;
  try {
    config_ = std::make_unique<MetricConfig>(
        api_, CUPTI_PROFILER_TYPE_RANGE_PROFILER, chip, std::span<const uint8_t>(),
        std::vector<const char*>(std::begin(kMetrics), std::end(kMetrics)));
    auto size = cupti_params<CUpti_RangeProfiler_GetCounterDataSize_Params>(
        CUpti_RangeProfiler_GetCounterDataSize_Params_STRUCT_SIZE);
    size.pRangeProfilerObject = object_;
    size.pMetricNames = config_->metrics().data();
    size.numMetrics = config_->metrics().size();
    size.maxNumOfRanges = kMaxKernels;
    size.maxNumRangeTreeNodes = kMaxKernels;
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerGetCounterDataSize, &size);
    image_.resize(size.counterDataSize);
  } catch (...) {
    disable();
    throw;
  }
}

KernelCounterSource::~KernelCounterSource() {
  disable();
}

void KernelCounterSource::disable() {
  if (object_ == nullptr) return;
  auto end = cupti_params<CUpti_RangeProfiler_Disable_Params>(CUpti_RangeProfiler_Disable_Params_STRUCT_SIZE);
  end.pRangeProfilerObject = object_;
  api_.cuptiRangeProfilerDisable(&end);
  object_ = nullptr;
}

void KernelCounterSource::begin_step(int64_t step) {
  if (!problem_.reason.empty()) return;
  const int64_t start_ns = session_ns_();
  step_ = step;
  try {
    auto clear = cupti_params<CUpti_RangeProfiler_CounterDataImage_Initialize_Params>(
        CUpti_RangeProfiler_CounterDataImage_Initialize_Params_STRUCT_SIZE);
    clear.pRangeProfilerObject = object_;
    clear.counterDataSize = image_.size();
    clear.pCounterData = image_.data();
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerCounterDataImageInitialize, &clear);
    auto set =
        cupti_params<CUpti_RangeProfiler_SetConfig_Params>(CUpti_RangeProfiler_SetConfig_Params_STRUCT_SIZE);
    set.pRangeProfilerObject = object_;
    set.configSize = config_->image().size();
    set.pConfig = config_->image().data();
    set.counterDataImageSize = image_.size();
    set.pCounterDataImage = image_.data();
    set.range = CUPTI_AutoRange;
    set.replayMode = CUPTI_KernelReplay;
    set.maxRangesPerPass = kMaxKernels;
    set.numNestingLevels = 1;
    set.minNestingLevel = 1;
    set.targetNestingLevel = 1;  // ranges of a kernel lie at level 1; at level 0 there are none to count
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerSetConfig, &set);
    auto start = cupti_params<CUpti_RangeProfiler_Start_Params>(CUpti_RangeProfiler_Start_Params_STRUCT_SIZE);
    start.pRangeProfilerObject = object_;
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerStart, &start);
  } catch (const CuptiFailure& failure) {
    problem_ = failure.problem;
  }
  overhead_ns_ += session_ns_() - start_ns;
}

void KernelCounterSource::end_step(std::span<const LaunchRecord> launches) {
  if (!problem_.reason.empty()) return;
  const int64_t start_ns = session_ns_();
  try {
    auto stop = cupti_params<CUpti_RangeProfiler_Stop_Params>(CUpti_RangeProfiler_Stop_Params_STRUCT_SIZE);
    stop.pRangeProfilerObject = object_;
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerStop, &stop);
    auto decode = cupti_params<CUpti_RangeProfiler_DecodeData_Params>(
        CUpti_RangeProfiler_DecodeData_Params_STRUCT_SIZE);
    decode.pRangeProfilerObject = object_;
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerDecodeData, &decode);
    n_dropped_ += static_cast<int64_t>(decode.numOfRangeDropped);
    auto info = cupti_params<CUpti_RangeProfiler_GetCounterDataInfo_Params>(
        CUpti_RangeProfiler_GetCounterDataInfo_Params_STRUCT_SIZE);
    info.pCounterDataImage = image_.data();
    info.counterDataImageSize = image_.size();
    KVLAPSE_CUPTI(api_, cuptiRangeProfilerGetCounterDataInfo, &info);
    for (size_t i = 0; i < info.numTotalRanges; ++i) {
      const std::vector<double> v = config_->values(image_, i);
      rows_.push_back({step_, static_cast<int>(i), v[0], v[1], v[2], v[3], v[4], v[5], std::nullopt});
      // The profiler numbers kernels and does not name them: only when there are as many as launches is it
      // known which is which.
      if (info.numTotalRanges == launches.size()) rows_.back().launch = launches[i];
    }
    n_rows_ += static_cast<int64_t>(info.numTotalRanges);
    if (info.numTotalRanges == 0)
      throw CuptiFailure{
          {"the range profiler counted no kernels in a step", "use --counters activity or dram"}};
  } catch (const CuptiFailure& failure) {
    problem_ = failure.problem;
  }
  overhead_ns_ += session_ns_() - start_ns;
}

void KernelCounterSource::take(GpuBatch& batch) {
  batch.counters.insert(batch.counters.end(), rows_.begin(), rows_.end());
  rows_.clear();
}

GpuSource KernelCounterSource::summary() const {
  return {"kernels", "measured", problem_.reason, problem_.advice, n_rows_, n_dropped_, overhead_ns_};
}

}  // namespace kvlapse
