// fp32 to and from the cache's dtype for rows of q, k, v. The values were rounded to that dtype before, so
// storing them loses nothing. SIMD, chosen at run time; bit for bit the scalar conversions of
// core/base/dtype.h.
#pragma once

#include <cstddef>

#include "core/base/dtype.h"

namespace kvlapse {

// `out` holds n * dtype_bytes(type) bytes. Throws Error for a dtype without a conversion.
void store_rows(const float* values, size_t n, DType type, std::byte* out);
void load_rows(const std::byte* data, size_t n, DType type, float* out);

}  // namespace kvlapse
