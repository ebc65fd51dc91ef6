// Configurations that replays are timed with: four policies that differ in cost, budgets of 10 % to 50 % of
// the sequence.
#pragma once

#include <vector>

#include "replay/replay_engine.h"

namespace kvlapse {

std::vector<ReplayConfig> bench_configs(int n_configs, const RowSequence& sequence);
// The same policies at budgets of 10 % to 40 %, both ends included.
std::vector<ReplayConfig> gpu_bench_configs(int n_configs, const RowSequence& sequence);

}  // namespace kvlapse
