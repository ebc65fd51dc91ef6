#include "trace/cupti/dram_sampler.h"

#include <time.h>

#include <chrono>
#include <cmath>
#include <cstdlib>

namespace kvlapse {
namespace {

constexpr const char* kMetrics[] = {"dram__bytes_read.sum", "dram__bytes_write.sum", "lts__t_bytes.sum"};
constexpr size_t kHardwareBufferBytes = size_t{64} << 20;
constexpr uint32_t kMaxSamples = 2048;  // of one reading; four times what comes between two
constexpr auto kPeriod = std::chrono::milliseconds(50);
constexpr int64_t kSameClock_ns = 1'000'000'000;

int64_t wall_ns() {
  timespec now{};
  clock_gettime(CLOCK_REALTIME, &now);
  return static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

}  // namespace

DramSampler::DramSampler(const CuptiApi& api, int device, std::function<int64_t()> session_ns,
                         int64_t interval_ns)
    : api_(api), device_(device), session_ns_(std::move(session_ns)) {
  try {
    configure(interval_ns);
    start();
  } catch (...) {
    close();
    throw;
  }
  thread_ = std::thread([this] { run(); });
}

DramSampler::~DramSampler() {
  stop();
}

void DramSampler::configure(int64_t interval_ns) {
  auto init = cupti_params<CUpti_Profiler_Initialize_Params>(CUpti_Profiler_Initialize_Params_STRUCT_SIZE);
  KVLAPSE_CUPTI(api_, cuptiProfilerInitialize, &init);
  const std::string chip = chip_name(api_, device_);
  auto available = cupti_params<CUpti_PmSampling_GetCounterAvailability_Params>(
      CUpti_PmSampling_GetCounterAvailability_Params_STRUCT_SIZE);
  available.deviceIndex = static_cast<size_t>(device_);
  KVLAPSE_CUPTI(api_, cuptiPmSamplingGetCounterAvailability, &available);
  std::vector<uint8_t> availability(available.counterAvailabilityImageSize);
  available.pCounterAvailabilityImage = availability.data();
  KVLAPSE_CUPTI(api_, cuptiPmSamplingGetCounterAvailability, &available);
  config_ =
      std::make_unique<MetricConfig>(api_, CUPTI_PROFILER_TYPE_PM_SAMPLING, chip, availability,
                                     std::vector<const char*>(std::begin(kMetrics), std::end(kMetrics)));
  auto enable = cupti_params<CUpti_PmSampling_Enable_Params>(CUpti_PmSampling_Enable_Params_STRUCT_SIZE);
  enable.deviceIndex = static_cast<size_t>(device_);
  KVLAPSE_CUPTI(api_, cuptiPmSamplingEnable, &enable);
  object_ = enable.pPmSamplingObject;
  auto set = cupti_params<CUpti_PmSampling_SetConfig_Params>(CUpti_PmSampling_SetConfig_Params_STRUCT_SIZE);
  set.pPmSamplingObject = object_;
  set.configSize = config_->image().size();
  set.pConfig = config_->image().data();
  set.hardwareBufferSize = kHardwareBufferBytes;
  set.samplingInterval = static_cast<uint64_t>(interval_ns);
  set.triggerMode = CUPTI_PM_SAMPLING_TRIGGER_MODE_GPU_TIME_INTERVAL;
  set.hwBufferAppendMode = CUPTI_PM_SAMPLING_HARDWARE_BUFFER_APPEND_MODE_KEEP_LATEST;
  KVLAPSE_CUPTI(api_, cuptiPmSamplingSetConfig, &set);
  auto size = cupti_params<CUpti_PmSampling_GetCounterDataSize_Params>(
      CUpti_PmSampling_GetCounterDataSize_Params_STRUCT_SIZE);
  size.pPmSamplingObject = object_;
  size.pMetricNames = config_->metrics().data();
  size.numMetrics = config_->metrics().size();
  size.maxSamples = kMaxSamples;
  KVLAPSE_CUPTI(api_, cuptiPmSamplingGetCounterDataSize, &size);
  image_.resize(size.counterDataSize);
  clear_image();
}

void DramSampler::clear_image() {
  auto clear = cupti_params<CUpti_PmSampling_CounterDataImage_Initialize_Params>(
      CUpti_PmSampling_CounterDataImage_Initialize_Params_STRUCT_SIZE);
  clear.pPmSamplingObject = object_;
  clear.counterDataSize = image_.size();
  clear.pCounterData = image_.data();
  KVLAPSE_CUPTI(api_, cuptiPmSamplingCounterDataImageInitialize, &clear);
}

void DramSampler::start() {
  auto start = cupti_params<CUpti_PmSampling_Start_Params>(CUpti_PmSampling_Start_Params_STRUCT_SIZE);
  start.pPmSamplingObject = object_;
  KVLAPSE_CUPTI(api_, cuptiPmSamplingStart, &start);
  running_ = true;
}

void DramSampler::run() {
  try {
    while (!stopping_) {
      std::this_thread::sleep_for(kPeriod);
      drain();
    }
  } catch (const CuptiFailure& failure) {
    std::lock_guard lock(mutex_);
    problem_ = failure.problem;
  }
}

void DramSampler::drain() {
  while (true) {
    auto decode =
        cupti_params<CUpti_PmSampling_DecodeData_Params>(CUpti_PmSampling_DecodeData_Params_STRUCT_SIZE);
    decode.pPmSamplingObject = object_;
    decode.pCounterDataImage = image_.data();
    decode.counterDataImageSize = image_.size();
    KVLAPSE_CUPTI(api_, cuptiPmSamplingDecodeData, &decode);
    auto info = cupti_params<CUpti_PmSampling_GetCounterDataInfo_Params>(
        CUpti_PmSampling_GetCounterDataInfo_Params_STRUCT_SIZE);
    info.pCounterDataImage = image_.data();
    info.counterDataImageSize = image_.size();
    KVLAPSE_CUPTI(api_, cuptiPmSamplingGetCounterDataInfo, &info);
    std::vector<DramSample> samples;
    for (size_t i = 0; i < info.numCompletedSamples; ++i) {
      auto at = cupti_params<CUpti_PmSampling_CounterData_GetSampleInfo_Params>(
          CUpti_PmSampling_CounterData_GetSampleInfo_Params_STRUCT_SIZE);
      at.pPmSamplingObject = object_;
      at.pCounterDataImage = image_.data();
      at.counterDataImageSize = image_.size();
      at.sampleIndex = i;
      KVLAPSE_CUPTI(api_, cuptiPmSamplingCounterDataGetSampleInfo, &at);
      if (at.endTimestamp <= at.startTimestamp) continue;
      const std::vector<double> bytes = config_->values(image_, i);
      samples.push_back({static_cast<int64_t>(at.startTimestamp), static_cast<int64_t>(at.endTimestamp),
                         std::llround(bytes[0]), std::llround(bytes[1]), std::llround(bytes[2])});
    }
    {
      std::lock_guard lock(mutex_);
      if (decode.overflow != 0) ++n_dropped_;
      if (!samples.empty()) {
        // The GPU's clock counts the wall's nanoseconds; where it does not, the newest sample ended just
        // before it was read, at the latest.
        const int64_t wall = wall_ns(), session = session_ns_();
        const int64_t newest = samples.back().end_ns;
        const int64_t offset = std::llabs(wall - newest) < kSameClock_ns ? session - wall : session - newest;
        session_minus_gpu_ns_ = std::min(session_minus_gpu_ns_, offset);
      }
      for (DramSample& sample : samples) {
        sample.start_ns += session_minus_gpu_ns_, sample.end_ns += session_minus_gpu_ns_;
        if (sample.start_ns < 0) continue;  // began before the session
        samples_.push_back(sample);
        ++n_samples_;
      }
    }
    clear_image();
    if (decode.decodeStopReason != CUPTI_PM_SAMPLING_DECODE_STOP_REASON_COUNTER_DATA_FULL) return;
  }
}

void DramSampler::stop() {
  stopping_ = true;
  if (thread_.joinable()) thread_.join();
  close();
}

void DramSampler::close() {
  if (running_) {
    running_ = false;
    auto end = cupti_params<CUpti_PmSampling_Stop_Params>(CUpti_PmSampling_Stop_Params_STRUCT_SIZE);
    end.pPmSamplingObject = object_;
    try {
      KVLAPSE_CUPTI(api_, cuptiPmSamplingStop, &end);
      drain();
    } catch (const CuptiFailure& failure) {
      std::lock_guard lock(mutex_);
      if (problem_.reason.empty()) problem_ = failure.problem;
    }
  }
  if (object_ != nullptr) {
    auto disable = cupti_params<CUpti_PmSampling_Disable_Params>(CUpti_PmSampling_Disable_Params_STRUCT_SIZE);
    disable.pPmSamplingObject = object_;
    api_.cuptiPmSamplingDisable(&disable);
    object_ = nullptr;
  }
  config_.reset();
}

void DramSampler::take(GpuBatch& batch) {
  std::lock_guard lock(mutex_);
  batch.dram.insert(batch.dram.end(), samples_.begin(), samples_.end());
  samples_.clear();
}

GpuSource DramSampler::summary() const {
  std::lock_guard lock(mutex_);
  return {"dram", "sampled", problem_.reason, problem_.advice, n_samples_, n_dropped_, 0};
}

}  // namespace kvlapse
