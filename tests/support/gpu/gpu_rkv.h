// An R-KV compaction of a problem in host arrays, run on the GPU.
#pragma once

#include "kernels/cuda/rkv.h"
#include "tests/support/kernels/rkv_problem.h"

namespace kvlapse {

void run_rkv_gpu(RkvProblem& problem);

}  // namespace kvlapse
