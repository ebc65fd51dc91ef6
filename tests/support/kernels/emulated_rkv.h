// An R-KV compaction in the CPU emulator; even seeds select with half the threads.
#pragma once

#include "tests/support/kernels/rkv_problem.h"

namespace kvlapse {

void run_rkv_emulated(RkvProblem& problem, uint64_t seed);

}  // namespace kvlapse
