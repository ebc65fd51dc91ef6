#include "kernels/cuda/rkv.h"

#include "core/base/error.h"

namespace kvlapse {

RkvCompaction::RkvCompaction(const RkvShape& shape) : shape_(shape) {
  set_rkv_scalars(scalars_, shape);
  int device = 0, major = 0, n_multiprocessors = 0;
  KVLAPSE_CUDA_CHECK(cudaGetDevice(&device));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  overlaps_ = major >= 9;
  set_rkv_blocks(scalars_, shape, major >= 9, n_multiprocessors);
  const auto items = static_cast<size_t>(shape.n_items()), ranks = items * shape.stride(),
             units = items * shape.units();
  inverse_norm_ = DeviceBuffer<float>(ranks);
  importance_ = DeviceBuffer<float>(ranks);
  projection_ = DeviceBuffer<float>(ranks);
  forgiven_ = DeviceBuffer<uint64_t>(ranks);
  partial_sum_ = DeviceBuffer<float>(units * shape.head_dim);
  softmax_ = DeviceBuffer<float>(units * shape.window * 2);
  logits_ = DeviceBuffer<float>(ranks * ((shape.window + 7) / 8 * 8));
  arrivals_ = DeviceBuffer<uint32_t>(items);
  arrivals_.fill_bytes(0);
  scalars_.inverse_norm = inverse_norm_.data();
  scalars_.importance = importance_.data();
  scalars_.projection = projection_.data();
  scalars_.forgiven = forgiven_.data();
  scalars_.partial_sum = partial_sum_.data();
  scalars_.softmax = softmax_.data();
  scalars_.logits = logits_.data();
  scalars_.arrivals = arrivals_.data();
  kernel_ = rkv_kernel(shape.head_dim, shape.dtype);
  // The most that a block can have: another shape's compaction shares the kernel and its limit.
  const int bytes = rkv_smem_bytes(scalars_, shape.head_dim, static_cast<int>(dtype_bytes(shape.dtype)));
  int most_bytes = 0;
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  if (bytes > most_bytes)
    fail("rkv kernel: expected at most {} bytes of shared memory on this device, found {}", most_bytes,
         bytes);
  const void* const kernel = reinterpret_cast<const void*>(kernel_);
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes));
  KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                          cudaSharedmemCarveoutMaxShared));
  if (scalars_.phase == RkvPhase::both)
    KVLAPSE_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
}

RkvArgs RkvCompaction::arguments() const {
  return scalars_;
}

void RkvCompaction::launch(cudaStream_t stream, const RkvArgs& args, LaunchLog* log) const {
  if (args.q == nullptr || args.k == nullptr || args.v == nullptr || args.order == nullptr ||
      args.count == nullptr)
    fail("rkv kernel: q, k, v, order, count: expected device pointers, found null");
  if (args.evicted != nullptr && args.positions == nullptr)
    fail("rkv kernel: positions: expected a device pointer beside evicted, found null");
  LaunchShape launch;
  launch.n_blocks = args.n_items * args.row_blocks;
  launch.n_threads = args.block_threads;
  launch.smem_bytes = rkv_smem_bytes(args, shape_.head_dim, static_cast<int>(dtype_bytes(shape_.dtype)));
  launch.dependent = overlaps_;
  const uint64_t bytes = rkv_bytes(shape_, shape_.n_slots);
  if (args.phase == RkvPhase::both) {
    launch.cluster = args.row_blocks;
    launch_kernel(stream, {"rkv", bytes, log}, launch, kernel_, args);
    return;
  }
  const uint64_t keys =
      static_cast<uint64_t>(args.n_items) * args.n_slots * shape_.head_dim * dtype_bytes(shape_.dtype);
  RkvArgs phase = args;
  phase.phase = RkvPhase::first;
  launch_kernel(stream, {"rkv_first", keys, log}, launch, kernel_, phase);
  phase.phase = RkvPhase::second;
  launch_kernel(stream, {"rkv_second", bytes, log}, launch, kernel_, phase);
}

}  // namespace kvlapse
