#include "kernels/cpu/bench/bench.h"

#include <algorithm>
#include <chrono>

#include "core/base/vector_math.h"
#include "kernels/cpu/host_array.h"
#include "kernels/cpu/thread_team.h"

namespace kvlapse {

Spread spread_of(std::vector<double>& values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {
    return values[static_cast<size_t>(share * static_cast<double>(values.size() - 1))];
  };
  const double median = at(0.5);
  return {median, median > 0 ? (at(0.75) - at(0.25)) / median : 0};
}

double read_bandwidth_gbps(int n_threads, size_t bytes) {
  constexpr int kRuns = 9;
  constexpr float kTouch = 1.0f;
  ThreadTeam team(n_threads);
  HostArray<float> values(bytes / sizeof(float));
  std::vector<float> most(n_threads);
  auto pass = [&](bool write) {
    team.run([&](int thread) {
      const Share mine = share_of(static_cast<int64_t>(values.size()), thread, n_threads, 16);
      std::span<float> part(values.data() + mine.begin, static_cast<size_t>(mine.end - mine.begin));
      if (write)
        std::fill(part.begin(), part.end(), kTouch);
      else
        most[thread] = max_value(part);
    });
  };
  pass(true);
  std::vector<double> gbps;
  for (int i = 0; i < kRuns; ++i) {
    const auto start = std::chrono::steady_clock::now();
    pass(false);
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    gbps.push_back(static_cast<double>(values.size() * sizeof(float)) / seconds.count() * 1e-9);
  }
  return spread_of(gbps).median;
}

}  // namespace kvlapse
