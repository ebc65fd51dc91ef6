// Measurements of the CPU engine on this machine, each beside the physical limit that the same run measures.
// Used by `kvlapse bench`. Every figure is a median of repeated runs; nothing else should run meanwhile.
#pragma once

#include <span>
#include <string>
#include <utility>
#include <vector>

#include "core/base/dtype.h"
#include "core/model/model.h"
#include "core/ops/backend.h"
#include "core/policy/policy.h"

namespace kvlapse {

struct BenchRow {
  std::string bench;  // "attention", "decode"
  std::string name;   // the case
  std::string device;
  double median = 0;          // in `unit`
  std::string unit;           // "us", "ms", "ratio"
  double limit = 0;           // same unit: the physical limit, or the most that is allowed
  double ratio_to_limit = 0;  // limit / median for a time against its floor, median / limit otherwise
  int runs = 0;
  double spread = 0;  // distance between the quartiles, relative to the median
  std::vector<std::pair<std::string, double>> numbers;  // further keys of this bench
  std::vector<std::pair<std::string, std::string>> texts;
};

// Median and relative distance between the quartiles; sorts its argument.
struct Spread {
  double median = 0, relative = 0;
};
Spread spread_of(std::vector<double>& values);

// Bytes a second that n_threads read together from memory of that size, in GB/s.
double read_bandwidth_gbps(int n_threads, size_t bytes);
// fp32 operations a second that n_threads reach together with fused multiply-adds in registers, in 1e9.
double multiply_add_gflops(int n_threads);

struct AttentionBench {
  int n_threads = 2;
  int n_slots = 4096, n_q_heads = 8, n_kv_heads = 4, head_dim = 64, batch = 1;
  DType dtype = DType::f32;
  size_t cache_bytes = size_t{256} << 20;  // K/V of all layers together; more than the last-level cache
  int runs = 30;
};
// Two rows: one layer's attention over a full cache against the read bandwidth; the policy's importance and
// eviction against a tenth of that time. The policy must evict every step.
std::vector<BenchRow> bench_attention(const AttentionBench& bench, const Policy& policy);

struct DecodeBench {
  int n_threads = 2;
  int context = 4096;  // tokens held when the first measured step begins
  int batch = 1;
  DType kv_dtype = DType::f32;
  int budget = 0;  // slots, for a policy that evicts
  int steps = 64;
  MatmulMode mode = MatmulMode::exact;
};
// One row: a decode step against the time in which its weights and K/V can be read, at the bandwidth of
// reading as many bytes again and again.
std::vector<BenchRow> bench_decode(const DecodeBench& bench, const Model& model, const Policy& policy);

}  // namespace kvlapse
