#include "replay/trace_rows.h"

#include <algorithm>

#include "core/base/error.h"

namespace kvlapse {

TraceRows::TraceRows(const TraceReader& reader, int max_tokens) : reader_(reader) {
  const TraceHeader& header = reader.header();
  if (header.tier != TraceTier::qkv)
    fail("{}: tier: a replay needs q, k and v, expected tier 'qkv', found '{}'", reader.file().string(),
         tier_name(header.tier));
  for (int s = 0; s < reader.n_sequences(); ++s) {
    const TraceSequence sequence = reader.sequence(s);
    int n_tokens = reader.n_steps(s);
    if (max_tokens > 0) n_tokens = std::min(n_tokens, max_tokens);
    if (n_tokens <= 0)
      fail("{}: sequence {}: expected recorded steps, found none", reader.file().string(), s);
    sequences_.push_back(
        {n_tokens, std::min(sequence.n_prompt, n_tokens), sequence.think_begin, sequence.think_end});
  }
}

}  // namespace kvlapse
