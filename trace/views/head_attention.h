// Attention that the tokens of one (sequence, layer, kv head) received, step by step: read from the sketch
// tier, or computed from recorded q and k over all recorded tokens (open loop). Mean over the group's query
// heads.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "trace/trace_reader.h"
#include "trace/views/layer_life.h"

namespace kvlapse {

struct AttentionPoint {
  int32_t step = 0, pos = 0;
  float weight = 0;
};

struct HeadAttention {
  bool from_sketch = false;            // else computed from q and k
  std::vector<AttentionPoint> points;  // the heaviest kSketchTop of each step, in order of step
  std::vector<float> received;         // [T] sum of the weights of the steps during which the token was held
  // [T] regret: sum of the weights that the token would have received after its eviction. Only known when q
  // and k were recorded; empty otherwise.
  std::vector<float> missed;
  std::string absence;  // why there is none
};

// Work is refused above this many multiplications (about ten seconds of one core).
inline constexpr double kMostAttentionWork = 4e10;

// `cancelled` is asked now and then; then what is done so far is returned.
HeadAttention read_head_attention(const TraceReader& reader, const LayerLife& life, int kv_head,
                                  const std::function<bool()>& cancelled = {});

// Attention of one step over all recorded positions [0, step], mean over the group; empty when q and k are
// not recorded.
std::vector<float> read_attention_row(const TraceReader& reader, int sequence, int layer, int kv_head,
                                      int step);

}  // namespace kvlapse
