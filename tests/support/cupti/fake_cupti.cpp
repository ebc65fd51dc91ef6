#include "tests/support/cupti/fake_cupti.h"

#include <cstring>
#include <utility>

namespace kvlapse::test {
namespace {

FakeCupti* fake = nullptr;
int handle;  // whatever CUPTI's objects are

size_t record_bytes(CUpti_ActivityKind kind) {
  switch (kind) {
    case CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL: return sizeof(CUpti_ActivityKernel10);
    case CUPTI_ACTIVITY_KIND_MEMCPY: return sizeof(CUpti_ActivityMemcpy6);
    case CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION: return sizeof(CUpti_ActivityExternalCorrelation);
    default: return sizeof(CUpti_ActivityAPI);
  }
}

template <class T>
FakeCupti::Record record_of(const T& value) {
  FakeCupti::Record record{value.kind, std::vector<uint8_t>(sizeof(T))};
  std::memcpy(record.bytes.data(), &value, sizeof(T));
  return record;
}

// What every call does first.
#define RETURN_FAILURE(name) \
  if (const CUptiResult failed = fake->result_of(#name); failed != CUPTI_SUCCESS) return failed

}  // namespace

FakeCupti::FakeCupti() {
  fake = this;
  api.cuptiGetVersion = [](uint32_t* version) {
    *version = 130001;
    return CUPTI_SUCCESS;
  };
  api.cuCtxGetCurrent = [](CUcontext* context) {
    *context = reinterpret_cast<CUcontext>(&handle);
    return CUDA_SUCCESS;
  };
  api.cuptiGetTimestamp = [](uint64_t* now) {
    RETURN_FAILURE(cuptiGetTimestamp);
    *now = fake->now_ns += 10;
    return CUPTI_SUCCESS;
  };
  api.cuptiSubscribe_v2 = [](CUpti_SubscriberHandle* out, CUpti_CallbackFunc, void*,
                             CUpti_SubscriberParams* p) {
    std::strncpy(p->oldSubscriberName, fake->other_subscriber.c_str(), p->oldSubscriberSize - 1);
    RETURN_FAILURE(cuptiSubscribe_v2);
    *out = reinterpret_cast<CUpti_SubscriberHandle>(&handle);
    return CUPTI_SUCCESS;
  };
  api.cuptiUnsubscribe = [](CUpti_SubscriberHandle) { return fake->result_of("cuptiUnsubscribe"); };
  api.cuptiActivityRegisterCallbacks = [](CUpti_BuffersCallbackRequestFunc r,
                                          CUpti_BuffersCallbackCompleteFunc c) {
    RETURN_FAILURE(cuptiActivityRegisterCallbacks);
    fake->request = r, fake->complete = c;
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityEnable = [](CUpti_ActivityKind kind) {
    RETURN_FAILURE(cuptiActivityEnable);
    fake->enabled[kind] = true;
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityDisable = [](CUpti_ActivityKind kind) {
    fake->enabled[kind] = false;
    return fake->result_of("cuptiActivityDisable");
  };
  api.cuptiActivityFlushAll = [](uint32_t flags) {
    RETURN_FAILURE(cuptiActivityFlushAll);
    if (flags == CUPTI_ACTIVITY_FLAG_FLUSH_FORCED) fake->deliver();
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityGetNextRecord = [](uint8_t* buffer, size_t valid, CUpti_Activity** record) {
    RETURN_FAILURE(cuptiActivityGetNextRecord);
    uint8_t* next =
        *record == nullptr ? buffer : reinterpret_cast<uint8_t*>(*record) + record_bytes((*record)->kind);
    if (next >= buffer + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
    *record = reinterpret_cast<CUpti_Activity*>(next);
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityGetNumDroppedRecords = [](CUcontext, uint32_t, size_t* n) {
    RETURN_FAILURE(cuptiActivityGetNumDroppedRecords);
    *n = std::exchange(fake->dropped, 0);
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityPushExternalCorrelationId = [](CUpti_ExternalCorrelationKind, uint64_t id) {
    RETURN_FAILURE(cuptiActivityPushExternalCorrelationId);
    fake->externals.push_back(id);
    return CUPTI_SUCCESS;
  };
  api.cuptiActivityPopExternalCorrelationId = [](CUpti_ExternalCorrelationKind, uint64_t* last) {
    RETURN_FAILURE(cuptiActivityPopExternalCorrelationId);
    if (fake->externals.empty()) return CUPTI_ERROR_QUEUE_EMPTY;
    *last = fake->externals.back();
    fake->externals.pop_back();
    return CUPTI_SUCCESS;
  };
#define PLAIN(name) api.name = [](auto* params) { return (void)params, fake->result_of(#name); }
  PLAIN(cuptiProfilerInitialize);
  PLAIN(cuptiProfilerDeInitialize);
  PLAIN(cuptiProfilerHostDeinitialize);
  PLAIN(cuptiProfilerHostConfigAddMetrics);
  PLAIN(cuptiProfilerHostGetConfigImage);
  PLAIN(cuptiPmSamplingDisable);
  PLAIN(cuptiPmSamplingSetConfig);
  PLAIN(cuptiPmSamplingStart);
  PLAIN(cuptiPmSamplingStop);
  PLAIN(cuptiRangeProfilerDisable);
  PLAIN(cuptiRangeProfilerSetConfig);
  PLAIN(cuptiRangeProfilerStart);
  PLAIN(cuptiRangeProfilerStop);
  PLAIN(cuptiRangeProfilerDecodeData);
  PLAIN(cuptiRangeProfilerCounterDataImageInitialize);
#undef PLAIN
  api.cuptiDeviceGetChipName = [](CUpti_Device_GetChipName_Params* p) {
    p->pChipName = "GH100";
    return fake->result_of("cuptiDeviceGetChipName");
  };
  api.cuptiProfilerHostInitialize = [](CUpti_Profiler_Host_Initialize_Params* p) {
    p->pHostObject = reinterpret_cast<CUpti_Profiler_Host_Object*>(&handle);
    return fake->result_of("cuptiProfilerHostInitialize");
  };
  api.cuptiProfilerHostGetConfigImageSize = [](CUpti_Profiler_Host_GetConfigImageSize_Params* p) {
    p->configImageSize = 16;
    return fake->result_of("cuptiProfilerHostGetConfigImageSize");
  };
  api.cuptiProfilerHostGetNumOfPasses = [](CUpti_Profiler_Host_GetNumOfPasses_Params* p) {
    p->numOfPasses = fake->passes;
    return fake->result_of("cuptiProfilerHostGetNumOfPasses");
  };
  api.cuptiProfilerHostEvaluateToGpuValues = [](CUpti_Profiler_Host_EvaluateToGpuValues_Params* p) {
    RETURN_FAILURE(cuptiProfilerHostEvaluateToGpuValues);
    const std::vector<double>& from =
        fake->ranges.empty() ? fake->read_samples.at(p->rangeIndex).values : fake->ranges.at(p->rangeIndex);
    for (size_t i = 0; i < p->numMetrics; ++i) p->pMetricValues[i] = from.at(i);
    return CUPTI_SUCCESS;
  };
  api.cuptiPmSamplingGetCounterAvailability = [](CUpti_PmSampling_GetCounterAvailability_Params* p) {
    p->counterAvailabilityImageSize = 8;
    return fake->result_of("cuptiPmSamplingGetCounterAvailability");
  };
  api.cuptiPmSamplingEnable = [](CUpti_PmSampling_Enable_Params* p) {
    RETURN_FAILURE(cuptiPmSamplingEnable);
    p->pPmSamplingObject = reinterpret_cast<CUpti_PmSampling_Object*>(&handle);
    return CUPTI_SUCCESS;
  };
  api.cuptiPmSamplingGetCounterDataSize = [](CUpti_PmSampling_GetCounterDataSize_Params* p) {
    p->counterDataSize = 64;
    return fake->result_of("cuptiPmSamplingGetCounterDataSize");
  };
  api.cuptiPmSamplingCounterDataImageInitialize = [](CUpti_PmSampling_CounterDataImage_Initialize_Params*) {
    fake->read_samples.clear();
    return fake->result_of("cuptiPmSamplingCounterDataImageInitialize");
  };
  api.cuptiPmSamplingDecodeData = [](CUpti_PmSampling_DecodeData_Params* p) {
    RETURN_FAILURE(cuptiPmSamplingDecodeData);
    fake->read_samples = std::exchange(fake->samples, {});
    p->decodeStopReason = CUPTI_PM_SAMPLING_DECODE_STOP_REASON_END_OF_RECORDS;
    p->overflow = 0;
    return CUPTI_SUCCESS;
  };
  api.cuptiPmSamplingGetCounterDataInfo = [](CUpti_PmSampling_GetCounterDataInfo_Params* p) {
    p->numCompletedSamples = fake->read_samples.size();
    return fake->result_of("cuptiPmSamplingGetCounterDataInfo");
  };
  api.cuptiPmSamplingCounterDataGetSampleInfo = [](CUpti_PmSampling_CounterData_GetSampleInfo_Params* p) {
    RETURN_FAILURE(cuptiPmSamplingCounterDataGetSampleInfo);
    p->startTimestamp = fake->read_samples.at(p->sampleIndex).start;
    p->endTimestamp = fake->read_samples.at(p->sampleIndex).end;
    return CUPTI_SUCCESS;
  };
  api.cuptiRangeProfilerEnable = [](CUpti_RangeProfiler_Enable_Params* p) {
    RETURN_FAILURE(cuptiRangeProfilerEnable);
    p->pRangeProfilerObject = reinterpret_cast<CUpti_RangeProfiler_Object*>(&handle);
    return CUPTI_SUCCESS;
  };
  api.cuptiRangeProfilerGetCounterDataSize = [](CUpti_RangeProfiler_GetCounterDataSize_Params* p) {
    p->counterDataSize = 64;
    return fake->result_of("cuptiRangeProfilerGetCounterDataSize");
  };
  api.cuptiRangeProfilerGetCounterDataInfo = [](CUpti_RangeProfiler_GetCounterDataInfo_Params* p) {
    p->numTotalRanges = fake->ranges.size();
    return fake->result_of("cuptiRangeProfilerGetCounterDataInfo");
  };
}

FakeCupti::~FakeCupti() {
  fake = nullptr;
}

CUptiResult FakeCupti::result_of(const char* call) {
  std::lock_guard lock(mutex_);
  ++calls[call];
  const auto found = failures.find(call);
  if (found == failures.end()) return CUPTI_SUCCESS;
  const auto after = fail_after.find(call);
  return after != fail_after.end() && calls[call] <= after->second ? CUPTI_SUCCESS : found->second;
}

// The API call that launches: a record of it and, while a step runs, its external correlation.
uint32_t FakeCupti::call_record() {
  const uint32_t correlation = next_correlation++;
  if (!externals.empty() && enabled[CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION]) {
    CUpti_ActivityExternalCorrelation external{};
    external.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
    external.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
    external.externalId = externals.back();
    external.correlationId = correlation;
    records.push_back(record_of(external));
  }
  CUpti_ActivityAPI call{};
  call.kind = CUPTI_ACTIVITY_KIND_RUNTIME;
  call.correlationId = correlation;
  records.push_back(record_of(call));
  return correlation;
}

uint32_t FakeCupti::kernel(const char* name, uint64_t start_ns, uint64_t end_ns, uint32_t correlation) {
  if (correlation == 0) correlation = call_record();
  if (!enabled[CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL]) return correlation;
  CUpti_ActivityKernel10 k{};
  k.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  k.name = name;
  k.start = start_ns, k.end = end_ns;
  k.correlationId = correlation;
  k.gridX = k.gridY = k.gridZ = k.blockX = k.blockY = k.blockZ = 1;
  records.push_back(record_of(k));
  return correlation;
}

uint32_t FakeCupti::copy(uint64_t start_ns, uint64_t bytes) {
  const uint32_t correlation = call_record();
  CUpti_ActivityMemcpy6 c{};
  c.kind = CUPTI_ACTIVITY_KIND_MEMCPY;
  c.start = start_ns, c.end = start_ns + 5;
  c.bytes = bytes;
  c.copyKind = 2;
  c.correlationId = correlation;
  records.push_back(record_of(c));
  return correlation;
}

void FakeCupti::deliver() {
  if (request == nullptr || records.empty()) return;
  uint8_t* buffer = nullptr;
  size_t size = 0, most = 0, used = 0;
  request(&buffer, &size, &most);
  for (const Record& record : records) {
    if (used + record.bytes.size() > size) {
      complete(nullptr, 0, buffer, size, used);
      request(&buffer, &size, &most);
      used = 0;
    }
    std::memcpy(buffer + used, record.bytes.data(), record.bytes.size());
    used += record.bytes.size();
  }
  records.clear();
  complete(nullptr, 0, buffer, size, used);
}

}  // namespace kvlapse::test
