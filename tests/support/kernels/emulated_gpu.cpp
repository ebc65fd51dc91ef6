#include "tests/support/kernels/emulated_gpu.h"

#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "core/base/error.h"
#include "tests/support/kernels/emulated_device.h"

#define KVLAPSE_UNROLL_16

namespace kvlapse::device {

inline float half_to_float(uint16_t bits) {
  return f16_to_f32(bits);
}
inline uint16_t float_to_half(float value) {
  return f32_to_f16(value);
}
inline int lowest_bit(uint32_t bits) {
  return __builtin_ctz(bits);
}
inline uint32_t global_append(uint32_t* count) {
  return (*count)++;
}

}  // namespace kvlapse::device
// After the emulator, which stands for the device's operations.
#include "kernels/gpu/exact_kernels.cuh"
#include "kernels/gpu/replay_kernels.cuh"

namespace kvlapse {
namespace {

// Queues once use() is called: what is asked for runs as late as it may, at a wait for it or when all are
// waited for, the queue of the copies and answers before that of the work, so that a missing wait shows.
class EmulatedGpu final : public DeviceApi {
 public:
  EmulatedGpu(EmulatedGpuCounts* counts, Limits limits) : limits_(limits), counts_(counts ? counts : &own_) {}
  std::string describe() const override { return "cuda emulated"; }
  void* allocate(size_t bytes) override { return std::calloc(bytes + 256, 1); }
  void release(void* memory) override {
    synchronize();
    std::free(memory);
  }
  void* allocate_host(size_t bytes) override { return std::calloc(bytes + 1, 1); }
  void release_host(void* memory) override { std::free(memory); }
  void upload(void* to, const void* from, size_t bytes) override {
    if (!has_queues_) {
      if (bytes > 0) std::memcpy(to, from, bytes);
      return;
    }
    const auto* data = static_cast<const unsigned char*>(from);
    later([to, copy = std::vector<unsigned char>(data, data + bytes)] {
      if (!copy.empty()) std::memcpy(to, copy.data(), copy.size());
    });
  }
  void download(void* to, const void* from, size_t bytes) override {
    ++counts_->downloads;
    later([=] { std::memcpy(to, from, bytes); });
    synchronize();
  }
  void download_later(void* to, const void* from, size_t bytes) override {
    later([=] { std::memcpy(to, from, bytes); });
  }
  void upload_later(void* to, const void* from, size_t bytes) override {
    later([=] { std::memcpy(to, from, bytes); });
  }
  void fill(void* to, int byte, size_t bytes) override {
    later([=] { std::memset(to, byte, bytes); });
  }
  void synchronize() override {
    for (int queue = kQueues - 1; queue >= 0; --queue) run_to(queue, queues_[queue].work.size());
  }
  void use(int queue) override {
    has_queues_ = true;
    queue_ = queue;
  }
  void mark(int event) override { marks_[event] = {queue_, queues_[queue_].work.size()}; }
  void wait(int event) override {
    if (const auto mark = marks_.find(event); mark != marks_.end())
      later([this, at = mark->second] { run_to(at.first, at.second); });
  }

  void launch(const exact::EmbedArgs& a) override { run(a); }
  void launch(const exact::NormArgs& a) override { run(a); }
  void launch(const exact::MatmulArgs& a) override { run(a); }
  void launch(const exact::FinishQkvArgs& a) override { run(a); }
  void launch(const exact::StoreArgs& a) override { run(a); }
  void launch(const exact::LogitsArgs& a) override { run(a); }
  void launch(const exact::SoftmaxArgs& a) override { run(a); }
  void launch(const exact::ValuesArgs& a) override { run(a); }
  void launch(const exact::SumChunksArgs& a) override { run(a); }
  void launch(const exact::SiluArgs& a) override { run(a); }
  void launch(const exact::ChooseArgs& a) override { run(a); }
  void launch(const exact::VictimArgs& a) override { run(a); }
  void launch(const exact::GatherArgs& a) override { run(a); }
  void launch(const exact::UnitKeysArgs& a) override { run(a); }
  void launch(const exact::MeanKeyArgs& a) override { run(a); }
  void launch(const exact::SimilarKeyArgs& a) override { run(a); }

  void launch(const gpu_replay::LogitsArgs& a) override {
    later([this, a] {
      blocks(a, [&](int block, unsigned char* shared) {
        if (a.shape.dim == 64)
          gpu_replay::Logits<64>(a, block, shared).run();
        else if (a.shape.dim == 128)
          gpu_replay::Logits<128>(a, block, shared).run();
        else
          gpu_replay::Logits<0>(a, block, shared).run();
      });
    });
  }
  void launch(const gpu_replay::ValuesArgs& a) override {
    later([this, a] { replay(a); });
  }
  void launch(const gpu_replay::RowsArgs& a) override {
    later([this, a] {
      blocks(a, [&](int block, unsigned char* shared) {
        a.shape.lanes() == 4 ? gpu_replay::run<4>(a, block, shared) : gpu_replay::run<8>(a, block, shared);
      });
    });
  }
  void launch(const gpu_replay::MassesArgs& a) override {
    later([this, a] { replay(a); });
  }
  void launch(const gpu_replay::OutputsArgs& a) override {
    later([this, a] {
      blocks(a, [&](int block, unsigned char* shared) {
        if (a.column_tiles() == 16)
          a.full ? gpu_replay::Outputs<16, true>(a, block, shared).run()
                 : gpu_replay::Outputs<16, false>(a, block, shared).run();
        else
          a.full ? gpu_replay::Outputs<8, true>(a, block, shared).run()
                 : gpu_replay::Outputs<8, false>(a, block, shared).run();
      });
    });
  }
  void launch(const gpu_replay::RepairsArgs& a) override {
    later([this, a] {
      counts_->repairs += *a.n_repairs;
      replay(a);
    });
  }
  void launch(const gpu_replay::FutureArgs& a) override {
    later([this, a] { replay(a); });
  }
  void launch(const gpu_replay::SumFutureArgs& a) override {
    later([this, a] { replay(a); });
  }
  void launch(const gpu_replay::CloseArgs& a) override {
    later([this, a] { replay(a); });
  }
  void launch(const gpu_replay::DecideArgs& a, bool large) override {
    later([this, a, large] { decide(a, large); });
  }
  Limits limits() const override { return limits_; }

  void run_graph(uint64_t key, const std::function<void()>& record) override {
    counts_->graphs_captured += keys_.insert(key).second;
    ++counts_->graphs_run;
    record();
  }
  void forget_graphs() override { keys_.clear(); }

 private:
  void later(std::function<void()> work) {
    if (has_queues_)
      queues_[queue_].work.push_back(std::move(work));
    else
      work();
  }
  void run_to(int queue, size_t end) {
    Queue& q = queues_[queue];
    while (q.next < end) std::exchange(q.work[q.next++], nullptr)();
  }
  void decide(const gpu_replay::DecideArgs& a, bool large) {
    device::EmulatedLaunch launch;
    launch.n_blocks = launch.cluster = a.cluster;
    launch.n_threads = a.n_threads;
    launch.smem_bytes = a.smem;
    for (int task = 0; task < a.n_tasks; ++task) {
      launch.seed = seed_++;
      device::run_emulated(launch, [&](unsigned char* shared) {
        const int block = task * a.cluster + device::block_index();
        const bool four = a.shape.lanes() == 4;
        if (four && large)
          gpu_replay::Decide<4, true>(a, block, shared).run();
        else if (four)
          gpu_replay::Decide<4, false>(a, block, shared).run();
        else if (large)
          gpu_replay::Decide<8, true>(a, block, shared).run();
        else
          gpu_replay::Decide<8, false>(a, block, shared).run();
      });
    }
  }

  template <class Args>
  void run(const Args& args) {
    device::EmulatedLaunch launch;
    launch.n_threads = exact::kThreads;
    launch.smem_bytes = exact::kSharedBytes;
    for (int block = 0; block < args.n_blocks(); ++block) {
      launch.seed = seed_++;
      device::run_emulated(launch, [&](unsigned char* shared) { exact::run(args, block, shared); });
    }
  }

  template <class Args, class Body>
  void blocks(const Args& args, const Body& body) {
    device::EmulatedLaunch launch;
    launch.n_threads = Args::kThreads;
    launch.smem_bytes = args.smem_bytes();
    for (int block = 0; block < args.n_blocks(); ++block) {
      launch.seed = seed_++;
      device::run_emulated(launch, [&](unsigned char* shared) { body(block, shared); });
    }
  }
  template <class Args>
  void replay(const Args& args) {
    blocks(args, [&](int block, unsigned char* shared) { gpu_replay::run(args, block, shared); });
  }

  Limits limits_;
  EmulatedGpuCounts own_;
  EmulatedGpuCounts* counts_;
  std::set<uint64_t> keys_;
  static constexpr int kQueues = 3;
  struct Queue {
    std::vector<std::function<void()>> work;
    size_t next = 0;
  } queues_[kQueues];
  int queue_ = 0;
  bool has_queues_ = false;
  std::map<int, std::pair<int, size_t>> marks_;
  uint64_t seed_ = 0;
};

}  // namespace

std::unique_ptr<DeviceApi> make_emulated_gpu(EmulatedGpuCounts* counts, DeviceApi::Limits limits) {
  return std::make_unique<EmulatedGpu>(counts, limits);
}

}  // namespace kvlapse
