// CPU time of the calling thread.
#pragma once

#include <time.h>

#include <cstdint>

namespace kvlapse {

inline int64_t thread_cpu_ns() {
  timespec time{};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<int64_t>(time.tv_sec) * 1'000'000'000 + time.tv_nsec;
}

}  // namespace kvlapse
