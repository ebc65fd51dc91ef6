// Token lives of one (sequence, layer) under another policy and budget: an open-loop replay of that layer
// alone.
#pragma once

#include <functional>
#include <string>

#include "trace/views/layer_life.h"

namespace kvlapse {

// Throws Error (no q, k, v; a budget below the protected set), UsageError (unknown policy) and Interrupted
// when `cancelled` returned true.
LayerLife replay_layer_life(const TraceReader& reader, int sequence, int layer,
                            const std::string& policy_spec, const std::string& budget,
                            const std::function<bool()>& cancelled = {});

}  // namespace kvlapse
