#include "kernels/cuda/rkv.h"

#include <algorithm>

#include "core/base/error.h"

namespace kvlapse {
RkvCompaction::RkvCompaction(const RkvShape& shape) : shape_(shape) {
  constexpr int kReservedBytes = 1024;  // of a block, by the driver
  set_rkv_scalars(scalars_, shape);
  softmax_ = DeviceBuffer<float>(static_cast<size_t>(shape.n_items()) * shape.tiles() * shape.window * 2);
  scalars_.softmax = softmax_.data();
  kernel_ = rkv_kernel(shape.head_dim, shape.dtype);
  const int element = static_cast<int>(dtype_bytes(shape.dtype));
  overlaps_ = device_attribute(cudaDevAttrComputeCapabilityMajor) >= 9;
  const int n_multiprocessors = device_attribute(cudaDevAttrMultiProcessorCount),
            most = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin),
            of_two = device_attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor) / 2 - kReservedBytes;
  // Two blocks a multiprocessor, which hide each other's waits, where their registers and memory allow it.
  const bool two = element < 4 && fit_rkv_pair(scalars_, shape.head_dim, element, of_two);
  if (!overlaps_) {
    scalars_.blocks = 1;
  } else if (shape.blocks == 0) {
    while (scalars_.blocks < kRkvMaxBlocks &&
           shape.n_items() * scalars_.blocks * 2 <= (two ? 2 : 1) * n_multiprocessors)
      scalars_.blocks *= 2;
  }
  if (two ? !fit_rkv_pair(scalars_, shape.head_dim, element, of_two)
          : !fit_rkv(scalars_, shape.head_dim, element, most, kRkvFirstKeys))
    fail("rkv kernel: {} slots, window {} x {}: do not fit into {} bytes of shared memory", shape.n_slots,
         shape.window, scalars_.group, most);
  scalars_.layout = rkv_layout(scalars_, shape.head_dim, element);
  const auto allow = [&](cudaFuncAttribute which, int value) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel_), which, value);
    if (error != cudaSuccess)
      fail("rkv kernel: {} bytes of shared memory: {}", most, cudaGetErrorString(error));
  };
  allow(cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  allow(cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
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
  LaunchShape shape;
  shape.n_blocks = args.n_items * args.blocks;
  shape.n_threads = kRkvThreads;
  shape.smem_bytes = args.layout.bytes;
  shape.cluster = args.blocks;
  shape.dependent = overlaps_;
  launch_kernel(stream, {"rkv", rkv_bytes(shape_, shape_.n_slots), log}, shape, kernel_, args);
}

}  // namespace kvlapse
