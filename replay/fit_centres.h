// Fits QueryCentres on recordings: the mean of each head's queries with their rotation undone, over all
// tokens.
#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "core/policy/query_centres.h"
#include "trace/trace_reader.h"

namespace kvlapse {

// Identity of what a sequence says, whatever cache it was recorded with; empty when its token ids are not
// known.
std::string token_hash(const TraceSequence& sequence);

// Of recordings of one model with q, k, v of every layer. `progress`: share done; false stops (Interrupted).
// Throws Error: another model, no RoPE base, layers missing.
QueryCentres fit_centres(const std::vector<std::filesystem::path>& traces,
                         const std::function<bool(double)>& progress = {});

}  // namespace kvlapse
