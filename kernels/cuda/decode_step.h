// Small device operations around the fused decode step.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.h"

namespace kvlapse {

// step_pos[b] += 1 for every b in [0, batch) that is not negative: the next token.
void launch_advance_positions(cudaStream_t stream, int32_t* step_pos, int batch, LaunchLog* log = nullptr);

}  // namespace kvlapse
