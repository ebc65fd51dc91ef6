// The product's kernel in the emulator.
#pragma once

#include <cstdint>

#include "kernels/decode/product_args.h"

namespace kvlapse {

void run_product_emulated(const ProductArgs& args, int smem_bytes, int n_blocks, uint64_t seed);

}  // namespace kvlapse
