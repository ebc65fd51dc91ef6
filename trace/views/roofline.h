// Where attention stands between the memory's and the processor's ceilings: operations a byte against
// operations a second. Decode attention is bound by memory: its points lie on the slope or below it.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

struct RooflinePoint {
  std::string name;
  double flop_per_byte = 0;  // modelled: 4 x head_dim operations a token and query head, over the bytes moved
  double gflops = 0;         // 1e9 operations a second, over the measured time
  bool counted = false;      // bytes counted by hardware, otherwise modelled
};
// What the hardware can do at most.
struct Ceiling {
  enum class Origin : uint8_t { unknown, counted, derived, data_sheet, measured_now };
  double value = NAN;
  Origin origin = Origin::unknown;
  std::string from;  // how it is known, or why not
  bool known() const { return !std::isnan(value); }
};
struct Roofline {
  std::vector<RooflinePoint> points;
  Ceiling memory_gbps;     // 1e9 bytes a second
  Ceiling compute_gflops;  // 1e9 fp32 operations a second
  int cpu_threads = 0;     // recorded on the CPU with so many; 0: elsewhere
  std::string absence;     // why there is no point
};
Roofline read_roofline(const TraceReader& reader, int sequence);

}  // namespace kvlapse
