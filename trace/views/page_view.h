// K/V pages that a recorded eviction leaves behind, for a paged cache that keeps rows where they were
// appended: a page of `block_tokens` consecutive positions is free once its last token is gone. Modelled from
// the eviction records.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "trace/views/layer_life.h"

namespace kvlapse {

struct PageTimeline {
  int block_tokens = 16;
  // [n_steps] each, bytes of the layers added so far.
  std::vector<double> logical_bytes;    // K and V of the tokens held
  std::vector<double> head_page_bytes;  // pages with a live token, one block table per kv head
  std::vector<double>
      layer_page_bytes;            // the same with one block table per layer: free when no head needs it
  std::vector<double> full_bytes;  // without any eviction, without pages
};
// Starts at zero for n_steps steps.
PageTimeline empty_page_timeline(int n_steps, int block_tokens);
// Adds a layer; evicted_at [H][n_steps] as in LayerLife.
void add_layer_pages(PageTimeline& timeline, std::span<const int32_t> evicted_at,
                     const CacheGeometry& geometry);

// Live tokens in each page of one kv head after `step`.
std::vector<int> page_fill(std::span<const int32_t> evicted_at, int step, int block_tokens);

}  // namespace kvlapse
