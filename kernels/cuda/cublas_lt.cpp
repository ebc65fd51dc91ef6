#include "kernels/cuda/cublas_lt.h"

#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <vector>

#include "core/base/error.h"
#include "kernels/cuda/device_memory.h"

namespace kvlapse {
namespace {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;
constexpr int kProposals = 32;
constexpr size_t kTrials = 16;  // products of a measurement

constexpr const char* kPlaces[] = {"libcublasLt.so.13", "/usr/local/cuda/lib64/libcublasLt.so.13",
                                   "/usr/local/cuda-13/lib64/libcublasLt.so.13"};

void check(cublasStatus_t status, const char* call) {
  if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: {}: status {}", call, static_cast<int>(status));
}

// The functions that are used, under their own names.
struct Library {
  decltype(&::cublasLtCreate) create;
  decltype(&::cublasLtDestroy) destroy;
  decltype(&::cublasLtMatmulDescCreate) desc_create;
  decltype(&::cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&::cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&::cublasLtMatrixLayoutCreate) layout_create;
  decltype(&::cublasLtMatrixLayoutDestroy) layout_destroy;
  decltype(&::cublasLtMatmulPreferenceCreate) preference_create;
  decltype(&::cublasLtMatmulPreferenceDestroy) preference_destroy;
  decltype(&::cublasLtMatmulPreferenceSetAttribute) preference_set;
  decltype(&::cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&::cublasLtMatmul) matmul;

  // False when a function is missing.
  bool find(void* handle) {
    bool all = true;
    auto get = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(handle, name));
      all &= function != nullptr;
    };
    get(create, "cublasLtCreate");
    get(destroy, "cublasLtDestroy");
    get(desc_create, "cublasLtMatmulDescCreate");
    get(desc_destroy, "cublasLtMatmulDescDestroy");
    get(desc_set, "cublasLtMatmulDescSetAttribute");
    get(layout_create, "cublasLtMatrixLayoutCreate");
    get(layout_destroy, "cublasLtMatrixLayoutDestroy");
    get(preference_create, "cublasLtMatmulPreferenceCreate");
    get(preference_destroy, "cublasLtMatmulPreferenceDestroy");
    get(preference_set, "cublasLtMatmulPreferenceSetAttribute");
    get(heuristic, "cublasLtMatmulAlgoGetHeuristic");
    get(matmul, "cublasLtMatmul");
    return all;
  }
};

class Loaded final : public CublasLt {
 public:
  Loaded(void* library, const Library& functions)
      : library_(library), lt_(functions), workspace_(kWorkspaceBytes) {
    check(lt_.create(&handle_), "create");
  }
  ~Loaded() override {
    for (Plan& p : plans_) {
      lt_.layout_destroy(p.w);
      lt_.layout_destroy(p.x);
      lt_.layout_destroy(p.out);
      lt_.desc_destroy(p.product);
    }
    lt_.destroy(handle_);
    dlclose(library_);
  }

  int plan(const LtShape& s, std::span<const void* const> weights, const void* x, void* out,
           const Stream& stream) override {
    Plan p;
    p.add = s.add;
    check(lt_.desc_create(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
    // Column-major: W is [columns, rows] transposed, x [columns, n], out [rows, n].
    const cublasOperation_t transposed = CUBLAS_OP_T;
    check(lt_.desc_set(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &transposed, sizeof transposed), "transpose");
    const auto rows = static_cast<uint64_t>(s.rows), columns = static_cast<uint64_t>(s.columns),
               n = static_cast<uint64_t>(s.n);
    check(lt_.layout_create(&p.w, CUDA_R_16BF, columns, rows, s.columns), "layout");
    check(lt_.layout_create(&p.x, CUDA_R_16BF, columns, n, s.columns), "layout");
    check(lt_.layout_create(&p.out, s.bf16_out ? CUDA_R_16BF : CUDA_R_32F, rows, n, s.rows), "layout");
    cublasLtMatmulPreference_t preference = nullptr;
    check(lt_.preference_create(&preference), "preference");
    check(lt_.preference_set(preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWorkspaceBytes,
                             sizeof kWorkspaceBytes),
          "workspace");
    cublasLtMatmulHeuristicResult_t proposals[kProposals] = {};
    int found = 0;
    const cublasStatus_t status =
        lt_.heuristic(handle_, p.product, p.w, p.x, p.out, p.out, preference, kProposals, proposals, &found);
    lt_.preference_destroy(preference);
    check(status, "heuristic");
    if (found == 0) fail("cuBLASLt: no algorithm for [{}, {}] x {}", s.rows, s.columns, s.n);
    float best_ms = 1e30f;
    Event start, stop;
    for (int i = 0; i < found; ++i) {
      if (proposals[i].state != CUBLAS_STATUS_SUCCESS) continue;
      const cublasLtMatmulAlgo_t algorithm = proposals[i].algo;
      if (launch(p, algorithm, weights[0], x, out, stream.get()) != CUBLAS_STATUS_SUCCESS) continue;
      // As a graph, because that is how steps run.
      const Graph trials(stream, [&] {
        for (size_t t = 0; t < kTrials; ++t)
          check(launch(p, algorithm, weights[t % weights.size()], x, out, stream.get()), "trial");
      });
      float ms = 1e30f;
      for (int repeat = 0; repeat < 3; ++repeat) {
        start.record(stream);
        trials.launch(stream);
        stop.record(stream);
        ms = std::min(ms, stop.ms_since(start));
      }
      if (ms < best_ms) best_ms = ms, p.algorithm = algorithm;
    }
    if (best_ms == 1e30f) fail("cuBLASLt: no algorithm for [{}, {}] x {} ran", s.rows, s.columns, s.n);
    plans_.push_back(p);
    return static_cast<int>(plans_.size()) - 1;
  }

  void run(int plan, const void* w, const void* x, void* out, cudaStream_t stream) override {
    const Plan& p = plans_[static_cast<size_t>(plan)];
    check(launch(p, p.algorithm, w, x, out, stream), "product");
  }

 private:
  struct Plan {
    cublasLtMatmulDesc_t product = nullptr;
    cublasLtMatrixLayout_t w = nullptr, x = nullptr, out = nullptr;
    cublasLtMatmulAlgo_t algorithm{};
    bool add = false;
  };
  cublasStatus_t launch(const Plan& p, const cublasLtMatmulAlgo_t& algorithm, const void* w, const void* x,
                        void* out, cudaStream_t stream) {
    const float one = 1, beta = p.add ? 1.0f : 0.0f;
    return lt_.matmul(handle_, p.product, &one, w, p.w, x, p.x, &beta, out, p.out, out, p.out, &algorithm,
                      workspace_.data(), workspace_.bytes(), stream);
  }

  void* library_;
  Library lt_;
  cublasLtHandle_t handle_ = nullptr;
  DeviceBuffer<std::byte> workspace_;
  std::vector<Plan> plans_;
};

}  // namespace

std::unique_ptr<CublasLt> CublasLt::load(std::string& why) {
  for (const char* place : kPlaces) {
    void* handle = dlopen(place, RTLD_NOW | RTLD_LOCAL);
    if (handle == nullptr) continue;
    Library functions;
    if (functions.find(handle)) return std::make_unique<Loaded>(handle, functions);
    dlclose(handle);
  }
  why = "libcublasLt.so.13 was found neither by the loader nor in /usr/local/cuda/lib64";
  return nullptr;
}

}  // namespace kvlapse
