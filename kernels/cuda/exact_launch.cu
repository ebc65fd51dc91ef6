#include "kernels/cuda/exact_launch.h"
#include "kernels/cuda/exact_ops.cuh"
// After the operations that it is written in.
#include "kernels/gpu/exact_kernels.cuh"

namespace kvlapse {
namespace {

template <class Args>
__global__ void __launch_bounds__(exact::kThreads) exact_kernel(const __grid_constant__ Args args) {
  __shared__ __align__(16) unsigned char shared[exact::kSharedBytes];
  exact::run(args, static_cast<int>(blockIdx.x), shared);
}

template <class Args>
void launch(cudaStream_t stream, const char* name, const Args& args) {
  LaunchShape shape;
  shape.n_blocks = args.n_blocks();
  shape.n_threads = exact::kThreads;
  if (shape.n_blocks > 0) launch_kernel(stream, {name, 0, nullptr}, shape, exact_kernel<Args>, args);
}

}  // namespace

bool has_exact_kernels() {
  cudaFuncAttributes found{};
  const void* kernel = reinterpret_cast<const void*>(exact_kernel<exact::NormArgs>);
  if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess) return true;
  cudaGetLastError();
  return false;
}

void launch_exact(cudaStream_t stream, const exact::EmbedArgs& a) {
  launch(stream, "exact_embed", a);
}
void launch_exact(cudaStream_t stream, const exact::NormArgs& a) {
  launch(stream, "exact_norm", a);
}
void launch_exact(cudaStream_t stream, const exact::MatmulArgs& a) {
  launch(stream, "exact_matmul", a);
}
void launch_exact(cudaStream_t stream, const exact::FinishQkvArgs& a) {
  launch(stream, "exact_finish_qkv", a);
}
void launch_exact(cudaStream_t stream, const exact::StoreArgs& a) {
  launch(stream, "exact_store", a);
}
void launch_exact(cudaStream_t stream, const exact::LogitsArgs& a) {
  launch(stream, "exact_logits", a);
}
void launch_exact(cudaStream_t stream, const exact::SoftmaxArgs& a) {
  launch(stream, "exact_softmax", a);
}
void launch_exact(cudaStream_t stream, const exact::ValuesArgs& a) {
  launch(stream, "exact_values", a);
}
void launch_exact(cudaStream_t stream, const exact::SumChunksArgs& a) {
  launch(stream, "exact_sum_chunks", a);
}
void launch_exact(cudaStream_t stream, const exact::SiluArgs& a) {
  launch(stream, "exact_silu", a);
}
void launch_exact(cudaStream_t stream, const exact::ChooseArgs& a) {
  launch(stream, "exact_choose", a);
}
void launch_exact(cudaStream_t stream, const exact::VictimArgs& a) {
  launch(stream, "exact_victim", a);
}
void launch_exact(cudaStream_t stream, const exact::GatherArgs& a) {
  launch(stream, "exact_gather", a);
}

}  // namespace kvlapse
