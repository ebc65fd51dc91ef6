// The capture over a table of CUPTI functions: the real one, or one that a test made.
#pragma once

#include "trace/cupti/cupti_api.h"
#include "trace/gpu_capture.h"

namespace kvlapse {

// `api` must outlive the capture. `problem`: why there is no table; its sources are then all missing.
std::unique_ptr<GpuCapture> make_cupti_capture(const CuptiApi* api, const CuptiProblem& problem,
                                               const GpuCaptureOptions& options);

}  // namespace kvlapse
