// What recording a kernel's activity costs the thread that decodes and the thread that brings the records:
// the capture over made-up buffers of records, as CUPTI would hand them over. Neither a GPU nor CUPTI is
// needed. Times are the processor's; a step lasts a millisecond.
// Usage: activity_bench [STEPS [KERNELS_A_STEP]]
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <thread>
#include <vector>

#include "tests/support/cupti/fake_cupti.h"
#include "trace/cupti/cupti_capture.h"

namespace {

using Clock = std::chrono::steady_clock;
using namespace kvlapse;

size_t bytes_of(CUpti_ActivityKind kind) {
  return kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL ? sizeof(CUpti_ActivityKernel10)
                                                       : sizeof(CUpti_ActivityExternalCorrelation);
}

CUptiResult CUPTIAPI next_record(uint8_t* buffer, size_t valid, CUpti_Activity** record) {
  uint8_t* next =
      *record == nullptr ? buffer : reinterpret_cast<uint8_t*>(*record) + bytes_of((*record)->kind);
  if (next >= buffer + valid) return CUPTI_ERROR_MAX_LIMIT_REACHED;
  *record = reinterpret_cast<CUpti_Activity*>(next);
  return CUPTI_SUCCESS;
}

const char* const kNames[] = {"_Z11decode_stepILi128EEvi", "_Z11fast_gemvILi1EEvi", "_Z9fast_normvi",
                              "nvjet_tst_64x8_64x16_2x1_v_bz_TNT"};

// The records of a step: its call, then its kernels.
void fill(std::vector<uint8_t>& buffer, int64_t step, int n_kernels) {
  buffer.clear();
  const auto add = [&](const auto& record) {
    const auto* at = reinterpret_cast<const uint8_t*>(&record);
    buffer.insert(buffer.end(), at, at + sizeof(record));
  };
  CUpti_ActivityExternalCorrelation call{};
  call.kind = CUPTI_ACTIVITY_KIND_EXTERNAL_CORRELATION;
  call.externalKind = CUPTI_EXTERNAL_CORRELATION_KIND_CUSTOM0;
  call.externalId = static_cast<uint64_t>(step);
  call.correlationId = static_cast<uint32_t>(step + 1);
  add(call);
  CUpti_ActivityKernel10 kernel{};
  kernel.kind = CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL;
  kernel.correlationId = call.correlationId;
  for (int i = 0; i < n_kernels; ++i) {
    kernel.start = 2'000'000 + static_cast<uint64_t>(step) * 10'000'000 + static_cast<uint64_t>(i) * 2000;
    kernel.end = kernel.start + 1600;
    kernel.name = kNames[i % 4];
    kernel.graphNodeId = static_cast<uint64_t>(i + 1);
    add(kernel);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const int steps = argc > 1 ? std::atoi(argv[1]) : 2000, n_kernels = argc > 2 ? std::atoi(argv[2]) : 400;
  test::FakeCupti cupti;
  cupti.api.cuptiActivityGetNextRecord = next_record;
  GpuCaptureOptions options;
  options.counters = GpuCounters::activity;
  options.session_ns = [start = Clock::now()] {
    return std::chrono::nanoseconds(Clock::now() - start).count();
  };
  const auto capture = make_cupti_capture(&cupti.api, {}, options);
  std::vector<LaunchRecord> launches;
  for (int i = 0; i < n_kernels; ++i)
    launches.push_back({i % 4 == 0   ? "decode_step"
                        : i % 4 == 1 ? "fast_gemv"
                        : i % 4 == 2 ? "fast_norm"
                                     : "product",
                        1000, i / 9, "attention", i % 4 == 3});
  std::vector<uint8_t> records;
  double decoding = 0, delivering = 0, ours = 0;  // seconds; ours: of this thread, all that the bench does
  const auto used = [](clockid_t clock) {
    timespec t{};
    clock_gettime(clock, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
  };
  const double process_before = used(CLOCK_PROCESS_CPUTIME_ID), thread_before = used(CLOCK_THREAD_CPUTIME_ID);
  auto next = Clock::now();
  int64_t taken = 0, joined = 0;
  const auto count = [&](const GpuBatch& batch) {
    taken += static_cast<int64_t>(batch.kernels.size());
    for (const GpuKernel& k : batch.kernels) joined += k.launch ? 1 : 0;
  };
  const auto timed = [&](double& total, auto work) {
    const double start = used(CLOCK_THREAD_CPUTIME_ID);
    work();
    total += used(CLOCK_THREAD_CPUTIME_ID) - start;
  };
  for (int64_t step = 0; step < steps; ++step) {
    std::this_thread::sleep_until(next += std::chrono::milliseconds(1));
    fill(records, step, n_kernels);
    std::vector<LaunchRecord> of_step = launches;
    timed(decoding, [&] { capture->begin_step(step); });
    timed(decoding, [&] { capture->end_step(std::move(of_step)); });
    uint8_t* buffer = nullptr;
    size_t size = 0, most = 0;
    timed(delivering, [&] { cupti.request(&buffer, &size, &most); });
    std::memcpy(buffer, records.data(), records.size());
    timed(delivering, [&] { cupti.complete(nullptr, 0, buffer, size, records.size()); });
    GpuBatch batch;
    timed(decoding, [&] { batch = capture->take(); });
    count(batch);
  }
  double finishing = 0;
  timed(finishing, [&] { count(capture->finish()); });
  ours = used(CLOCK_THREAD_CPUTIME_ID) - thread_before;
  const double others = used(CLOCK_PROCESS_CPUTIME_ID) - process_before - ours;
  const double each = 1e9 / (static_cast<double>(steps) * n_kernels);
  std::printf(
      "%d steps of %d kernels, ns a kernel: decoding thread %.0f, bringing records %.0f, other threads %.0f, "
      "at "
      "the end %.0f\n",
      steps, n_kernels, decoding * each, delivering * each, others * each, finishing * each);
  const int64_t all = static_cast<int64_t>(steps) * n_kernels;
  if (taken != all || joined != all) {
    std::fprintf(stderr, "expected %ld kernels with their launches, found %ld and %ld\n",
                 static_cast<long>(all), static_cast<long>(taken), static_cast<long>(joined));
    return 1;
  }
  return 0;
}
