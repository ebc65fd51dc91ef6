// The range profiler alone, one way of asking for it a process: which ways count kernels on this machine.
// Prints one line. Usage: counters_probe [target=0|1] [ranges=N] [launch=plain|graph] [range=auto|user]
// [context=current|null]
//                       [start=late|early]
#include <dlfcn.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "core/base/error.h"
#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/device_memory.h"
#include "trace/cupti/cupti_api.h"
#include "trace/cupti/metric_config.h"

namespace kvlapse {
namespace {

constexpr uint64_t kBytes = uint64_t{256} << 20;
constexpr int kKernels = 4;

std::string option(int argc, char** argv, const std::string& name, const char* otherwise) {
  for (int i = 1; i < argc; ++i)
    if (std::string(argv[i]).starts_with(name + "=")) return argv[i] + name.size() + 1;
  return otherwise;
}

// What the table does not hold, from the library that is loaded.
template <class Function>
Function more_of(const CuptiApi& api, const char* name) {
  Dl_info info{};
  if (dladdr(reinterpret_cast<void*>(api.cuptiRangeProfilerStart), &info) == 0)
    fail("{}: library not found", name);
  void* library = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  void* found = library != nullptr ? dlsym(library, name) : nullptr;
  if (found == nullptr) fail("{}: not in {}", name, info.dli_fname);
  return reinterpret_cast<Function>(found);
}

void run(int argc, char** argv) {
  const int target = std::stoi(option(argc, argv, "target", "1"));
  const auto n_ranges = static_cast<size_t>(std::stoul(option(argc, argv, "ranges", "64")));
  const bool graph = option(argc, argv, "launch", "plain") == "graph";
  const bool user = option(argc, argv, "range", "auto") == "user";
  const bool no_context = option(argc, argv, "context", "current") == "null";
  const bool early = option(argc, argv, "start", "late") == "early";
  CuptiApi api;
  CuptiProblem problem;
  if (!load_cupti(api, problem)) fail("{}", problem.reason);
  auto initialise = [&] {
    auto init = cupti_params<CUpti_Profiler_Initialize_Params>(CUpti_Profiler_Initialize_Params_STRUCT_SIZE);
    KVLAPSE_CUPTI(api, cuptiProfilerInitialize, &init);
  };
  if (early) initialise();
  KVLAPSE_CUDA_CHECK(cudaFree(nullptr));
  if (!early) initialise();
  const auto start = std::chrono::steady_clock::now();
  size_t free_before = 0, free_after = 0, total = 0;

  auto enable =
      cupti_params<CUpti_RangeProfiler_Enable_Params>(CUpti_RangeProfiler_Enable_Params_STRUCT_SIZE);
  if (!no_context) api.cuCtxGetCurrent(&enable.ctx);
  KVLAPSE_CUPTI(api, cuptiRangeProfilerEnable, &enable);
  MetricConfig config(api, CUPTI_PROFILER_TYPE_RANGE_PROFILER, chip_name(api, 0), {},
                      {"gpu__time_duration.sum", "dram__bytes_read.sum"});
  auto size = cupti_params<CUpti_RangeProfiler_GetCounterDataSize_Params>(
      CUpti_RangeProfiler_GetCounterDataSize_Params_STRUCT_SIZE);
  size.pRangeProfilerObject = enable.pRangeProfilerObject;
  size.pMetricNames = config.metrics().data();
  size.numMetrics = config.metrics().size();
  size.maxNumOfRanges = n_ranges;
  size.maxNumRangeTreeNodes = static_cast<uint32_t>(n_ranges);
  KVLAPSE_CUPTI(api, cuptiRangeProfilerGetCounterDataSize, &size);
  std::vector<uint8_t> image(size.counterDataSize);
  auto clear = cupti_params<CUpti_RangeProfiler_CounterDataImage_Initialize_Params>(
      CUpti_RangeProfiler_CounterDataImage_Initialize_Params_STRUCT_SIZE);
  clear.pRangeProfilerObject = enable.pRangeProfilerObject;
  clear.counterDataSize = image.size();
  clear.pCounterData = image.data();
  KVLAPSE_CUPTI(api, cuptiRangeProfilerCounterDataImageInitialize, &clear);
  auto set =
      cupti_params<CUpti_RangeProfiler_SetConfig_Params>(CUpti_RangeProfiler_SetConfig_Params_STRUCT_SIZE);
  set.pRangeProfilerObject = enable.pRangeProfilerObject;
  set.configSize = config.image().size();
  set.pConfig = config.image().data();
  set.counterDataImageSize = image.size();
  set.pCounterDataImage = image.data();
  set.range = user ? CUPTI_UserRange : CUPTI_AutoRange;
  set.replayMode = user ? CUPTI_UserReplay : CUPTI_KernelReplay;
  set.maxRangesPerPass = n_ranges;
  set.numNestingLevels = 1;
  set.minNestingLevel = 1;
  set.targetNestingLevel = static_cast<uint16_t>(target);
  KVLAPSE_CUPTI(api, cuptiRangeProfilerSetConfig, &set);

  DeviceBuffer<unsigned char> data(kBytes);
  data.fill_bytes(1);
  Stream stream;
  const auto launch = [&] {
    for (int i = 0; i < kKernels; ++i) launch_read_plain(stream.get(), data.data(), kBytes, 132 * 4, nullptr);
  };
  std::unique_ptr<Graph> made;
  if (graph) made = std::make_unique<Graph>(stream, launch);
  KVLAPSE_CUDA_CHECK(cudaDeviceSynchronize());
  KVLAPSE_CUDA_CHECK(cudaMemGetInfo(&free_before, &total));
  auto begin = cupti_params<CUpti_RangeProfiler_Start_Params>(CUpti_RangeProfiler_Start_Params_STRUCT_SIZE);
  begin.pRangeProfilerObject = enable.pRangeProfilerObject;
  KVLAPSE_CUPTI(api, cuptiRangeProfilerStart, &begin);
  if (user) {
    auto push =
        cupti_params<CUpti_RangeProfiler_PushRange_Params>(CUpti_RangeProfiler_PushRange_Params_STRUCT_SIZE);
    push.pRangeProfilerObject = enable.pRangeProfilerObject;
    push.pRangeName = "step";
    check_cupti("cuptiRangeProfilerPushRange",
                more_of<decltype(&::cuptiRangeProfilerPushRange)>(api, "cuptiRangeProfilerPushRange")(&push));
  }
  if (made)
    made->launch(stream);
  else
    launch();
  KVLAPSE_CUDA_CHECK(cudaMemGetInfo(&free_after, &total));
  if (user) {
    auto pop =
        cupti_params<CUpti_RangeProfiler_PopRange_Params>(CUpti_RangeProfiler_PopRange_Params_STRUCT_SIZE);
    pop.pRangeProfilerObject = enable.pRangeProfilerObject;
    check_cupti("cuptiRangeProfilerPopRange",
                more_of<decltype(&::cuptiRangeProfilerPopRange)>(api, "cuptiRangeProfilerPopRange")(&pop));
  }
  stream.synchronize();
  auto stop = cupti_params<CUpti_RangeProfiler_Stop_Params>(CUpti_RangeProfiler_Stop_Params_STRUCT_SIZE);
  stop.pRangeProfilerObject = enable.pRangeProfilerObject;
  KVLAPSE_CUPTI(api, cuptiRangeProfilerStop, &stop);
  auto decode =
      cupti_params<CUpti_RangeProfiler_DecodeData_Params>(CUpti_RangeProfiler_DecodeData_Params_STRUCT_SIZE);
  decode.pRangeProfilerObject = enable.pRangeProfilerObject;
  KVLAPSE_CUPTI(api, cuptiRangeProfilerDecodeData, &decode);
  auto info = cupti_params<CUpti_RangeProfiler_GetCounterDataInfo_Params>(
      CUpti_RangeProfiler_GetCounterDataInfo_Params_STRUCT_SIZE);
  info.pCounterDataImage = image.data();
  info.counterDataImageSize = image.size();
  KVLAPSE_CUPTI(api, cuptiRangeProfilerGetCounterDataInfo, &info);
  std::printf("ranges %zu, dropped %zu, all passes %d, image %.1f MB, %.2f GB taken, %.0f ms",
              info.numTotalRanges, static_cast<size_t>(decode.numOfRangeDropped),
              static_cast<int>(stop.isAllPassSubmitted), static_cast<double>(image.size()) / 1e6,
              static_cast<double>(free_before - free_after) / 1e9,
              std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  if (info.numTotalRanges > 0) {
    const std::vector<double> v = config.values(image, 0);
    std::printf("; first: %.1f us, %.1f MB read of %.1f asked for", v[0] / 1e3, v[1] / 1e6,
                static_cast<double>(kBytes) * (user ? kKernels : 1) / 1e6);
  }
  std::printf("\n");
}

}  // namespace
}  // namespace kvlapse

int main(int argc, char** argv) {
  try {
    kvlapse::run(argc, argv);
  } catch (const kvlapse::CuptiFailure& failure) {
    std::printf("%s\n", failure.problem.reason.c_str());
    return 1;
  } catch (const std::exception& e) {
    std::printf("%s\n", e.what());
    return 1;
  }
  return 0;
}
