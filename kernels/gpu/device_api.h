// DeviceApi: what the exact backend asks of a GPU: memory, copies in stream order, launches, and a step kept
// as a graph. CUDA implements it; so does the emulator of the tests, over the same kernel text. One thread.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "kernels/gpu/exact_args.h"
#include "kernels/gpu/replay_args.h"

namespace kvlapse {

class DeviceApi {
 public:
  virtual ~DeviceApi() = default;
  virtual std::string describe() const = 0;  // "cuda NVIDIA H100 80GB HBM3, driver 13.0"

  // Throws Error when the device has not that much. Zero-filled.
  virtual void* allocate(size_t bytes) = 0;
  virtual void release(void* memory) = 0;
  // Host memory that copies run at full speed from and to.
  virtual void* allocate_host(size_t bytes) = 0;
  virtual void release_host(void* memory) = 0;

  // In stream order. upload: `from` may be reused on return. download: returns when `to` is there.
  // download_later: `to` comes from allocate_host and is there after synchronize(); may be part of a graph.
  virtual void upload(void* to, const void* from, size_t bytes) = 0;
  virtual void download(void* to, const void* from, size_t bytes) = 0;
  virtual void download_later(void* to, const void* from, size_t bytes) = 0;
  // The same the other way: `from` stays as it is until synchronize().
  virtual void upload_later(void* to, const void* from, size_t bytes) = 0;
  virtual void fill(void* to, int byte, size_t bytes) = 0;
  virtual void synchronize() = 0;

  virtual void launch(const exact::EmbedArgs&) = 0;
  virtual void launch(const exact::NormArgs&) = 0;
  virtual void launch(const exact::MatmulArgs&) = 0;
  virtual void launch(const exact::FinishQkvArgs&) = 0;
  virtual void launch(const exact::StoreArgs&) = 0;
  virtual void launch(const exact::LogitsArgs&) = 0;
  virtual void launch(const exact::SoftmaxArgs&) = 0;
  virtual void launch(const exact::ValuesArgs&) = 0;
  virtual void launch(const exact::SumChunksArgs&) = 0;
  virtual void launch(const exact::SiluArgs&) = 0;
  virtual void launch(const exact::ChooseArgs&) = 0;
  virtual void launch(const exact::VictimArgs&) = 0;
  virtual void launch(const exact::GatherArgs&) = 0;
  virtual void launch(const exact::UnitKeysArgs&) = 0;
  virtual void launch(const exact::MeanKeyArgs&) = 0;
  virtual void launch(const exact::SimilarKeyArgs&) = 0;

  // Of a replay.
  virtual void launch(const gpu_replay::LogitsArgs&) = 0;
  virtual void launch(const gpu_replay::ValuesArgs&) = 0;
  virtual void launch(const gpu_replay::DecideArgs&, bool large) = 0;
  virtual void launch(const gpu_replay::RowsArgs&) = 0;
  virtual void launch(const gpu_replay::MassesArgs&) = 0;
  virtual void launch(const gpu_replay::FutureArgs&) = 0;
  virtual void launch(const gpu_replay::OutputsArgs&) = 0;
  virtual void launch(const gpu_replay::RepairsArgs&) = 0;
  virtual void launch(const gpu_replay::SumFutureArgs&) = 0;
  virtual void launch(const gpu_replay::CloseArgs&) = 0;
  struct Limits {
    int shared_bytes = 0;    // of a block
    bool clusters = false;   // blocks that exchange through shared memory
    int decide_threads = 0;  // most of a block that takes decisions
  };
  virtual Limits limits() const = 0;
  // Launches until join() may run beside one another, each behind what was launched before fork().
  virtual void fork() {}
  virtual void join() {}
  // Three queues: what follows goes to this one (copies too; synchronize() waits for all). wait(i) holds the
  // queue in use until the one that last did mark(i) has passed it.
  virtual void use(int /*queue*/) {}
  virtual void mark(int /*event*/) {}
  virtual void wait(int /*event*/) {}

  // Runs what `record` launches. A key names it: launches, their arguments and copies are the same whenever
  // the key is, so they may be captured once.
  virtual void run_graph(uint64_t key, const std::function<void()>& record) = 0;
  virtual void forget_graphs() = 0;
};

// n elements of T on the device, zero-filled.
template <class T>
class DeviceArray {
 public:
  DeviceArray() = default;
  DeviceArray(DeviceApi& api, size_t n) : api_(&api), n_(n) {
    if (n > 0) data_ = static_cast<T*>(api.allocate(n * sizeof(T)));
  }
  ~DeviceArray() {
    if (data_) api_->release(data_);
  }
  DeviceArray(DeviceArray&& other) noexcept { swap(other); }
  DeviceArray& operator=(DeviceArray&& other) noexcept {
    swap(other);
    return *this;
  }
  T* data() const { return data_; }
  size_t size() const { return n_; }

 private:
  void swap(DeviceArray& other) noexcept {
    std::swap(api_, other.api_);
    std::swap(data_, other.data_);
    std::swap(n_, other.n_);
  }
  DeviceApi* api_ = nullptr;
  T* data_ = nullptr;
  size_t n_ = 0;
};

}  // namespace kvlapse
