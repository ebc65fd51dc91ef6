// Rotary position embedding, half-split (Hugging Face's rotate_half): dimension d pairs with d + D/2. Inverse
// frequencies are fp32 and the angle is their fp32 product with the position, as transformers computes it.
#pragma once

#include <span>
#include <vector>

#include "core/base/position.h"

namespace kvlapse {

struct RopeTable {
  std::vector<float> inverse_frequencies;  // [D/2]
  float attention_factor = 1;              // multiplies cos and sin (yarn)
  // cos and sin of one position, [D/2] each.
  void angles(Pos pos, std::span<float> cos, std::span<float> sin) const;
};

}  // namespace kvlapse
