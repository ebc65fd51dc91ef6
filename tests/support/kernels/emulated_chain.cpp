#include "tests/support/kernels/emulated_chain.h"

#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/chain_kernel.cuh"

namespace kvlapse {

void run_chain_emulated(const ChainArgs& args, int smem_bytes, int n_blocks, uint64_t seed) {
  const device::EmulatedLaunch launch{n_blocks, kChainThreads, 1, smem_bytes, seed};
  device::run_emulated(launch, [&](unsigned char* shared) { device::ProductChain(args, shared).run(); });
}

}  // namespace kvlapse
