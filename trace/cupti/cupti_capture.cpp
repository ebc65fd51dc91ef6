#include "trace/cupti/cupti_capture.h"

#include <time.h>

#include "trace/cupti/activity_source.h"
#include "trace/cupti/dram_sampler.h"
#include "trace/cupti/kernel_counters.h"

namespace kvlapse {
namespace {

// The first decode steps, behind the prompt and the step that makes the graphs.
constexpr int64_t kFirstCounted = 2;

class CuptiCapture final : public GpuCapture {
 public:
  CuptiCapture(const CuptiApi* api, const CuptiProblem& problem, const GpuCaptureOptions& options)
      : api_(api), options_(options), counted_left_(options.counter_steps) {
    if (options.counters == GpuCounters::none) return;
    problem_ = problem;
    // Counters before activity: the two do not run together, and graphs that are to be counted must be made
    // after the range profiler was enabled.
    if (options.counters == GpuCounters::kernels)
      start("kernels", "measured", [&] {
        kernels_ = std::make_unique<KernelCounterSource>(*api_, options_.device, options_.session_ns);
      });
    if (!kernels_) start_activity();
    if (options.counters == GpuCounters::dram)
      start("dram", "sampled",
            [&] { dram_ = std::make_unique<DramSampler>(*api_, options_.device, options_.session_ns); });
  }

  bool begin_step(int64_t step) override {
    if (kernels_ && !activity_ && step >= kFirstCounted && (counted_left_ == 0 || kernels_->ended())) {
      kernels_->disable();
      if (!activity_refused_) start_activity();
    }
    counted_ = kernels_ && counted_left_ > 0 && step >= kFirstCounted && !kernels_->ended();
    if (counted_) {
      --counted_left_;
      kernels_->begin_step(step);
    } else if (activity_) {
      activity_->begin_step(step);
    }
    return counted_;
  }

  void end_step(std::vector<LaunchRecord> launches) override {
    if (counted_)
      kernels_->end_step(launches);
    else if (activity_ && activity_->in_step())
      activity_->end_step(std::move(launches));
  }

  GpuBatch take() override {
    GpuBatch batch;
    collect(batch, false);
    return batch;
  }

  GpuBatch finish() override {
    GpuBatch batch;
    if (dram_) dram_->stop();
    collect(batch, true);
    batch.sources = sources();
    batch.devices = options_.devices;
    timespec now{};
    clock_gettime(CLOCK_REALTIME, &now);
    batch.utc_epoch_ns =
        static_cast<int64_t>(now.tv_sec) * 1'000'000'000 + now.tv_nsec - options_.session_ns();
    return batch;
  }

  std::vector<GpuSource> sources() const override {
    std::vector<GpuSource> all = missing_;
    if (activity_) all.push_back(activity_->summary());
    if (dram_) all.push_back(dram_->summary());
    if (kernels_) all.push_back(kernels_->summary());
    return all;
  }

 private:
  template <class Make>
  void start(const char* name, const char* provenance, Make make) {
    CuptiProblem problem = problem_;
    if (api_ != nullptr) {
      try {
        return make();
      } catch (const CuptiFailure& failure) {
        problem = failure.problem;
      }
    }
    missing_.push_back({name, provenance, problem.reason, problem.advice, 0, 0, 0});
  }

  void start_activity() {
    start("activity", "measured",
          [&] { activity_ = std::make_unique<ActivitySource>(*api_, options_.session_ns); });
    activity_refused_ = activity_ == nullptr;
  }

  void collect(GpuBatch& batch, bool all) {
    if (activity_) activity_->take(batch, all);
    if (dram_) dram_->take(batch);
    if (kernels_) kernels_->take(batch);
  }

  const CuptiApi* api_;
  const GpuCaptureOptions options_;
  CuptiProblem problem_;  // why there is no table
  std::vector<GpuSource> missing_;
  std::unique_ptr<ActivitySource> activity_;
  std::unique_ptr<DramSampler> dram_;
  std::unique_ptr<KernelCounterSource> kernels_;
  int counted_left_;
  bool activity_refused_ = false;
  bool counted_ = false;
};

struct Loaded {
  CuptiApi api;
  CuptiProblem problem;
  bool found = load_cupti(api, problem);
};
const Loaded& loaded_cupti() {
  static const Loaded loaded;
  return loaded;
}

}  // namespace

std::unique_ptr<GpuCapture> make_cupti_capture(const CuptiApi* api, const CuptiProblem& problem,
                                               const GpuCaptureOptions& options) {
  return std::make_unique<CuptiCapture>(api, problem, options);
}

std::unique_ptr<GpuCapture> make_gpu_capture(const GpuCaptureOptions& options) {
  const Loaded& cupti = loaded_cupti();
  return make_cupti_capture(cupti.found ? &cupti.api : nullptr, cupti.problem, options);
}

GpuProfilerState probe_gpu_profiler() {
  const Loaded& cupti = loaded_cupti();
  if (!cupti.found) return {false, cupti.problem.reason, cupti.problem.advice};
  uint32_t version = 0;
  cupti.api.cuptiGetVersion(&version);
  return {true, "CUPTI " + std::to_string(version), ""};
}

}  // namespace kvlapse
