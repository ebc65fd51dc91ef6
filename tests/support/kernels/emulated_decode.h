// Runs one launch of the decode kernel's text on the CPU emulator, in place on a problem's arrays.
#pragma once

#include "kernels/decode/decode_plan.h"
#include "tests/support/kernels/decode_problem.h"

namespace kvlapse {

void run_decode_emulated(DecodeProblem& problem, const DecodePlan& plan, uint64_t seed);

}  // namespace kvlapse
