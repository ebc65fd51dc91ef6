#include "core/ops/rope.h"

#include <cmath>

namespace kvlapse {

void RopeTable::angles(Pos pos, std::span<float> cos, std::span<float> sin) const {
  for (size_t i = 0; i < inverse_frequencies.size(); ++i) {
    const float angle = inverse_frequencies[i] * static_cast<float>(raw(pos));
    cos[i] = static_cast<float>(std::cos(static_cast<double>(angle))) * attention_factor;
    sin[i] = static_cast<float>(std::sin(static_cast<double>(angle))) * attention_factor;
  }
}

}  // namespace kvlapse
