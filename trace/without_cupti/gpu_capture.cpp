// Built instead of trace/cupti where there is no CUDA toolkit.
#include "trace/gpu_capture.h"

namespace kvlapse {
namespace {

constexpr const char* kReason = "this program was built without CUDA";
constexpr const char* kAdvice = "build it with KVLAPSE_CUDA=ON";

class NoCapture final : public GpuCapture {
 public:
  explicit NoCapture(GpuCounters counters) : counters_(counters) {}
  bool begin_step(int64_t) override { return false; }
  void end_step(std::vector<LaunchRecord>) override {}
  GpuBatch take() override { return {}; }
  GpuBatch finish() override {
    GpuBatch batch;
    batch.sources = sources();
    return batch;
  }
  std::vector<GpuSource> sources() const override {
    std::vector<GpuSource> sources;
    if (counters_ != GpuCounters::none)
      sources.push_back({"activity", "measured", kReason, kAdvice, 0, 0, 0});
    if (counters_ == GpuCounters::dram) sources.push_back({"dram", "sampled", kReason, kAdvice, 0, 0, 0});
    if (counters_ == GpuCounters::kernels)
      sources.push_back({"kernels", "measured", kReason, kAdvice, 0, 0, 0});
    return sources;
  }

 private:
  GpuCounters counters_;
};

}  // namespace

std::unique_ptr<GpuCapture> make_gpu_capture(const GpuCaptureOptions& options) {
  return std::make_unique<NoCapture>(options.counters);
}

GpuProfilerState probe_gpu_profiler() {
  return {false, kReason, kAdvice};
}

}  // namespace kvlapse
