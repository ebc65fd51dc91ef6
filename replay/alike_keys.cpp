#include "replay/alike_keys.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "core/policy/scoring/redundancy.h"
#include "replay/dense_kernels.h"

namespace kvlapse {
namespace {

constexpr size_t kWord = 32;

constexpr size_t kTogether = 8;  // pairs of words that are looked at together

// Of a row of bits.
size_t words_of(int n_tokens) {
  constexpr size_t kStep = 2 * kTogether;
  return (static_cast<size_t>(n_tokens) + kStep * kWord - 1) / (kStep * kWord) * kStep;
}

// Rows of 32 words become columns: bit j of word i and bit i of word j change places.
void transpose(uint32_t (&words)[kWord]) {
  uint32_t mask = 0x0000ffff;
  for (size_t width = 16; width > 0; width /= 2, mask ^= mask << width)
    for (size_t i = 0; i < kWord; i = (i + width + 1) & ~width) {
      const uint32_t moved = (words[i] >> width ^ words[i + width]) & mask;
      words[i] ^= moved << width;
      words[i + width] ^= moved;
    }
}

}  // namespace

size_t AlikeKeys::memory_bytes(const CacheGeometry& g, int n_tokens) {
  const size_t stride = words_of(n_tokens) * kWord;
  return static_cast<size_t>(g.n_kv_heads) *
         (static_cast<size_t>(n_tokens) * words_of(n_tokens) * sizeof(uint32_t) +
          (static_cast<size_t>(g.head_dim) + kBlock) * (stride + kWord) * sizeof(float));
}

AlikeKeys::AlikeKeys(const CacheGeometry& g, int n_tokens, float threshold)
    : n_tokens_(static_cast<size_t>(n_tokens)),
      dim_(static_cast<size_t>(g.head_dim)),
      n_words_(words_of(n_tokens)),
      stride_(n_words_ * kWord + 16),  // the odd 16 keep rows out of one cache set
      threshold_(threshold),
      unit_(static_cast<size_t>(g.n_kv_heads) * kBlock * dim_),
      unit_t_(static_cast<size_t>(g.n_kv_heads) * dim_ * stride_),
      cosines_(static_cast<size_t>(g.n_kv_heads) * kBlock * stride_),
      bits_(static_cast<size_t>(g.n_kv_heads) * n_tokens_ * n_words_) {}

void AlikeKeys::set_key(int h, int pos, const float* key) {
  float* unit = unit_.data() + (static_cast<size_t>(h) * kBlock + static_cast<size_t>(pos % kBlock)) * dim_;
  unit_key({key, dim_}, unit);
  float* column = unit_t_.data() + static_cast<size_t>(h) * dim_ * stride_ + static_cast<size_t>(pos);
  for (size_t d = 0; d < dim_; ++d) column[d * stride_] = unit[d];
}

void AlikeKeys::compare(int h, int begin, int end) {
  const size_t block = static_cast<size_t>(begin / kBlock), n_rows = static_cast<size_t>(end - begin);
  const size_t n_keys = (block + 1) * kWord;
  float* cosines = cosines_.data() + static_cast<size_t>(h) * kBlock * stride_;
  dense::logits_block(
      unit_t_.data() + static_cast<size_t>(h) * dim_ * stride_, stride_, dim_,
      unit_.data() + (static_cast<size_t>(h) * kBlock + static_cast<size_t>(begin % kBlock)) * dim_, dim_,
      n_rows, n_keys, 1.0f, cosines, stride_);
  dense::above_bits(cosines, stride_, n_rows, n_keys, threshold_, row(h, begin), n_words_);
  for (int pos = begin; pos < end; ++pos)
    row(h, pos)[block] &= ~(uint32_t{1} << (pos % kBlock)) & (~uint32_t{0} >> (kBlock - 1 - pos % kBlock));
  // The other triangle.
  const int first = begin % kBlock;
  for (size_t w = 0; w <= block; ++w) {
    uint32_t words[kWord] = {};
    for (size_t r = 0; r < n_rows; ++r)
      words[static_cast<size_t>(first) + r] = row(h, begin)[r * n_words_ + w];
    transpose(words);
    const size_t most = std::min(kWord, n_tokens_ - w * kWord);
    for (size_t i = 0; i < most; ++i) row(h, static_cast<int>(w * kWord + i))[block] |= words[i];
  }
}

// From the last slot on: its alike tokens that have no answer yet get this one. Both triangles are there, so
// one row answers for all of them.
void AlikeKeys::last_alike(int h, std::span<const Pos> slots, std::span<int32_t> out) const {
  thread_local std::vector<uint64_t> open;  // held tokens without an answer, bits by position
  thread_local std::vector<int32_t> slot_of;
  const auto n = static_cast<int>(slots.size());
  open.assign(n_words_ / 2, 0);
  slot_of.resize(n_tokens_);
  for (int s = 0; s < n; ++s) {
    const auto pos = static_cast<size_t>(raw(slots[s]));
    open[pos / 64] |= uint64_t{1} << (pos % 64);
    slot_of[pos] = s;
    out[s] = -1;
  }
  int left = n;
  for (int j = n - 1; j >= 0 && left > 0; --j) {
    const uint32_t* alike = row(h, raw(slots[j]));
    for (size_t block = 0; block < open.size(); block += kTogether) {
      uint64_t hits[kTogether], any = 0;
      std::memcpy(hits, alike + 2 * block, sizeof(hits));
      for (size_t i = 0; i < kTogether; ++i) any |= hits[i] &= open[block + i];
      if (any == 0) continue;
      for (size_t i = 0; i < kTogether; ++i) {
        open[block + i] ^= hits[i];
        for (uint64_t bits = hits[i]; bits != 0; bits &= bits - 1, --left)
          out[slot_of[(block + i) * 64 + static_cast<size_t>(std::countr_zero(bits))]] = j;
      }
    }
  }
}

}  // namespace kvlapse
