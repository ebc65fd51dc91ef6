#include "kernels/cuda/exact_launch.h"
#include "kernels/cuda/exact_ops.cuh"
// After the operations that it is written in.
#include "kernels/gpu/exact_kernels.cuh"

namespace kvlapse {
namespace {

template <class Args>
void launch(cudaStream_t stream, void (*kernel)(Args), const Args& args) {
  LaunchShape shape;
  shape.n_blocks = args.n_blocks();
  shape.n_threads = exact::kThreads;
  if (shape.n_blocks > 0) launch_kernel(stream, {Args::kName, 0, nullptr}, shape, kernel, args);
}

}  // namespace

// A function of its own for each, so that profilers show what runs; its name begins with Args::kName.
#define KVLAPSE_EXACT_KERNEL(name, Args)                                \
  static __global__ void __launch_bounds__(exact::kThreads)             \
      name##_kernel(const __grid_constant__ exact::Args args) {         \
    __shared__ __align__(16) unsigned char shared[exact::kSharedBytes]; \
    exact::run(args, static_cast<int>(blockIdx.x), shared);             \
  }                                                                     \
  void launch_exact(cudaStream_t stream, const exact::Args& args) {     \
    launch(stream, name##_kernel, args);                                \
  }

KVLAPSE_EXACT_KERNEL(exact_embed, EmbedArgs)
KVLAPSE_EXACT_KERNEL(exact_norm, NormArgs)
KVLAPSE_EXACT_KERNEL(exact_matmul, MatmulArgs)
KVLAPSE_EXACT_KERNEL(exact_finish_qkv, FinishQkvArgs)
KVLAPSE_EXACT_KERNEL(exact_store, StoreArgs)
KVLAPSE_EXACT_KERNEL(exact_logits, LogitsArgs)
KVLAPSE_EXACT_KERNEL(exact_softmax, SoftmaxArgs)
KVLAPSE_EXACT_KERNEL(exact_values, ValuesArgs)
KVLAPSE_EXACT_KERNEL(exact_sum_chunks, SumChunksArgs)
KVLAPSE_EXACT_KERNEL(exact_silu, SiluArgs)
KVLAPSE_EXACT_KERNEL(exact_choose, ChooseArgs)
KVLAPSE_EXACT_KERNEL(exact_victim, VictimArgs)
KVLAPSE_EXACT_KERNEL(exact_gather, GatherArgs)
KVLAPSE_EXACT_KERNEL(exact_unit_keys, UnitKeysArgs)
KVLAPSE_EXACT_KERNEL(exact_mean_key, MeanKeyArgs)
KVLAPSE_EXACT_KERNEL(exact_similar_key, SimilarKeyArgs)

bool has_exact_kernels() {
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(exact_norm_kernel)) == cudaSuccess)
    return true;
  cudaGetLastError();
  return false;
}

}  // namespace kvlapse
