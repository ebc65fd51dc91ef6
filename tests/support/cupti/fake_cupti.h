// A CUPTI that records what a test says: kernels with made-up times, a sampler, a range profiler; any call
// can be told to fail. One at a time.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "trace/cupti/cupti_api.h"

namespace kvlapse::test {

class FakeCupti {
 public:
  FakeCupti();
  ~FakeCupti();
  FakeCupti(const FakeCupti&) = delete;
  FakeCupti& operator=(const FakeCupti&) = delete;

  CuptiApi api;
  std::map<std::string, CUptiResult> failures;  // by name of the call
  std::map<std::string, int> fail_after;        // calls that still succeed
  std::map<std::string, int> calls;
  std::string other_subscriber;

  // A kernel under a call of its own, or under `correlation`. Returns the correlation.
  uint32_t kernel(const char* name, uint64_t start_ns, uint64_t end_ns, uint32_t correlation = 0);
  uint32_t copy(uint64_t start_ns, uint64_t bytes);
  // Hands the records so far to the buffer callbacks, as the profiler's thread does.
  void deliver();
  size_t dropped = 0;

  struct Sample {
    uint64_t start = 0, end = 0;
    std::vector<double> values;
  };
  std::vector<Sample> samples;              // of the sampler, until they are read
  std::vector<std::vector<double>> ranges;  // of the range profiler, this step's
  size_t passes = 1;
  uint64_t now_ns = 1'000'000;  // of the profiler's clock; every reading adds 10

  // Internals that the functions reach.
  struct Record {
    CUpti_ActivityKind kind;
    std::vector<uint8_t> bytes;
  };
  std::vector<Record> records;
  std::vector<uint64_t> externals;
  uint32_t next_correlation = 1;
  CUpti_BuffersCallbackRequestFunc request = nullptr;
  CUpti_BuffersCallbackCompleteFunc complete = nullptr;
  std::map<int, bool> enabled;
  std::vector<Sample> read_samples;

  CUptiResult result_of(const char* call);

 private:
  uint32_t call_record();
  std::mutex mutex_;  // a sampler calls from its own thread
};

}  // namespace kvlapse::test
