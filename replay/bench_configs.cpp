#include "replay/bench_configs.h"

#include <algorithm>

namespace kvlapse {

namespace {
constexpr const char* kPolicies[] = {"longflow", "h2o", "random", "streaming_llm"};
constexpr int kCount = 4;
}  // namespace

std::vector<ReplayConfig> gpu_bench_configs(int n_configs, const RowSequence& sequence) {
  const int n_tokens = sequence.n_tokens, last_round = std::max(1, (n_configs - 1) / kCount);
  std::vector<ReplayConfig> configs;
  for (int c = 0; c < n_configs; ++c)
    configs.push_back(
        {make_policy(kPolicies[c % kCount]), n_tokens / 10 + n_tokens * 3 * (c / kCount) / 10 / last_round});
  return configs;
}

std::vector<ReplayConfig> bench_configs(int n_configs, const RowSequence& sequence) {
  const int n_tokens = sequence.n_tokens, n_rounds = (n_configs + kCount - 1) / kCount;
  std::vector<ReplayConfig> configs;
  for (int c = 0; c < n_configs; ++c)
    configs.push_back(
        {make_policy(kPolicies[c % kCount]), n_tokens / 10 + n_tokens * 4 * (c / kCount) / 10 / n_rounds});
  return configs;
}

}  // namespace kvlapse
