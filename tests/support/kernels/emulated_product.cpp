#include "tests/support/kernels/emulated_product.h"

#include "tests/support/kernels/emulated_device.h"
// After the emulator, which stands for the device's operations.
#include "kernels/cuda/product_kernel.cuh"

namespace kvlapse {

void run_product_emulated(const ProductArgs& args, int smem_bytes, int n_blocks, uint64_t seed) {
  const device::EmulatedLaunch launch{n_blocks, kProductThreads, args.cluster, smem_bytes, seed};
  device::with_product(args, [&]<int kGroups, int kSets, int kBlocks>() {
    device::run_emulated(
        launch, [&](unsigned char* shared) { device::Product<kGroups, kSets, kBlocks>(args, shared).run(); });
  });
}

}  // namespace kvlapse
