// The backend that decodes by the fast decoder.
#include <algorithm>

#include "core/base/error.h"
#include "kernels/choice/gpu.h"
#include "kernels/cuda/graph_decoder.h"
#include "kernels/gpu/ahead_backend.h"

namespace kvlapse {
namespace {

// A step's time of the host may be as long as so many steps of the device once in a while: a commit of the
// trace, a line on the terminal.
constexpr int kStepsAhead = 16;

}  // namespace

std::unique_ptr<Backend> make_fused_backend(const CudaFusedDecode& decode, const TransformerWeights& weights,
                                            const Policy& policy) {
  const PolicyInfo& info = policy.info();
  const EvictionRule& rule = info.rule;
  std::unique_ptr<Backend> prompts = make_cuda_backend(decode.device);
  GraphDecoderOptions options;
  options.batch = decode.batch;
  options.n_reports = kStepsAhead;
  options.n_positions = decode.n_tokens + kStepsAhead;  // a sequence at its end goes on until that is seen
  options.n_slots = options.n_positions;
  if (info.evicts) {
    options.score = fused_score(info);
    if (options.score == FusedScore::none)
      fail("fused decode: policy {}: expected one whose victims the fused step chooses", info.name);
    options.shared = rule.granularity == Granularity::layer;
    options.recent = std::min(rule.recent_slots(decode.budget), decode.budget - rule.headroom);
    options.n_slots = std::min(options.n_positions, rule.peak_slots(decode.budget));
  }
  return std::make_unique<AheadBackend>(std::move(prompts), std::make_unique<GraphDecoder>(weights, options));
}

}  // namespace kvlapse
