// Rows of `bench attention` as lines of JSON, on the current GPU. Usage: attention_bench [OUTPUT.jsonl]
#include "kernels/cuda/attention_bench.h"

#include <cstdio>
#include <exception>

int main(int argc, char** argv) {
  std::FILE* out = argc > 1 ? std::fopen(argv[1], "w") : stdout;
  if (out == nullptr) return std::perror(argv[1]), 2;
  try {
    kvlapse::bench_attention({}, [&](const kvlapse::AttentionBenchRow& row) {
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
