// Self-replay: the recorded policy at its recorded budget, replayed from the trace's q, k and v, must evict
// exactly the recorded victims: every sequence, recorded layer, head and step, the prompt's cut included.
#pragma once

#include <optional>
#include <string>

#include "replay/replay_engine.h"
#include "trace/trace_reader.h"

namespace kvlapse {

struct Mismatch {
  int sequence = 0, layer = 0, step = 0, kv_head = 0;  // kv_head kWholeLayer: shared by the layer
  int recorded_pos = -1, replayed_pos = -1;            // -1: no such victim on that side
};

struct SelfReplayReport {
  std::string policy;  // canonical spec
  int budget_slots = 0;
  int64_t decisions = 0;                   // recorded victims
  int64_t mismatches = 0;                  // victims on one side only, the larger side counted
  int64_t ties = 0;                        // replayed victims within 1e-6 (relative) of a survivor's score
  std::optional<Mismatch> first_mismatch;  // by sequence, layer, step
};

// Throws Error when the trace holds no q, k, v or its policy is not in the catalogue.
SelfReplayReport self_replay(const TraceReader& trace, const ReplayOptions& options = {});

// Layer 0 is closed: its q, k, v depend on token and position alone. So an open-loop replay of layer 0 of
// `full` under the policy and budget of `closed`, recorded with the tokens of `full`, must give the victims
// of `closed`.
SelfReplayReport layer0_replay(const TraceReader& full, const TraceReader& closed,
                               const ReplayOptions& options = {});

}  // namespace kvlapse
