#include "trace/views/token_values.h"

#include <algorithm>

namespace kvlapse {

void count_holders(std::span<const int32_t> evicted_at, int n_kv_heads, int step,
                   std::span<int32_t> holders) {
  const size_t n = evicted_at.size() / static_cast<size_t>(n_kv_heads);
  const size_t end = std::min({n, holders.size(), static_cast<size_t>(step) + 1});
  for (int head = 0; head < n_kv_heads; ++head) {
    const int32_t* evicted = evicted_at.data() + static_cast<size_t>(head) * n;
    for (size_t pos = 0; pos < end; ++pos) holders[pos] += evicted[pos] > step ? 1 : 0;
  }
}

std::vector<float> token_lifetimes(const LayerLife& life, int kv_head) {
  const auto evicted = life.evicted(kv_head);
  std::vector<float> ages(evicted.size());
  for (int pos = 0; pos < life.n_steps; ++pos)
    ages[pos] = static_cast<float>(std::min(evicted[pos], life.n_steps - 1) - pos);
  return ages;
}

}  // namespace kvlapse
