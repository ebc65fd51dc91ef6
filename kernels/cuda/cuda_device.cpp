#include "kernels/cuda/cuda_device.h"

#include <fmt/format.h>

#include <map>

#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "kernels/cuda/attention_bench.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/exact_launch.h"
#include "kernels/cuda/replay_launch.h"
#include "kernels/gpu/gpu_backend.h"
#include "kernels/gpu/gpu_replay.h"

namespace kvlapse {
namespace {

constexpr double kGiB = 1024.0 * 1024 * 1024;

std::string version_text(int version) {
  return fmt::format("{}.{}", version / 1000, version % 1000 / 10);
}

class CudaDevice final : public DeviceApi {
 public:
  explicit CudaDevice(int index) {
    use_gpu(index);
    cudaDeviceProp properties{};
    int driver = 0;
    KVLAPSE_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
    KVLAPSE_CUDA_CHECK(cudaDriverGetVersion(&driver));
    description_ = fmt::format("cuda:{} {}, driver API {}", index, properties.name, version_text(driver));
    KVLAPSE_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(nullptr, &first_priority_));
    streams_[0] = std::make_unique<Stream>();
    shared_bytes_ = static_cast<int>(properties.sharedMemPerBlockOptin);
    clusters_ = properties.major >= 9;
  }

  std::string describe() const override { return description_; }

  void* allocate(size_t bytes) override {
    void* memory = nullptr;
    const cudaError_t error = cudaMalloc(&memory, bytes);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      size_t available = 0, total = 0;
      KVLAPSE_CUDA_CHECK(cudaMemGetInfo(&available, &total));
      fail("{}: memory: expected {:.2f} GiB more, found {:.2f} of {:.2f} GiB free", description_,
           static_cast<double>(bytes) / kGiB, static_cast<double>(available) / kGiB,
           static_cast<double>(total) / kGiB);
    }
    KVLAPSE_CUDA_CHECK(error);
    KVLAPSE_CUDA_CHECK(cudaMemsetAsync(memory, 0, bytes, stream().get()));
    return memory;
  }
  void release(void* memory) override { KVLAPSE_CUDA_LOG(cudaFree(memory)); }
  void* allocate_host(size_t bytes) override {
    void* memory = nullptr;
    KVLAPSE_CUDA_CHECK(cudaMallocHost(&memory, bytes));
    return memory;
  }
  void release_host(void* memory) override { KVLAPSE_CUDA_LOG(cudaFreeHost(memory)); }

  // Copies from pageable memory return once it was staged.
  void upload(void* to, const void* from, size_t bytes) override {
    KVLAPSE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream().get()));
    if (pinned(from)) synchronize();
  }
  void download(void* to, const void* from, size_t bytes) override {
    KVLAPSE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream().get()));
    synchronize();
  }
  void download_later(void* to, const void* from, size_t bytes) override {
    KVLAPSE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, stream().get()));
  }
  void upload_later(void* to, const void* from, size_t bytes) override {
    KVLAPSE_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, stream().get()));
  }
  void fill(void* to, int byte, size_t bytes) override {
    KVLAPSE_CUDA_CHECK(cudaMemsetAsync(to, byte, bytes, stream().get()));
  }
  void synchronize() override {
    for (const std::unique_ptr<Stream>& stream : streams_)
      if (stream) stream->synchronize();
  }

  void launch(const exact::EmbedArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::NormArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::MatmulArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::FinishQkvArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::StoreArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::LogitsArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::SoftmaxArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::ValuesArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::SumChunksArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::SiluArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::ChooseArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::VictimArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::GatherArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::UnitKeysArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::MeanKeyArgs& a) override { launch_exact(stream().get(), a); }
  void launch(const exact::SimilarKeyArgs& a) override { launch_exact(stream().get(), a); }

  void launch(const gpu_replay::LogitsArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::ValuesArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::DecideArgs& a, bool large) override { launch_replay(lane(), a, large); }
  void launch(const gpu_replay::RowsArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::MassesArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::OutputsArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::RepairsArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::FutureArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::SumFutureArgs& a) override { launch_replay(lane(), a); }
  void launch(const gpu_replay::CloseArgs& a) override { launch_replay(lane(), a); }
  Limits limits() const override { return {shared_bytes_, clusters_, kReplayDecideThreads}; }

  void fork() override {
    if (!forked_[queue_]) forked_[queue_] = std::make_unique<Event>();
    forked_[queue_]->record(stream());
    next_lane_ = 0;
  }
  void join() override {
    for (int i = 0; i < next_lane_; ++i) {
      Lane& lane = *lanes_[queue_][i];
      lane.done.record(lane.stream);
      KVLAPSE_CUDA_CHECK(cudaStreamWaitEvent(stream().get(), lane.done.get()));
    }
    next_lane_ = -1;
  }

  void use(int queue) override {
    queue_ = queue;
    if (!streams_[queue]) streams_[queue] = std::make_unique<Stream>();
  }
  void mark(int event) override {
    std::unique_ptr<Event>& mark = marks_[event];
    if (!mark) mark = std::make_unique<Event>();
    mark->record(stream());
  }
  void wait(int event) override {
    if (const auto mark = marks_.find(event); mark != marks_.end())
      KVLAPSE_CUDA_CHECK(cudaStreamWaitEvent(stream().get(), mark->second->get()));
  }

  void run_graph(uint64_t key, const std::function<void()>& record) override {
    std::unique_ptr<Graph>& graph = graphs_[key];
    if (!graph) graph = std::make_unique<Graph>(stream(), record);
    graph->launch(stream());
  }
  void forget_graphs() override {
    synchronize();
    graphs_.clear();
  }

 private:
  Stream& stream() const { return *streams_[queue_]; }
  // The stream of the next launch: between fork() and join() one of its own.
  cudaStream_t lane() {
    if (next_lane_ < 0) return stream().get();
    std::vector<std::unique_ptr<Lane>>& lanes = lanes_[queue_];
    if (next_lane_ == static_cast<int>(lanes.size()))
      lanes.push_back(std::make_unique<Lane>(queue_ == 0 ? first_priority_ : 0));
    const Lane& lane = *lanes[next_lane_++];
    KVLAPSE_CUDA_CHECK(cudaStreamWaitEvent(lane.stream.get(), forked_[queue_]->get()));
    return lane.stream.get();
  }
  // Whether the copy engine reads `memory` itself, after the call has returned.
  static bool pinned(const void* memory) {
    cudaPointerAttributes attributes{};
    KVLAPSE_CUDA_CHECK(cudaPointerGetAttributes(&attributes, memory));
    return attributes.type == cudaMemoryTypeHost;
  }

  std::string description_;
  std::unique_ptr<Stream> streams_[3];
  int queue_ = 0;
  std::map<int, std::unique_ptr<Event>> marks_;
  std::map<uint64_t, std::unique_ptr<Graph>> graphs_;
  struct Lane {
    explicit Lane(int priority) : stream(priority) {}
    Stream stream;
    Event done;
  };
  std::vector<std::unique_ptr<Lane>> lanes_[3];  // of every queue
  std::unique_ptr<Event> forked_[3];
  int next_lane_ = -1;  // -1: not forked
  int shared_bytes_ = 0, first_priority_ = 0;
  bool clusters_ = false;
};

// How many GPUs answer; `why` says what is wrong when none does.
int count_gpus(std::string& why) {
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaSuccess && n > 0) return n;
  cudaGetLastError();
  why = error == cudaErrorInsufficientDriver   ? "no NVIDIA driver that serves CUDA 13.0 was found"
        : error == cudaErrorNoDevice || n == 0 ? "no CUDA device was found"
                                               : cudaGetErrorString(error);
  return 0;
}

}  // namespace

void use_gpu(int index) {
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);  // streams of one hardware queue would wait for each other
  std::string why;
  const int n = count_gpus(why);
  if (n == 0) fail("--device cuda:{}: {}", index, why);
  if (index >= n) fail("--device cuda:{}: expected an index below {}, the GPUs of this machine", index, n);
  KVLAPSE_CUDA_CHECK(cudaSetDevice(index));
  if (has_exact_kernels()) return;
  cudaDeviceProp properties{};
  KVLAPSE_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  fail("cuda:{} {}: compute capability: expected 8.0 or 9.0, found {}.{}", index, properties.name,
       properties.major, properties.minor);
}

std::string current_gpu_name() {
  int index = 0;
  cudaDeviceProp properties{};
  KVLAPSE_CUDA_CHECK(cudaGetDevice(&index));
  KVLAPSE_CUDA_CHECK(cudaGetDeviceProperties(&properties, index));
  return properties.name;
}

std::unique_ptr<DeviceApi> make_cuda_device(int index) {
  return std::make_unique<CudaDevice>(index);
}

std::unique_ptr<Backend> make_cuda_backend(int index) {
  return std::make_unique<GpuBackend>(make_cuda_device(index));
}

std::unique_ptr<ReplayDevice> make_cuda_replay(int index) {
  return std::make_unique<GpuReplay>(make_cuda_device(index));
}

GpuRates gpu_rates(int index) {
  use_gpu(index);
  int n_multiprocessors = 0, khz = 0, major = 0, minor = 0;
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&n_multiprocessors, cudaDevAttrMultiProcessorCount, index));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&khz, cudaDevAttrClockRate, index));
  const double per_clock = 2 * (major == 8 && minor == 0 ? 64 : 128);  // of a multiprocessor
  return {measure_read_ceiling_gbps(), n_multiprocessors * per_clock * khz * 1e-6};
}

GpuReport report_gpu() {
  GpuReport report;
  report.built_in = true;
  const int n = count_gpus(report.why);
  if (n == 0) return report;
  try {
    use_gpu(0);
    cudaDeviceProp properties{};
    int driver = 0;
    size_t available = 0, total = 0;
    KVLAPSE_CUDA_CHECK(cudaGetDeviceProperties(&properties, 0));
    KVLAPSE_CUDA_CHECK(cudaDriverGetVersion(&driver));
    KVLAPSE_CUDA_CHECK(cudaMemGetInfo(&available, &total));
    report.found = fmt::format("{} x {}, compute capability {}.{}, {:.1f} of {:.1f} GiB free, driver API {}",
                               n, properties.name, properties.major, properties.minor,
                               static_cast<double>(available) / kGiB, static_cast<double>(total) / kGiB,
                               version_text(driver));
  } catch (const Error& error) {
    report.why = error.what();
  }
  return report;
}

}  // namespace kvlapse
