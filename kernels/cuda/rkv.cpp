#include "kernels/cuda/rkv.h"

#include "core/base/error.h"

namespace kvlapse {
namespace {

void allow_shared_memory(void (*kernel)(RkvArgs), int bytes) {
  const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                 cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess)
    fail("rkv kernel: {} bytes of shared memory: {}", bytes, cudaGetErrorString(error));
}

}  // namespace

RkvCompaction::RkvCompaction(const RkvShape& shape) : shape_(shape) {
  set_rkv_scalars(scalars_, shape);
  const auto slots = static_cast<size_t>(shape.n_items()) * shape.n_slots;
  inverse_norm_ = DeviceBuffer<float>(slots);
  logits_ = DeviceBuffer<float>(slots * shape.window);
  partial_sum_ =
      DeviceBuffer<float>(static_cast<size_t>(shape.n_items()) * shape.row_blocks() * shape.head_dim);
  softmax_ =
      DeviceBuffer<float>(static_cast<size_t>(shape.n_items()) * shape.row_blocks() * shape.window * 2);
  own_ = DeviceBuffer<float>(slots);
  cosine_ = DeviceBuffer<float>(slots);
  similar_ = DeviceBuffer<int32_t>(slots);
  scalars_.inverse_norm = inverse_norm_.data();
  scalars_.logits = logits_.data();
  scalars_.partial_sum = partial_sum_.data();
  scalars_.softmax = softmax_.data();
  scalars_.own = own_.data();
  scalars_.cosine = cosine_.data();
  scalars_.similar = similar_.data();
  kernels_ = rkv_kernels(shape.head_dim, shape.dtype);
  const int element = static_cast<int>(dtype_bytes(shape.dtype));
  allow_shared_memory(kernels_.rows, rkv_rows_smem_bytes(shape.head_dim, element));
  allow_shared_memory(kernels_.select, rkv_select_smem_bytes(shape.n_slots, shape.budget));
  int device = 0, major = 0;
  KVLAPSE_CUDA_CHECK(cudaGetDevice(&device));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  overlaps_ = major >= 9;
  // Heads for more than one block a multiprocessor: two smaller ones hide each other's waits.
  int n_multiprocessors = 0;
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, device));
  if (shape.n_items() > n_multiprocessors) scalars_.select_threads = kRkvSelectThreads / 2;
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
  const int element = static_cast<int>(dtype_bytes(shape_.dtype));
  const uint64_t k_bytes = static_cast<uint64_t>(args.n_items) * shape_.n_slots * shape_.head_dim * element;
  LaunchShape rows;
  rows.n_blocks = args.n_items * args.row_blocks;
  rows.n_threads = kRkvThreads;
  rows.smem_bytes = rkv_rows_smem_bytes(shape_.head_dim, element);
  launch_kernel(stream, {"rkv_rows", k_bytes, log}, rows, kernels_.rows, args);
  LaunchShape select;
  select.n_blocks = args.n_items;
  select.n_threads = args.select_threads;
  select.smem_bytes = rkv_select_smem_bytes(shape_.n_slots, shape_.budget);
  select.dependent = overlaps_;
  launch_kernel(stream, {"rkv_select", rkv_bytes(shape_, shape_.n_slots), log}, select, kernels_.select,
                args);
}

}  // namespace kvlapse
