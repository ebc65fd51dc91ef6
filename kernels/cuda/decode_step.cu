#include "kernels/cuda/decode_step.h"

namespace kvlapse {
namespace {

struct AdvanceArgs {
  int32_t* step_pos;  // [B]
  int32_t batch;
};

__global__ void advance_positions_kernel(AdvanceArgs args) {
  const int b = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (b < args.batch && args.step_pos[b] >= 0) ++args.step_pos[b];
}

}  // namespace

void launch_advance_positions(cudaStream_t stream, int32_t* step_pos, int batch, LaunchLog* log) {
  LaunchShape shape;
  shape.n_threads = 256;
  shape.n_blocks = (batch + 255) / 256;
  launch_kernel(stream, {"advance_positions", static_cast<uint64_t>(batch) * 8, log}, shape,
                advance_positions_kernel, AdvanceArgs{step_pos, batch});
}

}  // namespace kvlapse
