// Rows that look like attention: keys of a few clusters with drift, queries near recent and old keys, so that
// weights are spread over sinks, recent tokens and some far ones. Deterministic.
#pragma once

#include "replay/row_source.h"

namespace kvlapse {

MemoryRows synthetic_rows(CacheGeometry geometry, int n_tokens, int n_prompt, uint64_t seed,
                          int n_sequences = 1);

}  // namespace kvlapse
