// What a build without CUDA answers.
#include "kernels/choice/gpu.h"

#include "core/base/error.h"

namespace kvlapse {

std::unique_ptr<Backend> make_cuda_backend(int index) {
  fail(
      "--device cuda:{}: this program was built without CUDA; expected cpu (or a build with KVLAPSE_CUDA=ON)",
      index);
}

std::unique_ptr<Backend> make_fused_backend(const CudaFusedDecode& decode, const TransformerWeights&,
                                            const Policy&) {
  return make_cuda_backend(decode.device);
}

std::unique_ptr<ReplayDevice> make_cuda_replay(int index) {
  make_cuda_backend(index);
  return nullptr;
}

GpuRates gpu_rates(int index) {
  make_cuda_backend(index);
  return {};
}

std::vector<BenchRow> bench_cuda_decode(const CudaDecodeBench& bench, const ModelSpec&,
                                        const TransformerWeights*, const Policy&) {
  make_cuda_backend(bench.device);
  return {};
}

std::vector<BenchRow> bench_cuda_attention(const CudaAttentionBench& bench) {
  make_cuda_backend(bench.device);
  return {};
}

std::vector<BenchRow> bench_cuda_rkv(const CudaRkvBench& bench) {
  make_cuda_backend(bench.device);
  return {};
}

GpuReport report_gpu() {
  return {};
}

}  // namespace kvlapse
