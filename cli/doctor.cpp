#include "cli/doctor.h"

#include <dlfcn.h>
#include <fmt/format.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <thread>

#include "cli/command.h"
#include "cli/model_path.h"
#include "cli/progress.h"
#include "cli/table.h"
#include "kernels/choice/gpu.h"
#include "trace/gpu_capture.h"

namespace kvlapse::cli {
namespace {

struct Library {
  void* handle = nullptr;
  explicit Library(std::initializer_list<const char*> names) {
    for (const char* name : names)
      if ((handle = dlopen(name, RTLD_LAZY | RTLD_LOCAL)) != nullptr) return;
  }
  ~Library() {
    if (handle) dlclose(handle);
  }
  Library(const Library&) = delete;
  Library& operator=(const Library&) = delete;
  template <typename Function>
  Function symbol(const char* name) const {
    return reinterpret_cast<Function>(dlsym(handle, name));
  }
};

Finding check_cpu() {
  bool simd = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq");
  return {"cpu", Finding::State::works,
          fmt::format("{} threads, {}", std::thread::hardware_concurrency(),
                      wide   ? "AVX-512"
                      : simd ? "AVX2 + FMA"
                             : "no AVX2"),
          simd ? "" : "without AVX2 and FMA the same results are computed by scalar code, far slower"};
}

Finding check_model() {
  try {
    return {"built-in model", Finding::State::works, find_model("").string(), ""};
  } catch (const std::exception& error) {
    return {"built-in model", Finding::State::broken, error.what(), "set KVLAPSE_MODELS, or reinstall"};
  }
}

Finding check_gpu() {
  Library cuda({"libcuda.so.1"});
  if (!cuda.handle)
    return {"gpu", Finding::State::missing, "no NVIDIA driver (libcuda.so.1)",
            "recording runs on the CPU; for CUDA install NVIDIA's driver"};
  auto init = cuda.symbol<int (*)(unsigned)>("cuInit");
  auto count = cuda.symbol<int (*)(int*)>("cuDeviceGetCount");
  auto name = cuda.symbol<int (*)(char*, int, int)>("cuDeviceGetName");
  auto version = cuda.symbol<int (*)(int*)>("cuDriverGetVersion");
  int devices = 0, driver = 0;
  if (!init || !count || !name || !version || init(0) != 0 || count(&devices) != 0 || devices == 0)
    return {"gpu", Finding::State::broken, "the driver is there, no device answers", "see `nvidia-smi`"};
  version(&driver);
  char text[128] = {};
  name(text, sizeof text, 0);
  return {"gpu", Finding::State::works,
          fmt::format("{} x {}, driver API {}.{}", devices, text, driver / 1000, driver % 1000 / 10), ""};
}

Finding check_profiler() {
  const GpuProfilerState state = probe_gpu_profiler();
  return {"gpu activity", state.found ? Finding::State::works : Finding::State::missing, state.detail,
          state.advice};
}

// Whether this program decodes on the GPU.
Finding check_gpu_engine() {
  const GpuReport report = report_gpu();
  if (!report.built_in)
    return {"gpu engine", Finding::State::missing, "this program was built without CUDA",
            "build with KVLAPSE_CUDA=ON (make cuda); needs nvcc 12.8 or newer"};
  if (report.found.empty())
    return {"gpu engine", Finding::State::missing, report.why,
            "recording runs on the CPU; for CUDA install NVIDIA's driver for CUDA 13 (580 or newer)"};
  return {"gpu engine", Finding::State::works, report.found, ""};
}

Finding check_counters() {
  std::ifstream params("/proc/driver/nvidia/params");
  if (!params.is_open())
    return {"gpu counters", Finding::State::missing, "no NVIDIA kernel module", "see the line above"};
  for (std::string line; std::getline(params, line);)
    if (line.starts_with("RmProfilingAdminOnly: 1") && geteuid() != 0)
      return {"gpu counters", Finding::State::broken, "reserved for administrators (RmProfilingAdminOnly: 1)",
              "load the driver with NVreg_RestrictProfilingToAdminUsers=0, or run as root"};
  return {"gpu counters", Finding::State::works, "allowed", ""};
}

Finding check_display() {
  const char* x11 = std::getenv("DISPLAY");
  const char* wayland = std::getenv("WAYLAND_DISPLAY");
  Library egl({"libEGL.so.1"});
  if (x11 || wayland)
    return {"display", Finding::State::works,
            x11 ? fmt::format("X11 {}", x11) : fmt::format("Wayland {}", wayland), ""};
  if (egl.handle)
    return {"display", Finding::State::works, "no screen; EGL draws screenshots without one", ""};
  return {"display", Finding::State::missing, "no screen and no libEGL.so.1",
          "install libegl1 and libgl1-mesa-dri for `view --screenshot`"};
}

Finding check_disk() {
  struct statvfs info {};
  if (statvfs(".", &info) != 0) return {"disk", Finding::State::broken, "this folder cannot be read", ""};
  double free_bytes = static_cast<double>(info.f_bavail) * static_cast<double>(info.f_frsize);
  bool enough = free_bytes > 1e9;
  return {"disk", enough ? Finding::State::works : Finding::State::broken,
          fmt::format("{} free here", format_bytes(free_bytes)),
          enough ? "" : "a qkv trace of the built-in model takes about 25 KB a token"};
}

}  // namespace

std::string_view state_name(Finding::State state) {
  constexpr std::string_view kStates[] = {"works", "missing", "broken"};
  return kStates[static_cast<int>(state)];
}

std::vector<Finding> examine_machine() {
  return {check_cpu(),        check_model(),    check_disk(),     check_gpu(),
          check_gpu_engine(), check_profiler(), check_counters(), check_display()};
}

void add_doctor(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "doctor", "what works on this machine, what does not, and what to do",
                  "  kvlapse doctor\n  kvlapse doctor --json");
  command->callback([&context] {
    const std::vector<Finding> findings = examine_machine();
    bool can_record = true;
    for (size_t i = 0; i < 3; ++i) can_record &= findings[i].state == Finding::State::works;
    Json rows = Json::array();
    Table table({"part", "state", "found", "what to do"});
    for (const Finding& f : findings) {
      std::string state(state_name(f.state));
      rows.push_back({{"part", f.name}, {"state", state}, {"found", f.detail}, {"advice", f.advice}});
      table.add({f.name, state, f.detail, f.advice});
    }
    if (context.json)
      print_json({{"version", KVLAPSE_VERSION}, {"can_record", can_record}, {"parts", rows}});
    else
      fmt::print("kvlapse {}\n{}recording: {}\n", KVLAPSE_VERSION, table.text(),
                 can_record ? "works" : "does not work here");
    context.exit_code = can_record ? 0 : 2;
  });
}

}  // namespace kvlapse::cli
