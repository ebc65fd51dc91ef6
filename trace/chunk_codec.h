// How the blob of a KV_CHUNK row becomes bytes and back: zstd, for records after a byte shuffle (byte b of
// every element together), with an XXH3 checksum of the decoded bytes. Formats: trace/FORMAT.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kvlapse {

struct EncodedChunk {
  std::string encoding;  // "raw", "zstd" or "zstd-shuffleN"
  int64_t checksum = 0;
  std::unique_ptr<std::byte[]> buffer;
  std::span<const std::byte> data;  // in `buffer`; of "raw" the argument of encode
};

// One per thread that encodes; equal arguments give equal bytes from any of them.
class ChunkEncoder {
 public:
  explicit ChunkEncoder(int zstd_level);
  ~ChunkEncoder();
  ChunkEncoder(const ChunkEncoder&) = delete;
  ChunkEncoder& operator=(const ChunkEncoder&) = delete;
  // `element_bytes` is the width of the shuffle; 1: none.
  EncodedChunk encode(std::span<const std::byte> raw, int element_bytes);

 private:
  struct Context;
  std::unique_ptr<Context> context_;
  std::vector<std::byte> shuffled_;
};

// Throws Error (without file or chunk: the caller knows them) when the data cannot be what was written.
// Thread-safe.
std::vector<std::byte> decode_chunk(std::string_view encoding, int64_t raw_bytes, int64_t checksum,
                                    std::span<const std::byte> data);

// out[b * n + i] = in[i * element_bytes + b], n = elements; the rest that fills no element is copied behind.
void shuffle_bytes(std::span<const std::byte> in, int element_bytes, std::byte* out);
void unshuffle_bytes(std::span<const std::byte> in, int element_bytes, std::byte* out);

}  // namespace kvlapse
