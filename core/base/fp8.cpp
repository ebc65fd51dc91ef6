#include "core/base/fp8.h"

#include <algorithm>
#include <cmath>

namespace kvlapse {

float quantise_fp8_row(std::span<const float> row, uint8_t* out) {
  float largest = 0;
  for (float v : row) largest = std::max(largest, std::fabs(v));
  const Fp8Scale s = fp8_scale(largest);
  for (size_t i = 0; i < row.size(); ++i) out[i] = f32_to_e4m3(row[i] * s.inverse);
  return s.scale;
}

}  // namespace kvlapse
