// What a backend launches on its device, by name, layer and phase, with the bytes that each launch should
// move through device memory (modelled). A recording sets measured bytes beside them.
#pragma once

#include <cstdint>
#include <mutex>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kvlapse {

struct LaunchRecord {
  std::string name;  // of the kernel's function, or a part of it; foreign libraries' kernels: what they do
  uint64_t expected_bytes = 0;        // modelled
  int layer = -1;                     // -1: of no layer
  std::string_view phase = "matmul";  // static text; a phase of StepPhase
  bool foreign = false;  // the kernel's name is not ours to know (a library chose it; it may launch several)
};

// Collects launches while one is installed. Any thread.
class LaunchLog {
 public:
  // Of the launches to come.
  void set_place(int layer, std::string_view phase) {
    std::lock_guard lock(mutex_);
    layer_ = layer;
    phase_ = phase;
  }
  void add(const char* name, uint64_t expected_bytes, bool foreign = false) {
    std::lock_guard lock(mutex_);
    records_.push_back({name, expected_bytes, layer_, phase_, foreign});
  }
  std::vector<LaunchRecord> take() {
    std::lock_guard lock(mutex_);
    return std::exchange(records_, {});
  }

 private:
  std::mutex mutex_;
  std::vector<LaunchRecord> records_;
  int layer_ = -1;
  std::string_view phase_ = "matmul";
};

}  // namespace kvlapse
