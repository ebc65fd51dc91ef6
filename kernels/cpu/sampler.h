// Choice of the next token from one row of logits. Pure and thread-safe; deterministic given the row's random
// bits.
#pragma once

#include <span>
#include <vector>

#include "core/ops/backend.h"

namespace kvlapse {

// `scratch` is grown as needed. Temperature, then top-k, then top-p, as transformers orders them; among equal
// logits the lower id comes first.
SampleResult sample_token(std::span<const float> logits, const SampleRow& row, std::vector<float>& scratch);

}  // namespace kvlapse
