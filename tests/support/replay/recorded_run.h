// Records a real generation of a model folder on the CPU, for tests of what reads traces.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "core/base/dtype.h"

namespace kvlapse::test {

struct RecordedRun {
  std::string model;
  std::string policy = "full", budget = "64";
  std::string claimed_policy;                  // what the trace says instead; "": the truth
  std::vector<std::vector<int32_t>> prompts;   // one sequence each
  std::vector<std::vector<int32_t>> teachers;  // tokens fed behind the prompts; empty: the model's own
  int max_tokens = 300;
  DType kv_dtype = DType::f32;
  double temperature = 0;
  uint64_t seed = 0;
};

void record_run(const std::filesystem::path& file, const RecordedRun& run);

}  // namespace kvlapse::test
