// Owners of device memory, streams, events and graphs. Movable, not copyable; freed on the device that is
// current.
#pragma once

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "kernels/cuda/cuda_check.h"

namespace kvlapse {

// n elements of T in device memory; not initialised unless filled.
template <class T>
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t n) : size_(n) {
    if (n > 0) KVLAPSE_CUDA_CHECK(cudaMalloc(reinterpret_cast<void**>(&data_), n * sizeof(T)));
  }
  explicit DeviceBuffer(std::span<const T> values) : DeviceBuffer(values.size()) { upload(values); }
  explicit DeviceBuffer(const std::vector<T>& values) : DeviceBuffer(std::span<const T>(values)) {}
  ~DeviceBuffer() {
    if (data_ != nullptr) KVLAPSE_CUDA_LOG(cudaFree(data_));
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { swap(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    swap(other);
    return *this;
  }

  T* data() const { return data_; }
  size_t size() const { return size_; }
  size_t bytes() const { return size_ * sizeof(T); }
  void upload(std::span<const T> values) {
    if (!values.empty())
      KVLAPSE_CUDA_CHECK(cudaMemcpy(data_, values.data(), values.size_bytes(), cudaMemcpyHostToDevice));
  }
  void download(std::span<T> values) const {
    if (!values.empty())
      KVLAPSE_CUDA_CHECK(cudaMemcpy(values.data(), data_, values.size_bytes(), cudaMemcpyDeviceToHost));
  }
  std::vector<T> download() const {
    std::vector<T> values(size_);
    download(std::span<T>(values));
    return values;
  }
  void fill_bytes(int value) {
    if (size_ > 0) KVLAPSE_CUDA_CHECK(cudaMemset(data_, value, bytes()));
  }

 private:
  void swap(DeviceBuffer& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  T* data_ = nullptr;
  size_t size_ = 0;
};

// n elements of T in host memory that kernels write at its own address.
template <class T>
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  explicit PinnedBuffer(size_t n) {
    if (n > 0)
      KVLAPSE_CUDA_CHECK(cudaHostAlloc(reinterpret_cast<void**>(&data_), n * sizeof(T), cudaHostAllocMapped));
  }
  ~PinnedBuffer() {
    if (data_ != nullptr) KVLAPSE_CUDA_LOG(cudaFreeHost(data_));
  }
  PinnedBuffer(PinnedBuffer&& other) noexcept { std::swap(data_, other.data_); }
  PinnedBuffer& operator=(PinnedBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    return *this;
  }
  T* data() const { return data_; }

 private:
  T* data_ = nullptr;
};

class Stream {
 public:
  Stream() { KVLAPSE_CUDA_CHECK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  // Lower numbers first: blocks of such kernels start before those that wait in other streams.
  explicit Stream(int priority) {
    KVLAPSE_CUDA_CHECK(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority));
  }
  ~Stream() { KVLAPSE_CUDA_LOG(cudaStreamDestroy(stream_)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  cudaStream_t get() const { return stream_; }
  void synchronize() const { KVLAPSE_CUDA_CHECK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

class Event {
 public:
  Event() { KVLAPSE_CUDA_CHECK(cudaEventCreate(&event_)); }
  ~Event() { KVLAPSE_CUDA_LOG(cudaEventDestroy(event_)); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  cudaEvent_t get() const { return event_; }
  void record(const Stream& stream) { KVLAPSE_CUDA_CHECK(cudaEventRecord(event_, stream.get())); }
  void wait() const { KVLAPSE_CUDA_CHECK(cudaEventSynchronize(event_)); }
  // Milliseconds from `start` to this one; waits for this one.
  float ms_since(const Event& start) const {
    float ms = 0;
    wait();
    KVLAPSE_CUDA_CHECK(cudaEventElapsedTime(&ms, start.event_, event_));
    return ms;
  }

 private:
  cudaEvent_t event_ = nullptr;
};

// What `record` launches on the stream, as one graph.
class Graph {
 public:
  template <class Record>
  Graph(const Stream& stream, Record record) {
    KVLAPSE_CUDA_CHECK(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal));
    cudaGraph_t graph = nullptr;
    try {
      record();
    } catch (...) {
      KVLAPSE_CUDA_LOG(cudaStreamEndCapture(stream.get(), &graph));
      if (graph != nullptr) KVLAPSE_CUDA_LOG(cudaGraphDestroy(graph));
      throw;
    }
    KVLAPSE_CUDA_CHECK(cudaStreamEndCapture(stream.get(), &graph));
    const cudaError_t error = cudaGraphInstantiate(&graph_, graph, 0);
    KVLAPSE_CUDA_LOG(cudaGraphDestroy(graph));
    KVLAPSE_CUDA_CHECK(error);
  }
  ~Graph() { KVLAPSE_CUDA_LOG(cudaGraphExecDestroy(graph_)); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;
  void launch(const Stream& stream) const { KVLAPSE_CUDA_CHECK(cudaGraphLaunch(graph_, stream.get())); }

 private:
  cudaGraphExec_t graph_ = nullptr;
};

}  // namespace kvlapse
