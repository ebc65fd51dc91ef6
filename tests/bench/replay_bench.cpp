// How the time of a replay grows: with 1 to 128 configurations, and with 1K to 32K tokens (exponent fitted
// over the doublings). One layer of synthetic rows: 2 query heads, 1 kv head, 64 dims. Metrics on.
//
//     replay_bench [THREADS]
#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <vector>

#include "replay/bench_configs.h"
#include "replay/synthetic_rows.h"

namespace kvlapse {
namespace {

double seconds_of(const RowSource& rows, int n_configs, int threads) {
  const std::vector<ReplayConfig> configs = bench_configs(n_configs, rows.sequence(0));
  const auto start = std::chrono::steady_clock::now();
  ReplayEngine(rows, {.threads = threads, .memory_bytes = size_t{4} << 30}).run(0, configs);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Slope of log seconds over log size.
double fitted_exponent(const std::vector<std::pair<double, double>>& points) {
  double x = 0, y = 0, xx = 0, xy = 0;
  for (auto [size, seconds] : points) {
    const double a = std::log(size), b = std::log(seconds);
    x += a, y += b, xx += a * a, xy += a * b;
  }
  const auto n = static_cast<double>(points.size());
  return (n * xy - x * y) / (n * xx - x * x);
}

void run(int threads) {
  const CacheGeometry geometry{1, 2, 1, 64, 0, DType::f32};
  const MemoryRows rows = synthetic_rows(geometry, 4096, 128, 7);
  fmt::print("configurations over 4096 tokens, {} threads\n", threads);
  for (int n = 1; n <= 128; n *= 2) {
    const double seconds = seconds_of(rows, n, threads);
    fmt::print("{:6} {:8.3f} s {:8.4f} s each\n", n, seconds, seconds / n);
    std::fflush(stdout);
  }
  fmt::print("tokens under 4 configurations of 10 % to 50 %\n");
  std::vector<std::pair<double, double>> points;
  for (int n = 1024; n <= 32768; n *= 2) {
    const MemoryRows longer = synthetic_rows(geometry, n, 128, 7);
    points.emplace_back(n, seconds_of(longer, 4, threads));
    fmt::print("{:6} {:8.3f} s\n", n, points.back().second);
    std::fflush(stdout);
  }
  fmt::print("fitted exponent {:.2f}\n", fitted_exponent(points));
}

}  // namespace
}  // namespace kvlapse

int main(int argc, char** argv) {
  kvlapse::run(argc > 1 ? std::atoi(argv[1]) : 2);
}
