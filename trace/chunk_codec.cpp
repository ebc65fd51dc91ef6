#include "trace/chunk_codec.h"

#include <xxhash.h>
#include <zstd.h>

#include <charconv>
#include <cstring>

#include "core/base/error.h"

namespace kvlapse {
namespace {

constexpr std::string_view kShufflePrefix = "zstd-shuffle";
constexpr int64_t kMostRawBytes = int64_t{1}
                                  << 30;  // no chunk is near this; a damaged row may claim anything
constexpr int kMostElementBytes = 4096;

// The width as a constant lets the compiler vectorise the transposition.
template <int kWidth>
void transpose(const std::byte* in, size_t n, std::byte* out) {
  for (size_t i = 0; i < n; ++i)
    for (int b = 0; b < kWidth; ++b) out[b * n + i] = in[i * kWidth + b];
}
template <int kWidth>
void transpose_back(const std::byte* in, size_t n, std::byte* out) {
  for (size_t i = 0; i < n; ++i)
    for (int b = 0; b < kWidth; ++b) out[i * kWidth + b] = in[b * n + i];
}

int64_t checksum_of(std::span<const std::byte> raw) {
  return static_cast<int64_t>(XXH3_64bits(raw.data(), raw.size()));
}

}  // namespace

void shuffle_bytes(std::span<const std::byte> in, int element_bytes, std::byte* out) {
  const size_t n = in.size() / element_bytes, body = n * element_bytes;
  if (element_bytes == 2) {
    transpose<2>(in.data(), n, out);
  } else if (element_bytes == 4) {
    transpose<4>(in.data(), n, out);
  } else {
    for (int b = 0; b < element_bytes; ++b)
      for (size_t i = 0; i < n; ++i) out[b * n + i] = in[i * element_bytes + b];
  }
  if (body < in.size()) std::memcpy(out + body, in.data() + body, in.size() - body);
}

void unshuffle_bytes(std::span<const std::byte> in, int element_bytes, std::byte* out) {
  const size_t n = in.size() / element_bytes, body = n * element_bytes;
  if (element_bytes == 2) {
    transpose_back<2>(in.data(), n, out);
  } else if (element_bytes == 4) {
    transpose_back<4>(in.data(), n, out);
  } else {
    for (int b = 0; b < element_bytes; ++b)
      for (size_t i = 0; i < n; ++i) out[i * element_bytes + b] = in[b * n + i];
  }
  if (body < in.size()) std::memcpy(out + body, in.data() + body, in.size() - body);
}

struct ChunkEncoder::Context {
  ZSTD_CCtx* zstd = ZSTD_createCCtx();
  int level;
  explicit Context(int zstd_level) : level(zstd_level) {}
  ~Context() { ZSTD_freeCCtx(zstd); }
};

ChunkEncoder::ChunkEncoder(int zstd_level) : context_(std::make_unique<Context>(zstd_level)) {}
ChunkEncoder::~ChunkEncoder() = default;

EncodedChunk ChunkEncoder::encode(std::span<const std::byte> raw, int element_bytes) {
  std::span<const std::byte> input = raw;
  if (element_bytes > 1) {
    shuffled_.resize(raw.size());
    shuffle_bytes(raw, element_bytes, shuffled_.data());
    input = shuffled_;
  }
  EncodedChunk chunk;
  const size_t bound = ZSTD_compressBound(raw.size());
  chunk.buffer = std::make_unique_for_overwrite<std::byte[]>(bound);
  const size_t size = ZSTD_compressCCtx(context_->zstd, chunk.buffer.get(), bound, input.data(), input.size(),
                                        context_->level);
  if (ZSTD_isError(size)) fail("zstd cannot compress {} bytes: {}", raw.size(), ZSTD_getErrorName(size));
  chunk.checksum = checksum_of(raw);
  if (size >= raw.size()) {
    chunk.buffer.reset();
    chunk.encoding = "raw";
    chunk.data = raw;
  } else {
    chunk.encoding = element_bytes > 1 ? fmt::format("{}{}", kShufflePrefix, element_bytes) : "zstd";
    chunk.data = {chunk.buffer.get(), size};
  }
  return chunk;
}

std::vector<std::byte> decode_chunk(std::string_view encoding, int64_t raw_bytes, int64_t checksum,
                                    std::span<const std::byte> data) {
  if (raw_bytes < 0 || raw_bytes > kMostRawBytes)
    fail("raw_bytes: expected 0 to {}, found {}", kMostRawBytes, raw_bytes);
  std::vector<std::byte> raw;
  if (encoding == "raw") {
    if (data.size() != static_cast<size_t>(raw_bytes))
      fail("data: expected {} bytes as raw_bytes says, found {}", raw_bytes, data.size());
    raw.assign(data.begin(), data.end());
  } else {
    int element_bytes = 0;
    if (encoding == "zstd") {
      element_bytes = 1;
    } else if (encoding.starts_with(kShufflePrefix)) {
      std::string_view digits = encoding.substr(kShufflePrefix.size());
      auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), element_bytes);
      if (error != std::errc() || end != digits.data() + digits.size()) element_bytes = 0;
    }
    if (element_bytes < 1 || element_bytes > kMostElementBytes)
      fail("encoding: expected raw, zstd or zstd-shuffleN, found '{}'", encoding);
    // The frame's own size is checked before anything of the claimed size is allocated.
    if (ZSTD_getFrameContentSize(data.data(), data.size()) != static_cast<unsigned long long>(raw_bytes))
      fail("data: expected a zstd frame of {} bytes, found another", raw_bytes);
    thread_local std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> zstd(ZSTD_createDCtx(), ZSTD_freeDCtx);
    std::vector<std::byte> shuffled(static_cast<size_t>(raw_bytes));
    const size_t size =
        ZSTD_decompressDCtx(zstd.get(), shuffled.data(), shuffled.size(), data.data(), data.size());
    if (ZSTD_isError(size)) fail("data: zstd: {}", ZSTD_getErrorName(size));
    if (size != shuffled.size()) fail("data: expected {} decoded bytes, found {}", raw_bytes, size);
    if (element_bytes == 1) {
      raw = std::move(shuffled);
    } else {
      raw.resize(shuffled.size());
      unshuffle_bytes(shuffled, element_bytes, raw.data());
    }
  }
  if (const int64_t found = checksum_of(raw); found != checksum)
    fail("checksum: expected {:016x}, found {:016x}", static_cast<uint64_t>(checksum),
         static_cast<uint64_t>(found));
  return raw;
}

}  // namespace kvlapse
