// CUPTI as a table of functions that is filled at run time: the program starts on machines without it, and
// tests put functions of their own in it. Built only with the CUDA toolkit (its headers); linked to none of
// its libraries. The table is immutable once loaded and may be shared.
#pragma once

#include <cupti.h>
#include <cupti_pmsampling.h>
#include <cupti_profiler_host.h>
#include <cupti_profiler_target.h>
#include <cupti_range_profiler.h>
#include <cupti_target.h>

#include <string>

namespace kvlapse {

#define KVLAPSE_CUPTI_FUNCTIONS(X)                \
  X(cuptiGetVersion)                              \
  X(cuptiGetTimestamp)                            \
  X(cuptiSubscribe_v2)                            \
  X(cuptiUnsubscribe)                             \
  X(cuptiActivityRegisterCallbacks)               \
  X(cuptiActivityEnable)                          \
  X(cuptiActivityDisable)                         \
  X(cuptiActivityFlushAll)                        \
  X(cuptiActivityGetNextRecord)                   \
  X(cuptiActivityGetNumDroppedRecords)            \
  X(cuptiActivityPushExternalCorrelationId)       \
  X(cuptiActivityPopExternalCorrelationId)        \
  X(cuptiProfilerInitialize)                      \
  X(cuptiProfilerDeInitialize)                    \
  X(cuptiDeviceGetChipName)                       \
  X(cuptiProfilerHostInitialize)                  \
  X(cuptiProfilerHostDeinitialize)                \
  X(cuptiProfilerHostConfigAddMetrics)            \
  X(cuptiProfilerHostGetConfigImageSize)          \
  X(cuptiProfilerHostGetConfigImage)              \
  X(cuptiProfilerHostGetNumOfPasses)              \
  X(cuptiProfilerHostEvaluateToGpuValues)         \
  X(cuptiPmSamplingGetCounterAvailability)        \
  X(cuptiPmSamplingEnable)                        \
  X(cuptiPmSamplingDisable)                       \
  X(cuptiPmSamplingSetConfig)                     \
  X(cuptiPmSamplingGetCounterDataSize)            \
  X(cuptiPmSamplingCounterDataImageInitialize)    \
  X(cuptiPmSamplingStart)                         \
  X(cuptiPmSamplingStop)                          \
  X(cuptiPmSamplingDecodeData)                    \
  X(cuptiPmSamplingGetCounterDataInfo)            \
  X(cuptiPmSamplingCounterDataGetSampleInfo)      \
  X(cuptiRangeProfilerEnable)                     \
  X(cuptiRangeProfilerDisable)                    \
  X(cuptiRangeProfilerSetConfig)                  \
  X(cuptiRangeProfilerStart)                      \
  X(cuptiRangeProfilerStop)                       \
  X(cuptiRangeProfilerDecodeData)                 \
  X(cuptiRangeProfilerGetCounterDataSize)         \
  X(cuptiRangeProfilerCounterDataImageInitialize) \
  X(cuptiRangeProfilerGetCounterDataInfo)

struct CuptiApi {
#define KVLAPSE_CUPTI_MEMBER(name) decltype(&::name) name = nullptr;
  KVLAPSE_CUPTI_FUNCTIONS(KVLAPSE_CUPTI_MEMBER)
#undef KVLAPSE_CUPTI_MEMBER
  decltype(&::cuCtxGetCurrent) cuCtxGetCurrent = nullptr;  // of the driver; null without one
};

// Why something of the profiler is missing, in words, and what to do.
struct CuptiProblem {
  std::string reason, advice;
};

// Thrown inside the sources, never out of a capture: recording goes on without the source.
struct CuptiFailure {
  CuptiProblem problem;
};

CuptiProblem explain_cupti(const char* call, CUptiResult result, const std::string& detail = "");

// Fails with CuptiFailure unless `result` is success.
void check_cupti(const char* call, CUptiResult result);
#define KVLAPSE_CUPTI(api, name, ...) ::kvlapse::check_cupti(#name, (api).name(__VA_ARGS__))

// A parameter struct with its size set and the rest zero.
template <class Params>
Params cupti_params(size_t struct_bytes) {
  Params params{};
  params.structSize = struct_bytes;
  return params;
}

// Finds the library by name, then in the toolkit's own folders. False, with the problem, when it is missing,
// too old or incomplete. What is loaded stays loaded.
bool load_cupti(CuptiApi& api, CuptiProblem& problem);

}  // namespace kvlapse
