// An R-KV compaction in the CPU emulator; odd seeds in clusters, the others in two launches; blocks
// have as many threads as rows when the seed is a multiple of three, the most otherwise.
#pragma once

#include "tests/support/kernels/rkv_problem.h"

namespace kvlapse {

void run_rkv_emulated(RkvProblem& problem, uint64_t seed);

}  // namespace kvlapse
