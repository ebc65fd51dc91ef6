// What recording costs the decode: the same decode with and without a recorder, in turns, so that both see
// the same machine.
#pragma once

#include <vector>

#include "kernels/cpu/bench/bench.h"
#include "trace/trace_types.h"

namespace kvlapse::cli {

// A recorded step (ms), its limit being the step without recording; at the qkv tier also the writer alone:
// MB/s of q, k, v from the first row to the finished file, its limit being a plain file of as many bytes as
// were stored, written and synchronised (so a value of 1 means that the disk is the limit). Writes traces to
// the temporary folder and removes them. The prompt is made of random tokens.
std::vector<BenchRow> bench_record(const DecodeBench& bench, TraceTier tier, const Model& model,
                                   const Policy& policy);

}  // namespace kvlapse::cli
