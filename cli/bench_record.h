// What recording costs the decode: the same decode with and without a recorder, in turns, so that both see
// the same machine.
#pragma once

#include <vector>

#include "kernels/cpu/bench/bench.h"
#include "trace/trace_types.h"

namespace kvlapse::cli {

// One row: a recorded step (ms), its limit being the step without recording. Writes a trace to the temporary
// folder and removes it. The prompt is made of random tokens.
std::vector<BenchRow> bench_record(const DecodeBench& bench, TraceTier tier, const Model& model,
                                   const Policy& policy);

}  // namespace kvlapse::cli
