// AlikeKeys: which tokens of one (sequence, layer) have keys whose cosine exceeds a threshold, as bits, for
// all configurations that search for similar keys (R-KV, G-KV). Made block by block as a replay goes on;
// reading is thread-safe between blocks.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/base/position.h"
#include "core/cache/geometry.h"

namespace kvlapse {

class AlikeKeys {
 public:
  static constexpr int kBlock = 32;  // tokens that are added together
  static constexpr size_t kMostBytes = size_t{64} << 20;

  // Bytes of one instance; above kMostBytes it is better to search.
  static size_t memory_bytes(const CacheGeometry& geometry, int n_tokens);

  AlikeKeys(const CacheGeometry& geometry, int n_tokens, float threshold);

  float threshold() const { return threshold_; }
  // The next tokens, at most to the end of their block. keys(h, pos): [D]. Heads are independent: one thread
  // each.
  template <typename Keys>
  void add(int kv_head, int begin, int end, Keys&& key) {
    for (int pos = begin; pos < end; ++pos) set_key(kv_head, pos, key(pos));
    compare(kv_head, begin, end);
  }
  // out[i]: the last slot j != i whose token is alike to that of slot i, -1: none. All were added.
  void last_alike(int kv_head, std::span<const Pos> slots, std::span<int32_t> out) const;

 private:
  void set_key(int kv_head, int pos, const float* key);
  void compare(int kv_head, int begin, int end);
  uint32_t* row(int kv_head, int pos) {
    return bits_.data() + (static_cast<size_t>(kv_head) * n_tokens_ + static_cast<size_t>(pos)) * n_words_;
  }
  const uint32_t* row(int kv_head, int pos) const { return const_cast<AlikeKeys*>(this)->row(kv_head, pos); }

  size_t n_tokens_, dim_, n_words_, stride_;
  float threshold_;
  std::vector<float> unit_, unit_t_;  // [H, kBlock, D] of the newest tokens; [H, D, stride] of all
  std::vector<float> cosines_;        // [H, kBlock, stride]
  std::vector<uint32_t> bits_;        // [H, T, T / 32], both triangles, the diagonal clear
};

}  // namespace kvlapse
