// One R-KV compaction as host arrays, its definition in fp64 with the whole matrix of cosines, and the golden
// vectors driven step by step; for the emulator's and the GPU's tests.
#pragma once

#include <cstddef>
#include <functional>
#include <string>
#include <vector>

#include "kernels/decode/rkv_args.h"

namespace kvlapse {

struct RkvProblem {
  RkvShape shape;
  std::vector<std::byte> q, k, v;  // of the shape's dtype
  std::vector<int32_t> order, count, positions, evicted;
  std::vector<float> value_l1, scores;

  explicit RkvProblem(const RkvShape& s);
  int n_items() const { return shape.n_items(); }
  void set(std::vector<std::byte>& to, size_t index, float value) const;
  float get(const std::vector<std::byte>& from, size_t index) const;
  // Appends a token to every head of sequence b; k, v [H, D].
  void append(int b, int pos, const float* k_rows, const float* v_rows);
  // Queries of the window of sequence b, oldest first: [window, Hq, D].
  void set_queries(int b, const float* rows);
};

// Clustered random keys, so that some cosines exceed the threshold; `held` tokens per sequence, ranks
// shuffled.
RkvProblem make_rkv_problem(const RkvShape& shape, const std::vector<int>& held, uint64_t seed);

struct RkvCheck {
  std::string failure;  // "" when all is as defined
  double score_error = 0;
  int near_ties = 0;  // tokens that differ where scores are equal within rounding
};
RkvCheck check_rkv(const RkvProblem& before, const RkvProblem& after, bool has_scores);

// Runs the group rkv_zefancai of a golden file in fp32, free-running, the same sequence `batch` times.
// Returns "" or the first difference.
std::string run_rkv_golden(const std::string& file, int batch,
                           const std::function<void(RkvProblem&)>& compact);

}  // namespace kvlapse
