// Comparisons of a replay on a device with the CPU's, for the emulator and for real ones.
#pragma once

#include <string>
#include <vector>

#include "core/engine/replay_device.h"

namespace kvlapse {

struct DeviceCase {
  int n_q_heads, n_kv_heads, head_dim, n_tokens, n_prompt;
  uint64_t seed;
  float quantum = 0;    // rows rounded to multiples of it, so that scores tie; 0: as they are
  float sharpness = 1;  // of attention: a factor of the queries
};

// One spec of each kind of score and rule that a device serves.
std::vector<std::string> device_policies();
// "" when the device evicts what ReplayEngine does, otherwise the first difference.
std::string check_device_victims(ReplayDevice& device, const DeviceCase& at,
                                 const std::vector<std::string>& specs, const std::vector<int>& budgets);
// "" when its metrics agree: counts exactly, masses within 1e-5, errors within 2e-3.
std::string check_device_metrics(ReplayDevice& device, const DeviceCase& at,
                                 const std::vector<std::string>& specs, const std::vector<int>& budgets,
                                 int step_begin = -1, int step_end = -1);

}  // namespace kvlapse
