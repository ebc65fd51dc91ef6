// ValueTile: what a tile of consecutive tokens adds to the attention of one kv head in one block of metrics,
// in pieces that configurations share. Where a configuration holds every token of a chunk it adds one
// finished sum instead of a row for each token. The tiles of a block, in ascending order, also give the full
// cache's output. The split depends on positions alone, so what a configuration adds up does not depend on
// the others. One per thread of work.
//
// A sum is [columns][D] of weight x value, followed by [columns] of weights; columns as in SharedLayer.
#pragma once

#include <span>
#include <vector>

#include "replay/shared_layer.h"

namespace kvlapse {

class ValueTile {
 public:
  static constexpr int kTokens = 512;  // of a tile; its weights and values fit into a core's cache
  static constexpr int kChunk = 16;
  static constexpr int kSpan = 128;

  // Starts a block: the one that `shared` holds.
  void begin(const SharedLayer& shared, int kv_head);
  // The next tile, [first, end); first is a multiple of kTokens.
  void load(int first, int end);

  int first() const { return first_; }
  int end() const { return end_; }
  // Adds to sum_size() numbers: tokens of this tile one by one, finished spans and chunks (by first token /
  // their size).
  void add(std::span<const int32_t> tokens, std::span<const int32_t> spans, std::span<const int32_t> chunks,
           float* sum) const;
  size_t sum_size() const { return columns_ * (dim_ + 1); }

  // After the last tile: [columns][D] outputs of the full cache (rows of steps that the block lacks are zero)
  // and their squared norms [columns].
  void finish();
  const float* output(size_t column) const { return totals_.data() + column * dim_; }
  float output_norm2(size_t column) const { return norms_[column]; }

  static size_t memory_bytes(const CacheGeometry& geometry);

 private:
  void add_rows(const int32_t* tokens, size_t first, size_t n, float* sum) const;

  const SharedLayer* shared_ = nullptr;
  int kv_head_ = 0, first_ = 0, end_ = 0;
  size_t columns_ = 0, dim_ = 0;
  const float *weights_ = nullptr, *values_ = nullptr;
  std::vector<float> chunks_, spans_, totals_, norms_;
};

}  // namespace kvlapse
