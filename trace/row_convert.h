// fp32 to and from the cache's dtype for rows of q, k, v. The values were rounded to that dtype before, so
// storing them loses nothing. SIMD, chosen at run time; bit for bit the scalar conversions of
// core/base/dtype.h.
#pragma once

#include <cstddef>

#include "core/base/dtype.h"

namespace kvlapse {

// `out` holds n * dtype_bytes(type) bytes. Throws Error for a dtype without a conversion.
// fp32 to an address that is a multiple of kRowAlignment goes past the caches, to which nobody returns for it
// soon: call publish_rows() before another thread reads it.
inline constexpr size_t kRowAlignment = 64;
void store_rows(const float* values, size_t n, DType type, std::byte* out);
void publish_rows();
void load_rows(const std::byte* data, size_t n, DType type, float* out);

}  // namespace kvlapse
