#include "trace/views/page_view.h"

#include <algorithm>

namespace kvlapse {
namespace {

// Adds `bytes` for the steps [begin, end) to a row of differences.
void add_span(std::vector<double>& slope, int begin, int64_t end, double bytes) {
  slope[static_cast<size_t>(begin)] += bytes;
  if (end < static_cast<int64_t>(slope.size())) slope[static_cast<size_t>(end)] -= bytes;
}

void add_sums(const std::vector<double>& slope, std::vector<double>& out) {
  double sum = 0;
  for (size_t i = 0; i < out.size(); ++i) out[i] += sum += slope[i];
}

}  // namespace

PageTimeline empty_page_timeline(int n_steps, int block_tokens) {
  PageTimeline timeline;
  timeline.block_tokens = block_tokens;
  for (auto* column :
       {&timeline.logical_bytes, &timeline.head_page_bytes, &timeline.layer_page_bytes, &timeline.full_bytes})
    column->assign(static_cast<size_t>(n_steps), 0);
  return timeline;
}

void add_layer_pages(PageTimeline& timeline, std::span<const int32_t> evicted_at,
                     const CacheGeometry& geometry) {
  const int n = static_cast<int>(timeline.logical_bytes.size()), n_heads = geometry.n_kv_heads;
  const double token = static_cast<double>(geometry.head_token_bytes());
  const double head_page = token * timeline.block_tokens, layer_page = head_page * n_heads;
  const size_t columns = timeline.logical_bytes.size();
  std::vector<double> logical(columns, 0), head_pages(columns, 0), layer_pages(columns, 0), full(columns, 0);
  for (int first = 0; first < n; first += timeline.block_tokens) {
    const int end = std::min(first + timeline.block_tokens, n);
    int64_t layer_last = 0;
    for (int head = 0; head < n_heads; ++head) {
      int64_t last = 0;
      for (int pos = first; pos < end; ++pos) {
        const int64_t gone = static_cast<int64_t>(evicted_at[static_cast<size_t>(head) * n + pos]) + 1;
        add_span(logical, pos, gone, token);
        last = std::max(last, gone);
      }
      add_span(head_pages, first, last, head_page);
      layer_last = std::max(layer_last, last);
    }
    add_span(layer_pages, first, layer_last, layer_page);
    for (int pos = first; pos < end; ++pos) add_span(full, pos, n, token * n_heads);
  }
  add_sums(logical, timeline.logical_bytes);
  add_sums(head_pages, timeline.head_page_bytes);
  add_sums(layer_pages, timeline.layer_page_bytes);
  add_sums(full, timeline.full_bytes);
}

std::vector<int> page_fill(std::span<const int32_t> evicted_at, int step, int block_tokens) {
  const int n = std::min(step + 1, static_cast<int>(evicted_at.size()));
  std::vector<int> live(static_cast<size_t>((n + block_tokens - 1) / block_tokens), 0);
  for (int pos = 0; pos < n; ++pos)
    live[static_cast<size_t>(pos / block_tokens)] += evicted_at[static_cast<size_t>(pos)] > step ? 1 : 0;
  return live;
}

}  // namespace kvlapse
