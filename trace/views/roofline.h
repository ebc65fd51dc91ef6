// Where attention stands between the memory's and the processor's ceilings: operations a byte against
// operations a second. Decode attention is bound by memory: its points lie on the slope or below it.
#pragma once

#include <cmath>
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
struct Roofline {
  std::vector<RooflinePoint> points;
  double ceiling_gbps = NAN;  // 1e9 bytes a second; NaN: no counter tells
  std::string ceiling_from;   // how it is known, or why not
  std::string absence;        // why there is no point
};
Roofline read_roofline(const TraceReader& reader, int sequence);

}  // namespace kvlapse
