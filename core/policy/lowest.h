// The two lowest scores among the slots of a head that may be evicted: the inner loop of every policy that
// evicts at each step. Vectorised; NaN anywhere among the candidates is reported. Thread-safe.
#pragma once

#include <cstdint>
#include <span>

#include "core/base/position.h"
#include "core/base/victim.h"

namespace kvlapse {

// Candidates are the slots whose position lies in [first_free, last_free].
Lowest find_lowest(std::span<const float> scores, std::span<const Pos> positions, int first_free,
                   int last_free, bool last_among_equals);

}  // namespace kvlapse
