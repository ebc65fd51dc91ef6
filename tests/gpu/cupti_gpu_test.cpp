// The capture over the real CUPTI and a real GPU; what the machine does not allow is skipped by name.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <thread>

#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/device_memory.h"
#include "tests/support/gpu/gpu_decode.h"
#include "trace/cupti/cupti_api.h"
#include "trace/gpu_capture.h"

namespace kvlapse {
namespace {

constexpr uint64_t kBytes = uint64_t{256} << 20;

// Steps of a graph of reads, each of kBytes that no cache holds.
struct Reads {
  DeviceBuffer<unsigned char> data{4 * kBytes};
  Stream stream;
  Graph graph{stream, [this] { launch_all(); }};
  Reads() { data.fill_bytes(1); }
  void launch_all() const {
    for (uint64_t i = 0; i < 4; ++i)
      launch_read_plain(stream.get(), data.data() + i * kBytes, kBytes, 132 * 4, nullptr);
  }
  std::vector<LaunchRecord> launches() const {
    std::vector<LaunchRecord> all;
    for (int i = 0; i < 4; ++i) all.push_back({"read_plain", kBytes, i, "attention", false});
    return all;
  }
};

struct Clock {
  std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  int64_t operator()() const {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  }
};

const GpuSource* source(const GpuBatch& batch, const std::string& name) {
  for (const GpuSource& s : batch.sources)
    if (s.name == name) return &s;
  return nullptr;
}

GpuBatch record(Reads& reads, GpuCounters counters, int steps, int pause_ms) {
  GpuCaptureOptions options;
  options.counters = counters;
  options.counter_steps = 2;
  options.session_ns = Clock();
  const auto capture = make_gpu_capture(options);
  GpuBatch all;
  const auto add = [&](GpuBatch batch) {
    for (GpuKernel& k : batch.kernels) all.kernels.push_back(std::move(k));
    for (DramSample& s : batch.dram) all.dram.push_back(s);
    for (KernelCounters& c : batch.counters) all.counters.push_back(std::move(c));
    for (GpuStepRange& s : batch.steps) all.steps.push_back(s);
    all.sources = std::move(batch.sources);
  };
  for (int step = 0; step < steps; ++step) {
    capture->begin_step(step);
    reads.graph.launch(reads.stream);
    reads.stream.synchronize();
    capture->end_step(reads.launches());
    add(capture->take());
    if (pause_ms > 0) std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
  }
  add(capture->finish());
  for (const GpuSource& s : all.sources)
    std::printf("%s: %s, %ld records, %ld dropped, %s\n", s.name.c_str(), std::string(s.state()).c_str(),
                static_cast<long>(s.records), static_cast<long>(s.dropped), s.reason.c_str());
  return all;
}

TEST(CuptiOnGpu, EveryKernelOfAGraphWithinItsStep) {
  KVLAPSE_NEEDS_GPU();
  Reads reads;
  const GpuBatch all = record(reads, GpuCounters::activity, 50, 0);
  if (!source(all, "activity")->reason.empty()) GTEST_SKIP() << source(all, "activity")->reason;
  ASSERT_EQ(all.kernels.size(), 200u);
  EXPECT_EQ(source(all, "activity")->dropped, 0);
  ASSERT_EQ(all.steps.size(), 50u);
  for (const GpuKernel& k : all.kernels) {
    ASSERT_GE(k.step, 0);
    ASSERT_TRUE(k.launch);
    EXPECT_NE(k.graph_node, 0u);
    const GpuStepRange& step = all.steps[static_cast<size_t>(k.step)];
    // Clocks agree within 20 us.
    EXPECT_GT(k.start_ns, step.start_ns - 20'000);
    EXPECT_LT(k.end_ns, step.end_ns + 20'000);
  }
  EXPECT_EQ(all.kernels[5].launch->layer, 1);
}

// Bursts of traffic lie where the activity records say that kernels ran.
TEST(CuptiOnGpu, DramSamplesLieUnderTheKernels) {
  KVLAPSE_NEEDS_GPU();
  Reads reads;
  const GpuBatch all = record(reads, GpuCounters::dram, 40, 5);
  if (!source(all, "dram")->reason.empty()) GTEST_SKIP() << source(all, "dram")->reason;
  ASSERT_EQ(all.kernels.size(), 160u);
  ASSERT_GT(all.dram.size(), 500u);
  double total = 0, under = 0, weighted_kernels = 0, weighted_samples = 0;
  for (const DramSample& s : all.dram) {
    const auto bytes = static_cast<double>(s.read_bytes);
    total += bytes;
    weighted_samples += bytes * 0.5 * static_cast<double>(s.start_ns + s.end_ns);
    for (const GpuKernel& k : all.kernels)
      if (k.start_ns < s.end_ns + 100'000 && k.end_ns > s.start_ns - 100'000) {
        under += bytes;
        break;
      }
  }
  for (const GpuKernel& k : all.kernels) weighted_kernels += 0.5 * static_cast<double>(k.start_ns + k.end_ns);
  const double shift_us =
      (weighted_samples / total - weighted_kernels / static_cast<double>(all.kernels.size())) * 1e-3;
  std::printf("read %.3f GB in %zu samples for %.3f GB asked, %.1f %% under kernels, shifted by %.1f us\n",
              total * 1e-9, all.dram.size(), 160 * static_cast<double>(kBytes) * 1e-9, 100 * under / total,
              shift_us);
  EXPECT_NEAR(total / (160.0 * static_cast<double>(kBytes)), 1.0, 0.03);
  EXPECT_GT(under / total, 0.95);
}

// Steps that are counted launch kernel by kernel, as the engine does; the others are graphs.
TEST(CuptiOnGpu, CountedBytesAreTheModelledOnes) {
  KVLAPSE_NEEDS_GPU();
  const Reads reads;
  GpuCaptureOptions options;
  options.counters = GpuCounters::kernels;
  options.counter_steps = 2;
  options.session_ns = Clock();
  const auto capture = make_gpu_capture(options);
  std::vector<KernelCounters> counters;
  size_t kernels = 0;
  const auto add = [&](const GpuBatch& batch) {
    counters.insert(counters.end(), batch.counters.begin(), batch.counters.end());
    kernels += batch.kernels.size();
  };
  for (int step = 0; step < 24; ++step) {
    if (capture->begin_step(step))
      reads.launch_all();
    else
      reads.graph.launch(reads.stream);
    reads.stream.synchronize();
    capture->end_step(reads.launches());
    add(capture->take());
  }
  const GpuBatch last = capture->finish();
  add(last);
  for (const GpuSource& s : last.sources)
    std::printf("%s: %s, %ld records, %s\n", s.name.c_str(), std::string(s.state()).c_str(),
                static_cast<long>(s.records), s.reason.c_str());
  ASSERT_EQ(counters.size(), 8u);
  for (const KernelCounters& c : counters) {
    ASSERT_TRUE(c.launch);
    EXPECT_NEAR(c.dram_read_bytes / static_cast<double>(kBytes), 1.0, 0.03);
    EXPECT_GT(c.duration_ns, 10'000);
  }
  std::printf("first counted kernel: %.0f bytes read, %.1f us, %.1f %% of DRAM peak\n",
              counters[0].dram_read_bytes, counters[0].duration_ns * 1e-3, counters[0].dram_percent);
  EXPECT_EQ(kernels, 20u * 4);
}

// Attention, scores and victims of a step of more than 100 MB: DRAM is read as often as the launch says.
TEST(CuptiOnGpu, TheFusedStepReadsTheModelledBytes) {
  KVLAPSE_NEEDS_GPU();
  DecodeCase c;
  c.shape = {32, 32, 8, 128, 1024, DType::bf16};
  c.tokens.assign(static_cast<size_t>(c.shape.batch), 5000);
  c.recent = 1;
  const DecodeKernel kernel(c.shape);
  const GpuDecode step_of_layer(kernel, make_decode_problem(c, kernel.plan().n_splits));
  const Reads others;  // between two launches, so that nothing is left in L2
  GpuCaptureOptions options;
  options.counters = GpuCounters::kernels;
  options.counter_steps = 2;
  options.session_ns = Clock();
  const auto capture = make_gpu_capture(options);
  LaunchLog log;
  std::vector<KernelCounters> counters;
  const auto add = [&](const GpuBatch& batch) {
    counters.insert(counters.end(), batch.counters.begin(), batch.counters.end());
  };
  for (int step = 0; step < 20; ++step) {
    const bool counted = capture->begin_step(step);
    for (int i = 0; counted && i < 3; ++i) {
      log.add("read_plain", 4 * kBytes);
      launch_read_plain(others.stream.get(), others.data.data(), 4 * kBytes, 132 * 4, nullptr);
      step_of_layer.launch(others.stream.get(), false, &log);
    }
    others.stream.synchronize();
    capture->end_step(log.take());
    add(capture->take());
  }
  const GpuBatch last = capture->finish();
  add(last);
  const GpuSource* source_of_counters = source(last, "kernels");
  if (!source_of_counters->reason.empty()) GTEST_SKIP() << source_of_counters->reason;
  ASSERT_EQ(counters.size(), 12u);
  for (const KernelCounters& k : counters) {
    ASSERT_TRUE(k.launch);
    if (k.launch->name != std::string_view("decode_step")) continue;
    const double ratio = k.dram_read_bytes / static_cast<double>(k.launch->expected_bytes);
    std::printf("fused step: %.2f MB read, %.2f modelled, ratio %.4f\n", k.dram_read_bytes * 1e-6,
                static_cast<double>(k.launch->expected_bytes) * 1e-6, ratio);
    EXPECT_NEAR(ratio, 1.0, 0.03);
  }
}

// The profiler's own cost: kernels are recorded, and nothing of ours reads them.
class BareActivity {
 public:
  BareActivity() {
    CuptiProblem problem;
    on_ = load_cupti(api_, problem) &&
          api_.cuptiActivityRegisterCallbacks(give_buffer, drop_buffer) == CUPTI_SUCCESS &&
          api_.cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) == CUPTI_SUCCESS;
  }
  ~BareActivity() {
    if (!on_) return;
    api_.cuptiActivityFlushAll(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
    api_.cuptiActivityDisable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  }
  bool on() const { return on_; }

 private:
  static void CUPTIAPI give_buffer(uint8_t** buffer, size_t* size, size_t* max_records) {
    *size = size_t{8} << 20;
    *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
    *max_records = 0;
  }
  static void CUPTIAPI drop_buffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t) {
    std::free(buffer);
  }
  CuptiApi api_;
  bool on_ = false;
};

// What recording costs a graph of many kernels: short ones, and ones as long as a large model's.
void measure_cost(uint64_t kernel_bytes) {
  constexpr int kKernels = 400, kSteps = 100;
  DeviceBuffer<unsigned char> data(kernel_bytes);
  data.fill_bytes(0);
  Stream stream;
  const Graph graph(stream, [&] {
    for (int i = 0; i < kKernels; ++i)
      launch_read_plain(stream.get(), data.data(), kernel_bytes, 132 * 4, nullptr);
  });
  const auto run = [&](GpuCapture* capture) {
    const auto start = std::chrono::steady_clock::now();
    for (int step = 0; step < kSteps; ++step) {
      if (capture != nullptr) capture->begin_step(step);
      graph.launch(stream);
      stream.synchronize();
      if (capture != nullptr) capture->end_step({}), capture->take();
    }
    return std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - start).count();
  };
  run(nullptr);
  std::vector<double> plain, bare;
  std::map<GpuCounters, std::vector<double>> recorded;
  for (int round = 0; round < 3; ++round) {
    plain.push_back(run(nullptr));
    for (GpuCounters counters : {GpuCounters::activity, GpuCounters::dram}) {
      GpuCaptureOptions options;
      options.counters = counters;
      options.session_ns = Clock();
      const auto capture = make_gpu_capture(options);
      for (int i = 0; i < 2; ++i) recorded[counters].push_back(run(capture.get()));
      capture->finish();
    }
    if (const BareActivity activity; activity.on())
      for (int i = 0; i < 2; ++i) bare.push_back(run(nullptr));
  }
  const auto each = [&](std::vector<double> us) {
    std::sort(us.begin(), us.end());
    return us[us.size() / 2] / (kSteps * kKernels);
  };
  for (const auto& [counters, us] : recorded)
    std::printf("%s: %.3f us a kernel more than %.3f us\n", std::string(counters_name(counters)).c_str(),
                each(us) - each(plain), each(plain));
  if (!bare.empty()) std::printf("the profiler alone: %.3f us a kernel more\n", each(bare) - each(plain));
}
TEST(CuptiOnGpu, CostOfActivityInsideAGraph) {
  KVLAPSE_NEEDS_GPU();
  measure_cost(uint64_t{1} << 20);
  measure_cost(uint64_t{64} << 20);
}

}  // namespace
}  // namespace kvlapse
