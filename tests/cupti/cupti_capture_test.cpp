#include "trace/cupti/cupti_capture.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/support/cupti/fake_cupti.h"

namespace kvlapse {
namespace {

using test::FakeCupti;

GpuCaptureOptions options_of(GpuCounters counters) {
  GpuCaptureOptions options;
  options.counters = counters;
  options.session_ns = [now = std::make_shared<int64_t>(0)] { return *now += 10; };
  return options;
}

LaunchRecord ours(const char* name, uint64_t bytes, int layer) {
  return {name, bytes, layer, "attention", false};
}
LaunchRecord foreign(uint64_t bytes, int layer) {
  return {"matmul", bytes, layer, "matmul", true};
}

const GpuSource* source(const std::vector<GpuSource>& all, const std::string& name) {
  for (const GpuSource& s : all)
    if (s.name == name) return &s;
  return nullptr;
}

TEST(CuptiCapture, KernelsOfAGraphGetTheirStepLayerAndBytes) {
  FakeCupti cupti;
  auto options = options_of(GpuCounters::activity);
  options.session_ns = [&cupti] { return static_cast<int64_t>(cupti.now_ns += 10) - 1'000'000; };
  const auto capture = make_cupti_capture(&cupti.api, {}, options);
  GpuBatch all;
  for (int64_t step = 0; step < 6; ++step) {
    EXPECT_FALSE(capture->begin_step(step));
    const uint64_t t = 2'000'000 + 1000 * static_cast<uint64_t>(step);
    // One call launches the whole graph; records arrive out of order.
    const uint32_t call = cupti.kernel("_Z11decode_stepILi1EEvi", t + 20, t + 90);
    cupti.kernel("nvjet_tst_64x8", t + 1, t + 10, call);
    cupti.kernel("splitKreduce_kernel", t + 11, t + 15, call);
    cupti.kernel("nvjet_tst_64x8", t + 100, t + 120, call);
    if (step == 2) cupti.copy(t + 500, 4096);
    capture->end_step({foreign(1000, 0), ours("decode_step", 5000, 0), foreign(2000, 1)});
    if (step == 3) cupti.deliver();
    cupti.now_ns += 60'000'000;  // records are only looked at now and then
    GpuBatch batch = capture->take();
    all.kernels.insert(all.kernels.end(), batch.kernels.begin(), batch.kernels.end());
    all.steps.insert(all.steps.end(), batch.steps.begin(), batch.steps.end());
    all.copies.insert(all.copies.end(), batch.copies.begin(), batch.copies.end());
  }
  // Records are read by a thread of their own. Steps 0 and 1 are whole, because later ones came.
  for (int i = 0; i < 200 && all.kernels.size() < 8; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    cupti.now_ns += 60'000'000;
    GpuBatch batch = capture->take();
    all.kernels.insert(all.kernels.end(), batch.kernels.begin(), batch.kernels.end());
    all.copies.insert(all.copies.end(), batch.copies.begin(), batch.copies.end());
  }
  EXPECT_EQ(all.kernels.size(), 2u * 4);
  cupti.kernel("outside", 9'000'000, 9'000'100);
  cupti.dropped = 3;
  const GpuBatch last = capture->finish();
  all.kernels.insert(all.kernels.end(), last.kernels.begin(), last.kernels.end());
  ASSERT_EQ(all.kernels.size(), 6u * 4 + 1);
  EXPECT_EQ(all.steps.size(), 6u);
  EXPECT_EQ(all.copies.size(), 1u);
  for (const GpuKernel& k : all.kernels) {
    if (k.mangled_name == "outside") {
      EXPECT_EQ(k.step, -1);
      continue;
    }
    ASSERT_TRUE(k.launch) << k.mangled_name;
    EXPECT_GE(k.step, 0);
    if (k.mangled_name == "splitKreduce_kernel") {
      EXPECT_EQ(k.launch->expected_bytes, 0u);
      EXPECT_EQ(k.launch->layer, 0);
    }
    if (k.mangled_name.find("decode_step") != std::string::npos) {
      EXPECT_EQ(k.launch->expected_bytes, 5000u);
    }
    if (k.end_ns - k.start_ns == 20) {
      EXPECT_EQ(k.launch->layer, 1);
    }
    // The profiler's clock reads 1'000'000 when the session's reads 0.
    EXPECT_NEAR(static_cast<double>(k.start_ns), 1'000'000.0 + 1000.0 * static_cast<double>(k.step), 1000);
  }
  ASSERT_EQ(last.sources.size(), 1u);
  EXPECT_EQ(last.sources[0].state(), "recorded");
  EXPECT_EQ(last.sources[0].records, 6 * 4 + 2);
  EXPECT_EQ(last.sources[0].dropped, 3);
  EXPECT_EQ(last.clocks.size(), 1u);  // the first pair went before
}

TEST(CuptiCapture, ALostKernelDoesNotShiftTheOthers) {
  FakeCupti cupti;
  const auto capture = make_cupti_capture(&cupti.api, {}, options_of(GpuCounters::activity));
  capture->begin_step(0);
  cupti.kernel("norm", 2'000'000, 2'000'010);
  cupti.kernel("decode_step", 2'000'020, 2'000'030);
  cupti.kernel("stranger", 2'000'040, 2'000'050);
  capture->end_step({ours("norm", 1, 0), ours("rope", 2, 0), ours("decode_step", 3, 0)});
  const GpuBatch batch = capture->finish();
  ASSERT_EQ(batch.kernels.size(), 3u);
  EXPECT_EQ(batch.kernels[0].launch->expected_bytes, 1u);
  EXPECT_EQ(batch.kernels[1].launch->expected_bytes, 3u);
  EXPECT_FALSE(batch.kernels[2].launch);
}

TEST(CuptiCapture, DramSamplesAreReadWhileDecodeRuns) {
  FakeCupti cupti;
  auto options = options_of(GpuCounters::dram);
  const auto start = std::chrono::steady_clock::now();
  options.session_ns = [start] {
    return std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
  };
  // The chip's clock stands at an hour: not the wall's, so the newest sample ends when it is read.
  constexpr uint64_t kHour = 3'600'000'000'000;
  cupti.samples = {{kHour, kHour, {1, 1, 1}},  // of no length
                   {kHour + 100, kHour + 200, {5000, 70, 900}},
                   {kHour + 200, kHour + 300, {6000, 80, 901}}};
  const auto capture = make_cupti_capture(&cupti.api, {}, options);
  std::this_thread::sleep_for(std::chrono::milliseconds(120));
  const GpuBatch batch = capture->finish();
  ASSERT_EQ(batch.dram.size(), 2u);
  EXPECT_EQ(batch.dram[1].read_bytes, 6000);
  EXPECT_EQ(batch.dram[1].write_bytes, 80);
  EXPECT_EQ(batch.dram[1].l2_bytes, 901);
  EXPECT_EQ(batch.dram[1].end_ns - batch.dram[1].start_ns, 100);
  EXPECT_LT(batch.dram[1].end_ns, options.session_ns());
  EXPECT_EQ(source(batch.sources, "dram")->records, 2);
  EXPECT_EQ(source(batch.sources, "dram")->state(), "recorded");
  EXPECT_GE(cupti.calls["cuptiPmSamplingDisable"], 1);
}

TEST(CuptiCapture, KernelsAreCountedOnSampledStepsOnly) {
  FakeCupti cupti;
  auto options = options_of(GpuCounters::kernels);
  options.counter_steps = 2;
  const auto capture = make_cupti_capture(&cupti.api, {}, options);
  std::vector<int64_t> counted;
  cupti.ranges = {{100, 3900, 90, 9000, 80, 50}, {200, 10, 20, 30, 40, 50}};
  for (int64_t step = 0; step < 100; ++step) {
    if (capture->begin_step(step)) counted.push_back(step);
    cupti.kernel("decode_step", 2'000'000 + 100 * static_cast<uint64_t>(step),
                 2'000'050 + 100 * static_cast<uint64_t>(step));
    capture->end_step({ours("decode_step", 4000, 7), ours("other", 5, 7)});
  }
  const GpuBatch batch = capture->finish();
  EXPECT_EQ(counted, (std::vector<int64_t>{2, 3}));
  ASSERT_EQ(batch.counters.size(), 4u);
  EXPECT_EQ(batch.counters[2].step, 3);
  EXPECT_EQ(batch.counters[2].dram_read_bytes, 3900);
  ASSERT_TRUE(batch.counters[2].launch);
  EXPECT_EQ(batch.counters[2].launch->layer, 7);
  EXPECT_EQ(batch.kernels.size(), 96u);  // activity begins when the counting is over
  EXPECT_EQ(source(batch.sources, "kernels")->records, 4);
}

TEST(CuptiCapture, AMissingLibraryIsAReason) {
  auto options = options_of(GpuCounters::dram);
  const auto capture = make_cupti_capture(nullptr, {"CUPTI is not installed", "install it"}, options);
  for (int64_t step = 0; step < 3; ++step) {
    EXPECT_FALSE(capture->begin_step(step));
    capture->end_step({});
    EXPECT_TRUE(capture->take().empty());
  }
  const GpuBatch batch = capture->finish();
  ASSERT_EQ(batch.sources.size(), 2u);
  for (const GpuSource& s : batch.sources) {
    EXPECT_EQ(s.state(), "missing");
    EXPECT_EQ(s.reason, "CUPTI is not installed");
  }
}

TEST(CuptiCapture, AnotherProfilerIsNamed) {
  FakeCupti cupti;
  cupti.other_subscriber = "Nsight Systems";
  cupti.failures["cuptiSubscribe_v2"] = CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED;
  const auto capture = make_cupti_capture(&cupti.api, {}, options_of(GpuCounters::activity));
  const auto sources = capture->sources();
  ASSERT_EQ(sources.size(), 1u);
  EXPECT_EQ(sources[0].state(), "missing");
  EXPECT_NE(sources[0].reason.find("Nsight Systems"), std::string::npos) << sources[0].reason;
  EXPECT_NE(sources[0].advice.find("nsys"), std::string::npos);
}

TEST(CuptiCapture, PermissionDeniedLeavesActivity) {
  FakeCupti cupti;
  cupti.failures["cuptiPmSamplingEnable"] = CUPTI_ERROR_INSUFFICIENT_PRIVILEGES;
  const auto capture = make_cupti_capture(&cupti.api, {}, options_of(GpuCounters::dram));
  capture->begin_step(0);
  cupti.kernel("k", 2'000'000, 2'000'010);
  capture->end_step({});
  const GpuBatch batch = capture->finish();
  EXPECT_EQ(batch.kernels.size(), 1u);
  EXPECT_EQ(source(batch.sources, "activity")->state(), "recorded");
  EXPECT_EQ(source(batch.sources, "dram")->state(), "missing");
  EXPECT_NE(source(batch.sources, "dram")->reason.find("administrators"), std::string::npos);
  EXPECT_NE(source(batch.sources, "dram")->advice.find("NVreg_RestrictProfilingToAdminUsers"),
            std::string::npos);
}

TEST(CuptiCapture, MorePassesThanOneAreRefused) {
  FakeCupti cupti;
  cupti.passes = 3;
  const auto capture = make_cupti_capture(&cupti.api, {}, options_of(GpuCounters::kernels));
  const auto sources = capture->sources();
  EXPECT_NE(source(sources, "kernels")->reason.find("3 passes"), std::string::npos);
}

// Every call of the table fails in turn, at its first use and at its third: the step loop goes on, a source
// that is missing or partial says so, and nothing stays enabled.
TEST(CuptiCapture, AnErrorAtAnyCallEndsTheSourceAndNotTheRecording) {
  const char* const kCalls[] = {
#define KVLAPSE_NAME(name) #name,
      KVLAPSE_CUPTI_FUNCTIONS(KVLAPSE_NAME)
#undef KVLAPSE_NAME
  };
  for (const GpuCounters counters : {GpuCounters::activity, GpuCounters::dram, GpuCounters::kernels})
    for (const char* call : kCalls)
      for (int after : {0, 2}) {
        FakeCupti cupti;
        cupti.failures[call] = CUPTI_ERROR_UNKNOWN;
        cupti.fail_after[call] = after;
        cupti.ranges = counters == GpuCounters::kernels ? std::vector<std::vector<double>>{{1, 2, 3, 4, 5, 6}}
                                                        : std::vector<std::vector<double>>{};
        const uint64_t wall = 1000;
        cupti.samples = {{wall, wall + 100, {1, 2, 3}}};
        const auto capture = make_cupti_capture(&cupti.api, {}, options_of(counters));
        GpuBatch last;
        for (int64_t step = 0; step < 40; ++step) {
          capture->begin_step(step);
          cupti.kernel("k", 2'000'000, 2'000'010);
          capture->end_step({ours("k", 1, 0)});
          capture->take();
        }
        last = capture->finish();
        EXPECT_EQ(last.sources.size(), counters == GpuCounters::activity ? 1u : 2u) << call;
        const bool used = cupti.calls[call] > after;
        bool told = false;
        for (const GpuSource& s : last.sources) {
          told |= !s.reason.empty();
          EXPECT_EQ(s.reason.empty(), s.state() == "recorded") << call;
          if (!s.reason.empty() && s.reason.find("counted no kernels") == std::string::npos) {
            EXPECT_NE(s.reason.find("error 999"), std::string::npos) << call << ": " << s.reason;
          }
        }
        // What only ends something has nothing to tell.
        const std::string name = call;
        const bool ends = name.find("Disable") != std::string::npos ||
                          name.find("eInitialize") != std::string::npos ||
                          name.find("Deinitialize") != std::string::npos || name == "cuptiUnsubscribe" ||
                          name == "cuptiActivityPopExternalCorrelationId" ||
                          name == "cuptiActivityGetNumDroppedRecords" || name == "cuptiGetVersion";
        if (used && !ends) {
          EXPECT_TRUE(told) << call << " after " << after;
        }
      }
}

}  // namespace
}  // namespace kvlapse
