// The product chain's kernel in the emulator.
#pragma once

#include <cstdint>

#include "kernels/decode/chain_args.h"

namespace kvlapse {

void run_chain_emulated(const ChainArgs& args, int smem_bytes, int n_blocks, uint64_t seed);

}  // namespace kvlapse
