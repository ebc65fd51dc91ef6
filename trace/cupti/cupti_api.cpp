#include "trace/cupti/cupti_api.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <glob.h>

#include <cstdlib>
#include <vector>

namespace kvlapse {
namespace {

constexpr uint32_t kOldestVersion = 130000;  // records of CUDA 13; later ones append to them

std::vector<std::string> library_names() {
  std::vector<std::string> names = {"libcupti.so.13", "libcupti.so"};
  std::vector<std::string> folders;
  for (const char* variable : {"CUDA_HOME", "CUDA_PATH"})
    if (const char* folder = std::getenv(variable)) folders.emplace_back(folder);
  folders.emplace_back("/usr/local/cuda");
  folders.emplace_back("/usr/local/cuda-*");
  folders.emplace_back("/opt/cuda");
  for (const std::string& folder : folders)
    for (const char* inside : {"/lib64/", "/extras/CUPTI/lib64/", "/targets/x86_64-linux/lib/", "/lib/"}) {
      glob_t found{};
      if (glob((folder + inside + "libcupti.so.1[3-9]*").c_str(), 0, nullptr, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc; ++i) names.emplace_back(found.gl_pathv[i]);
      globfree(&found);
    }
  return names;
}

}  // namespace

CuptiProblem explain_cupti(const char* call, CUptiResult result, const std::string& detail) {
  const auto problem = [&](const char* what, const char* advice) {
    return CuptiProblem{fmt::format("{}{} ({}: error {})", what, detail.empty() ? "" : ": " + detail, call,
                                    static_cast<int>(result)),
                        advice};
  };
  switch (static_cast<int>(result)) {
    case CUPTI_ERROR_HARDWARE_BUSY:
      return problem("another program holds the GPU's counters", "stop dcgm, ncu or nsys on this GPU");
    case CUPTI_ERROR_INSUFFICIENT_PRIVILEGES:
      return problem("GPU counters are reserved for administrators",
                     "run as root, or load the driver with NVreg_RestrictProfilingToAdminUsers=0");
    case CUPTI_ERROR_VIRTUALIZED_DEVICE_NOT_SUPPORTED:
    case CUPTI_ERROR_VIRTUALIZED_DEVICE_INSUFFICIENT_PRIVILEGES:
      return problem("this virtual GPU gives no counters",
                     "enable profiling for the virtual GPU at its host");
    case CUPTI_ERROR_MULTIPLE_SUBSCRIBERS_NOT_SUPPORTED:
      return problem("another profiler is attached to this process",
                     "run without nsys, ncu or another CUPTI user");
    case CUPTI_ERROR_CONFIDENTIAL_COMPUTING_NOT_SUPPORTED:
      return problem("counters are off while confidential computing is on", "record without --counters");
    case CUPTI_ERROR_MIG_DEVICE_NOT_SUPPORTED:
      return problem("a MIG slice gives no counters of this kind", "record on a whole GPU");
    case CUPTI_ERROR_WSL_DEVICE_NOT_SUPPORTED:
      return problem("WSL gives no counters of this kind", "record on Linux itself");
    case CUPTI_ERROR_NOT_SUPPORTED:
    case CUPTI_ERROR_INVALID_CHIP_NAME:
    case CUPTI_ERROR_NOT_COMPATIBLE:
    case CUPTI_ERROR_INVALID_METRIC_NAME:
      return problem("this GPU or driver does not have these counters", "use --counters activity");
    case CUPTI_ERROR_OUT_OF_MEMORY:
      return problem("no memory for the profiler's buffers", "leave more GPU memory free");
    default: return problem("the profiler refused", "see kvlapse doctor");
  }
}

void check_cupti(const char* call, CUptiResult result) {
  if (result != CUPTI_SUCCESS) throw CuptiFailure{explain_cupti(call, result)};
}

bool load_cupti(CuptiApi& api, CuptiProblem& problem) {
  void* library = nullptr;
  for (const std::string& name : library_names())
    if ((library = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL)) != nullptr) break;
  if (library == nullptr) {
    problem = {"CUPTI is not installed (libcupti.so.13)",
               "install the CUDA toolkit 13, or set CUDA_HOME to its folder"};
    return false;
  }
  const char* missing = nullptr;
#define KVLAPSE_CUPTI_LOAD(name)                                          \
  api.name = reinterpret_cast<decltype(api.name)>(dlsym(library, #name)); \
  if (api.name == nullptr) missing = #name;
  KVLAPSE_CUPTI_FUNCTIONS(KVLAPSE_CUPTI_LOAD)
#undef KVLAPSE_CUPTI_LOAD
  if (void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL); driver != nullptr)
    api.cuCtxGetCurrent = reinterpret_cast<decltype(api.cuCtxGetCurrent)>(dlsym(driver, "cuCtxGetCurrent"));
  uint32_t version = 0;
  if (api.cuptiGetVersion != nullptr) api.cuptiGetVersion(&version);
  if (missing == nullptr && version >= kOldestVersion) return true;
  problem = {missing != nullptr
                 ? fmt::format("CUPTI is too old: it has no {}", missing)
                 : fmt::format("CUPTI is too old: expected version {}, found {}", kOldestVersion, version),
             "install the CUDA toolkit 13, or set CUDA_HOME to its folder"};
  return false;
}

}  // namespace kvlapse
