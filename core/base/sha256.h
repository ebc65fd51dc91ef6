// SHA-256 of a byte string (FIPS 180-4), for identities that files of others carry: golden data, model files.
// Our own checksums are xxHash. About 300 MB/s. Thread-safe.
#pragma once

#include <cstddef>
#include <span>
#include <string>

namespace kvlapse {

// 64 lower-case hexadecimal digits.
std::string sha256_hex(std::span<const std::byte> bytes);

}  // namespace kvlapse
