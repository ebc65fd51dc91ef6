// Rows of `bench attention` and `bench rkv` as lines of JSON, on the current GPU.
// Usage: attention_bench OUTPUT.jsonl [MIN_BATCH MAX_BATCH | sweep | fp8 | one BATCH SLOTS [DTYPE] | caote
// [BATCH SLOTS [DTYPE]] | rkv [BATCH BUDGET [BLOCKS]]]
#include "kernels/cuda/attention_bench.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string_view>
#include <vector>

#include "kernels/cuda/rkv_bench.h"

int main(int argc, char** argv) {
  std::FILE* out = argc > 1 ? std::fopen(argv[1], "a") : stdout;
  if (out == nullptr) return std::perror(argv[1]), 2;
  kvlapse::AttentionBenchOptions options;
  const std::string_view mode = argc > 2 ? argv[2] : "";
  options.leave_one_out = mode == "caote";
  if (mode == "sweep")
    options.sweep = true;
  else if (mode == "fp8")
    options.fp8 = options.overlapped_only = true;
  else if ((mode == "one" || mode == "caote") && argc > 4)
    options.cases = {{std::atoi(argv[3]), std::atoi(argv[4]),
                      argc > 5 ? kvlapse::parse_dtype(argv[5]) : kvlapse::DType::bf16}};
  else if (mode != "caote" && argc > 3)
    options.min_batch = std::atoi(argv[2]), options.max_batch = std::atoi(argv[3]);
  try {
    std::vector<kvlapse::RkvBenchCase> cases;
    for (bool alike : {true, false})
      if (mode == "rkv" && argc > 4)
        cases.push_back({std::atoi(argv[3]), std::atoi(argv[4]), 128, alike, kvlapse::DType::bf16,
                         argc > 5 ? std::atoi(argv[5]) : 0});
    if (mode == "rkv")
      kvlapse::bench_rkv(cases, 0, [&](const kvlapse::RkvBenchRow& row) {
        std::fprintf(out, "%s\n", kvlapse::rkv_bench_json(row).c_str());
        std::fflush(out);
      });
    else
      kvlapse::bench_attention(options, [&](const kvlapse::AttentionBenchRow& row) {
        std::fprintf(out, "%s\n", kvlapse::attention_bench_json(row).c_str());
        std::fflush(out);
      });
  } catch (const std::exception& e) {
    std::fprintf(stderr, "attention_bench: %s\n", e.what());
    return 2;
  }
  if (out != stdout) std::fclose(out);
  return 0;
}
