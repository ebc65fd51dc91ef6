// Times an R-KV compaction: CUDA-graph replays over layers of their own, more than L2 holds, medians, beside
// the time of reading all keys once at the read ceiling. One thread; uses the current device alone.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels/decode/rkv_args.h"

namespace kvlapse {

struct RkvBenchCase {
  int batch = 1, budget = 1024, buffer = 128;
  bool alike = false;  // keys are all alike: the search for similar ones ends at once; otherwise none are: it
                       // runs through
  DType dtype = DType::bf16;
  int blocks = 0;  // of a head; 0: what fills the device
};

struct RkvBenchRow {
  std::string device;
  RkvBenchCase at;
  int n_q_heads = 0, n_kv_heads = 0, head_dim = 0, blocks = 0;
  double median_us = 0, min_us = 0, max_us = 0, read_ceiling_gbps = 0;
  uint64_t key_bytes = 0, counted_bytes = 0;
  int runs = 0;
  double floor_us() const { return static_cast<double>(key_bytes) / read_ceiling_gbps * 1e-3; }
};

// The table of RESULTS.md when `cases` is empty. `read_ceiling_gbps` 0: measured first.
void bench_rkv(const std::vector<RkvBenchCase>& cases, double read_ceiling_gbps,
               const std::function<void(const RkvBenchRow&)>& done);
std::string rkv_bench_json(const RkvBenchRow& row);

}  // namespace kvlapse
