// How many configurations (policy x budget) a second a replay gets through.
#pragma once

#include <string>
#include <vector>

#include "kernels/cpu/bench/bench.h"

namespace kvlapse::cli {

struct ReplayBench {
  int n_threads = 2;
  std::string trace;                                 // its first sequence; empty: synthetic rows of one layer
  int n_tokens = 4096;                               // of synthetic rows; of a trace the first ones, 0: all
  int n_q_heads = 2, n_kv_heads = 1, head_dim = 64;  // of synthetic rows
  std::vector<int> configs;                          // one row each
  int runs = 3;
  int gpu = -1;  // index; -1: the CPU
};

// Rows of configurations a second, metrics included. Their limit: the full cache's attention over the
// measured steps, which every replay needs once as its reference, at the rate of multiply-adds that this run
// measures. On a GPU: the time in which its logits can be multiplied or its weights can pass through memory,
// whichever is longer; with the stages of one more run that waits between them.
std::vector<BenchRow> bench_replay(const ReplayBench& bench);

}  // namespace kvlapse::cli
