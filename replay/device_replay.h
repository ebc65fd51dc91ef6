// Replays on a device (core/engine/replay_device.h): what ReplayEngine::run does, for the policies that a
// device serves. The device takes the decisions and measures what reads attention; what follows from the
// decisions alone (held tokens, evictions, lifetimes, churn, revival) is counted here. Victims are those of
// ReplayEngine, and so is every count; sums of weights agree within 1e-5, errors within 1e-3 (half precision
// operands). A step at which held tokens have less than 2^-70 of the weight is an error. Not measured, and
// absent from results: rank correlation and sensitivity of scores.
#pragma once

#include "core/engine/replay_device.h"
#include "replay/replay_engine.h"

namespace kvlapse {

class DeviceReplayer {
 public:
  DeviceReplayer(const RowSource& source, ReplayOptions options, ReplayDevice& device);

  static bool supports(const Policy& policy) { return ReplayDevice::supports(policy.info()); }
  // As ReplayEngine::run. Every policy must be supported.
  std::vector<SequenceMetrics> run(int sequence, const std::vector<ReplayConfig>& configs) const;
  // One layer as the device answers it. `metrics` false: decisions alone.
  DeviceReplay run_layer(int sequence, int layer, const std::vector<ReplayConfig>& configs, bool metrics,
                         bool time_stages = false) const;

 private:
  // `older`: sums of DeviceReplay::older over the horizon.
  LayerMetrics measure(const DeviceReplay& done, const RowSequence& sequence, std::span<const double> older,
                       size_t config) const;

  const RowSource& source_;
  ReplayOptions options_;
  ReplayEngine engine_;  // checks the selection; cuts prompts that exceed a budget
  ReplayDevice& device_;
};

}  // namespace kvlapse
