// make_synthetic_trace OUT.kvl [key=value ...]: a labelled synthetic trace of any size through the real
// writer, for timing and for pictures. Keys: layers q_heads kv_heads head_dim prompt steps budget cadence
// shared tier seed sleep_us gpu dtype.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <iterator>
#include <string>
#include <thread>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_gpu.h"
#include "tests/support/trace/synthetic_trace.h"

namespace {

// Words of a made-up chain of thought, so that a text can be looked at.
std::string word(int32_t token) {
  static const char* kWords[] = {"so",    " x",     " =",     " y",     " +",     " 7",     " we",   " get",
                                 " then", "\n",     " check", " again", " the",   " sum",   " of",   " both",
                                 ":",     " 13",    ",",      " wait",  " no",    " carry", " the",  " 1",
                                 ".\n",   " step",  " 4",     " next",  " is",    " a",     " list", " of",
                                 " five", " items", " and",   " each",  " value", " holds", " true", " when",
                                 " k",    " >",     " 0",     " let",   " me"};
  constexpr int32_t kCount = static_cast<int32_t>(std::size(kWords));
  return kWords[token % kCount];
}

}  // namespace

int main(int argc, char** argv) {
  using namespace kvlapse;
  if (argc < 2) {
    std::fprintf(stderr, "usage: make_synthetic_trace OUT.kvl [key=value ...]\n");
    return 64;
  }
  test::SyntheticProcess process;
  process.tier = TraceTier::events;
  process.geometry.n_layers = 6, process.geometry.n_q_heads = 8, process.geometry.n_kv_heads = 2,
  process.geometry.head_dim = 32;
  int sleep_us = 0;
  bool gpu = false;
  try {
    for (int i = 2; i < argc; ++i) {
      const std::string argument = argv[i];
      const size_t equals = argument.find('=');
      const std::string key = argument.substr(0, equals),
                        value = equals == std::string::npos ? "" : argument.substr(equals + 1);
      const int number = std::atoi(value.c_str());
      if (key == "layers")
        process.geometry.n_layers = number;
      else if (key == "q_heads")
        process.geometry.n_q_heads = number;
      else if (key == "kv_heads")
        process.geometry.n_kv_heads = number;
      else if (key == "head_dim")
        process.geometry.head_dim = number;
      else if (key == "prompt")
        process.n_prompt = number;
      else if (key == "steps")
        process.n_steps = number;
      else if (key == "budget")
        process.budget = number;
      else if (key == "cadence")
        process.cadence = number;
      else if (key == "shared")
        process.shared = number != 0;
      else if (key == "tier")
        process.tier = parse_tier(value);
      else if (key == "layer_end")
        process.layer_end = number;
      else if (key == "seed")
        process.seed = static_cast<uint64_t>(number);
      else if (key == "dtype")
        process.geometry.dtype = parse_dtype(value);
      else if (key == "gpu")
        gpu = number != 0;
      else if (key == "sleep_us")
        sleep_us = number;
      else
        fail_usage("{}: unknown key", key);
    }
    process.geometry.n_slots = process.n_steps + 1;
    if (gpu) process = test::with_gpu(process);
    TraceWriterOptions options;
    options.force = true;
    options.token_text = word;
    if (sleep_us == 0) {
      write_synthetic_trace(argv[1], process, options);
      return 0;
    }
    // Slowly, as a recorder would: for watching a growing file.
    TraceWriter writer(argv[1], process.header(), options);
    test::SyntheticRun run(writer, process);
    while (run.step()) std::this_thread::sleep_for(std::chrono::microseconds(sleep_us));
    run.end("max_tokens");
    writer.finish(false);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "make_synthetic_trace: %s\n", error.what());
    return 2;
  }
  return 0;
}
