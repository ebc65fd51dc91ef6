#include "kernels/cuda/exact_ops.cuh"
#include "kernels/cuda/replay_launch.h"
// After the operations that it is written in.
#include "kernels/gpu/replay_kernels.cuh"

namespace kvlapse {
namespace {

template <class Args>
void launch(cudaStream_t stream, void (*kernel)(Args), const Args& args) {
  LaunchShape shape;
  shape.n_blocks = args.n_blocks();
  shape.n_threads = Args::kThreads;
  shape.smem_bytes = args.smem_bytes();
  if (shape.n_blocks == 0) return;
  if (shape.smem_bytes > 48 * 1024)
    KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                            cudaFuncAttributeMaxDynamicSharedMemorySize, shape.smem_bytes));
  launch_kernel(stream, {Args::kName, 0, nullptr}, shape, kernel, args);
}

}  // namespace

#define KVLAPSE_REPLAY_KERNEL(name, Args, call)                        \
  static __global__ void __launch_bounds__(gpu_replay::Args::kThreads) \
      name##_kernel(const __grid_constant__ gpu_replay::Args args) {   \
    extern __shared__ __align__(16) unsigned char shared[];            \
    gpu_replay::call(args, device::block_index(), shared);             \
  }
#define KVLAPSE_REPLAY_LAUNCH(name, Args)                                 \
  void launch_replay(cudaStream_t stream, const gpu_replay::Args& args) { \
    launch(stream, name##_kernel, args);                                  \
  }
#define KVLAPSE_REPLAY_LAUNCH_LANES(name, Args)                                        \
  void launch_replay(cudaStream_t stream, const gpu_replay::Args& args) {              \
    launch(stream, args.shape.lanes() == 4 ? name##_4_kernel : name##_8_kernel, args); \
  }

KVLAPSE_REPLAY_KERNEL(replay_values, ValuesArgs, run)
KVLAPSE_REPLAY_KERNEL(replay_rows_4, RowsArgs, run<4>)
KVLAPSE_REPLAY_KERNEL(replay_rows_8, RowsArgs, run<8>)
KVLAPSE_REPLAY_KERNEL(replay_repairs, RepairsArgs, run)
KVLAPSE_REPLAY_KERNEL(replay_future, FutureArgs, run)
KVLAPSE_REPLAY_KERNEL(replay_sum_future, SumFutureArgs, run)
KVLAPSE_REPLAY_KERNEL(replay_close, CloseArgs, run)

KVLAPSE_REPLAY_LAUNCH(replay_values, ValuesArgs)
KVLAPSE_REPLAY_LAUNCH_LANES(replay_rows, RowsArgs)
KVLAPSE_REPLAY_LAUNCH(replay_repairs, RepairsArgs)
KVLAPSE_REPLAY_LAUNCH(replay_future, FutureArgs)
KVLAPSE_REPLAY_LAUNCH(replay_sum_future, SumFutureArgs)
KVLAPSE_REPLAY_LAUNCH(replay_close, CloseArgs)

static __global__ void __launch_bounds__(gpu_replay::MassesArgs::kThreads, 2)
    replay_masses_kernel(const __grid_constant__ gpu_replay::MassesArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  gpu_replay::run(args, device::block_index(), shared);
}

KVLAPSE_REPLAY_LAUNCH(replay_masses, MassesArgs)

template <int kDim>
static __global__ void __launch_bounds__(gpu_replay::LogitsArgs::kThreads, 2)
    replay_logits_kernel(const __grid_constant__ gpu_replay::LogitsArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  gpu_replay::Logits<kDim>(args, device::block_index(), shared).run();
}

void launch_replay(cudaStream_t stream, const gpu_replay::LogitsArgs& args) {
  launch(stream,
         args.shape.dim == 128  ? replay_logits_kernel<128>
         : args.shape.dim == 64 ? replay_logits_kernel<64>
                                : replay_logits_kernel<0>,
         args);
}

template <int kTiles, bool kFull>
static __global__ void __launch_bounds__(gpu_replay::OutputsArgs::kThreads, kFull ? 1 : 2)
    replay_outputs_kernel(const __grid_constant__ gpu_replay::OutputsArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  gpu_replay::Outputs<kTiles, kFull>(args, device::block_index(), shared).run();
}

void launch_replay(cudaStream_t stream, const gpu_replay::OutputsArgs& args) {
  const bool wide = args.column_tiles() == 16;
  launch(stream,
         args.full ? (wide ? replay_outputs_kernel<16, true> : replay_outputs_kernel<8, true>)
                   : (wide ? replay_outputs_kernel<16, false> : replay_outputs_kernel<8, false>),
         args);
}

template <int kLanes, bool kLarge>
static __global__ void __launch_bounds__(kReplayDecideThreads, kLarge ? 1 : 2)
    replay_decide_kernel(const __grid_constant__ gpu_replay::DecideArgs args) {
  extern __shared__ __align__(16) unsigned char shared[];
  gpu_replay::Decide<kLanes, kLarge>(args, device::block_index(), shared).run();
}

void launch_replay(cudaStream_t stream, const gpu_replay::DecideArgs& args, bool large) {
  const bool four = args.shape.lanes() == 4;
  auto* kernel = large ? (four ? replay_decide_kernel<4, true> : replay_decide_kernel<8, true>)
                       : (four ? replay_decide_kernel<4, false> : replay_decide_kernel<8, false>);
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                          cudaFuncAttributeMaxDynamicSharedMemorySize, args.smem));
  LaunchShape shape;
  shape.n_blocks = args.n_blocks();
  shape.n_threads = args.n_threads;
  shape.smem_bytes = args.smem;
  shape.cluster = args.cluster;
  launch_kernel(stream, {gpu_replay::DecideArgs::kName, 0, nullptr}, shape, kernel, args);
}

}  // namespace kvlapse
