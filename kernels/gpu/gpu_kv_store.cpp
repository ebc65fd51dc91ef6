#include "kernels/gpu/gpu_kv_store.h"

#include <algorithm>
#include <cassert>
#include <cstring>
#include <limits>

#include "core/base/row_math.h"
#include "core/policy/scoring/redundancy.h"
#include "kernels/cpu/activations.h"
#include "kernels/gpu/gpu_backend.h"

namespace kvlapse {

GpuKvStore::GpuKvStore(GpuBackend& backend, DeviceApi& api, const CacheGeometry& g, int query_window)
    : backend_(backend), api_(api), geometry_(g), query_window_(query_window) {
  const auto slots = static_cast<size_t>(g.n_slots), head_slots = slots * g.n_kv_heads;
  const size_t width = static_cast<size_t>(g.n_q_heads) * g.head_dim, stride = (slots + 15) / 16 * 16;
  const size_t chunks = (slots + exact::kChunkSlots - 1) / exact::kChunkSlots;
  auto lay_out = [&](std::byte* base) {
    size_t used = 0;
    auto take = [&](size_t bytes) {
      std::byte* at = base + used;
      used += (bytes + 255) / 256 * 256;
      return at;
    };
    auto floats = [&](size_t n) { return reinterpret_cast<float*>(take(n * sizeof(float))); };
    view_.k = take(g.layer_plane_bytes());
    view_.v = take(g.layer_plane_bytes());
    view_.value_l1 = floats(head_slots);
    view_.positions = reinterpret_cast<int32_t*>(floats(head_slots));
    view_.logits = floats(stride * g.n_q_heads);
    view_.weights = floats(stride * g.n_q_heads);
    view_.partials = floats(chunks * width);
    view_.output = floats(width);
    view_.query = floats(width);
    view_.ring = floats(static_cast<size_t>(query_window) * width);
    return used;
  };
  alignas(256) static std::byte nowhere;
  memory_ = DeviceArray<std::byte>(api, lay_out(&nowhere));
  lay_out(memory_.data());
  view_.n_slots = g.n_slots;
  view_.stride = static_cast<int32_t>(stride);
}

void GpuKvStore::store(const SlotTable& table, const float* q, const float*, const float*) {
  backend_.place(*this, table, q);
  ++n_stored_;
  value_l1_.fresh = false;
  keys_change();
}

void GpuKvStore::attended(std::vector<Lowest> lowest) {
  logits_.fresh = weights_.fresh = output_.fresh = false;
  keys_change();
  lowest_ = std::move(lowest);
}

void GpuKvStore::compact(int kv_head, std::span<const Slot> order) {
  static_assert(sizeof(Slot) == sizeof(int32_t));
  if (order.empty()) return;
  backend_.place_pending();
  const auto slots = static_cast<size_t>(geometry_.n_slots);
  const size_t row_bytes = geometry_.row_bytes(), n = order.size();
  auto words = [](void* p) { return static_cast<uint32_t*>(p); };
  const size_t order_bytes = (n * sizeof(int32_t) + 255) / 256 * 256;
  std::byte* memory = backend_.scratch(order_bytes + n * (2 * row_bytes + 8));
  api_.upload(memory, order.data(), n * sizeof(int32_t));
  exact::GatherArgs args{};
  args.n = static_cast<int32_t>(n);
  args.order = reinterpret_cast<const int32_t*>(memory);
  const auto at = static_cast<size_t>(kv_head) * slots;
  uint32_t* const rows[4] = {words(view_.k) + at * row_bytes / 4, words(view_.v) + at * row_bytes / 4,
                             words(view_.value_l1) + at, words(view_.positions) + at};
  uint32_t* moved = words(memory + order_bytes);
  for (int p = 0; p < 4; ++p) {
    args.words[p] = p < 2 ? static_cast<int32_t>(row_bytes / 4) : 1;
    args.from[p] = rows[p];
    args.to[p] = moved;
    moved += n * static_cast<size_t>(args.words[p]);
  }
  api_.launch(args);
  for (int p = 0; p < 4; ++p) {
    args.from[p] = args.to[p];
    args.to[p] = rows[p];
  }
  args.order = nullptr;
  api_.launch(args);
  value_l1_.fresh = false;
  keys_change();
}

void GpuKvStore::replace_key(int kv_head, Slot slot, const float* row) {
  backend_.place_pending();
  raw_.resize(std::max(raw_.size(), static_cast<size_t>(geometry_.row_bytes())));
  keys_change();
  narrow(geometry_.dtype, row, static_cast<size_t>(geometry_.head_dim), raw_.data());
  api_.upload(static_cast<std::byte*>(view_.k) + geometry_.row_offset_bytes(kv_head, slot), raw_.data(),
              geometry_.row_bytes());
}

std::span<const float> GpuKvStore::mirror(Mirror& mirror, const float* device, size_t n) {
  if (!mirror.fresh) {
    backend_.place_pending();
    mirror.values.resize(n);
    api_.download(mirror.values.data(), device, n * sizeof(float));
    mirror.fresh = true;
  }
  return mirror.values;
}

std::span<const float> GpuKvStore::logits(int q_head, int n) {
  const auto stride = static_cast<size_t>(view_.stride);
  return mirror(logits_, view_.logits, stride * geometry_.n_q_heads).subspan(stride * q_head, n);
}
std::span<const float> GpuKvStore::attention(int q_head, int n) {
  const auto stride = static_cast<size_t>(view_.stride);
  return mirror(weights_, view_.weights, stride * geometry_.n_q_heads).subspan(stride * q_head, n);
}
std::span<const float> GpuKvStore::output(int q_head) {
  const auto dim = static_cast<size_t>(geometry_.head_dim);
  return mirror(output_, view_.output, dim * geometry_.n_q_heads).subspan(dim * q_head, dim);
}
std::span<const float> GpuKvStore::value_l1(int kv_head, int n) {
  const auto slots = static_cast<size_t>(geometry_.n_slots);
  return mirror(value_l1_, view_.value_l1, slots * geometry_.n_kv_heads).subspan(slots * kv_head, n);
}

std::span<const float> GpuKvStore::plane_rows(const void* plane, std::vector<float>& out, int kv_head,
                                              int first, int n) {
  backend_.place_pending();
  const size_t count = static_cast<size_t>(n) * geometry_.head_dim, bytes = n * geometry_.row_bytes();
  const auto* from = static_cast<const std::byte*>(plane) + geometry_.row_offset_bytes(kv_head, Slot{first});
  out.resize(std::max(out.size(), count));
  if (geometry_.dtype == DType::f32) {
    api_.download(out.data(), from, bytes);
  } else {
    raw_.resize(std::max(raw_.size(), bytes));
    api_.download(raw_.data(), from, bytes);
    widen(geometry_.dtype, raw_.data(), count, out.data());
  }
  return {out.data(), count};
}

// The newest min(w, stored) queries, oldest first, [rows, Hq, D].
std::span<const float> GpuKvStore::ring_rows(int w) {
  assert(w <= query_window_);
  backend_.place_pending();
  const size_t width = static_cast<size_t>(geometry_.n_q_heads) * geometry_.head_dim;
  const auto rows = std::min<int64_t>(w, n_stored_);
  raw_.resize(std::max(raw_.size(), query_window_ * width * sizeof(float)));
  api_.download(raw_.data(), view_.ring, query_window_ * width * sizeof(float));
  const auto* all = reinterpret_cast<const float*>(raw_.data());
  ring_.resize(rows * width);
  for (int64_t r = 0; r < rows; ++r)
    std::copy_n(all + (n_stored_ - rows + r) % query_window_ * width, width, ring_.begin() + r * width);
  return ring_;
}

std::span<const float> GpuKvStore::window_queries(int w) {
  return ring_rows(w);
}

std::span<const float> GpuKvStore::window_logits(const SlotTable& table, int q_head, int w) {
  assert(w <= query_window_);
  const auto rows = static_cast<int>(std::min<int64_t>(w, n_stored_));
  const auto stride = static_cast<size_t>(view_.stride), n_q = static_cast<size_t>(geometry_.n_q_heads);
  const auto n_kv = static_cast<size_t>(geometry_.n_kv_heads);
  if (!window_block_.fresh || window_rows_ != rows) {
    backend_.place_pending();
    // Every query of the window as a row of its own, over the same keys.
    const size_t sites_bytes = (static_cast<size_t>(rows) * sizeof(exact::SiteView) + 255) / 256 * 256;
    const size_t counts_bytes = (static_cast<size_t>(rows) * n_kv * sizeof(int32_t) + 255) / 256 * 256;
    const size_t block = static_cast<size_t>(rows) * n_q * stride;
    std::byte* memory = backend_.scratch(sites_bytes + counts_bytes + block * sizeof(float));
    auto* block_memory = reinterpret_cast<float*>(memory + sites_bytes + counts_bytes);
    std::vector<exact::SiteView> sites(static_cast<size_t>(rows), view_);
    std::vector<int32_t> counts;
    exact::LogitsArgs args{};
    for (int r = 0; r < rows; ++r) {
      sites[r].query = view_.ring + (n_stored_ - rows + r) % query_window_ * static_cast<int64_t>(n_q) *
                                        geometry_.head_dim;
      sites[r].logits = block_memory + static_cast<size_t>(r) * n_q * stride;
      for (int h = 0; h < geometry_.n_kv_heads; ++h) {
        counts.push_back(table.count(h));
        args.most = std::max(args.most, counts.back());
      }
    }
    api_.upload(memory, sites.data(), sites.size() * sizeof(exact::SiteView));
    api_.upload(memory + sites_bytes, counts.data(), counts.size() * sizeof(int32_t));
    args.sites = reinterpret_cast<const exact::SiteView*>(memory);
    args.counts = reinterpret_cast<const int32_t*>(memory + sites_bytes);
    args.heads = heads();
    args.n_rows = rows;
    args.factor = attention_scale(geometry_.head_dim);
    api_.launch(args);
    window_block_.values.resize(block);
    api_.download(window_block_.values.data(), block_memory, block * sizeof(float));
    window_block_.fresh = true;
    window_rows_ = rows;
  }
  const int h = geometry_.kv_head_of(q_head);
  const auto n = static_cast<size_t>(table.count(h));
  window_.resize(std::max(window_.size(), static_cast<size_t>(rows) * n));
  // Tokens are stored in order of position, so the r-th query's position is known.
  const std::span<const Pos> positions = table.positions(h);
  for (int r = 0; r < rows; ++r) {
    const float* from = window_block_.values.data() + (static_cast<size_t>(r) * n_q + q_head) * stride;
    for (size_t s = 0; s < n; ++s)
      window_[r * n + s] =
          raw(positions[s]) > n_stored_ - (rows - r) ? -std::numeric_limits<float>::infinity() : from[s];
  }
  return {window_.data(), static_cast<size_t>(rows) * n};
}

bool GpuKvStore::redundancy(const SlotTable& table, int kv_head, float threshold, std::span<float> out) {
  const auto n_kv = static_cast<size_t>(geometry_.n_kv_heads), dim = static_cast<size_t>(geometry_.head_dim);
  if (!redundancy_.fresh || redundancy_threshold_ != threshold) {
    backend_.place_pending();
    std::vector<int32_t> counts;
    for (int h = 0; h < geometry_.n_kv_heads; ++h) counts.push_back(table.count(h));
    const int most = *std::ranges::max_element(counts);
    const size_t plane = n_kv * static_cast<size_t>(most);
    const size_t counts_bytes = (n_kv * sizeof(int32_t) + 255) / 256 * 256;
    std::byte* memory = backend_.scratch(counts_bytes + (plane * (dim + 4) + n_kv * dim) * sizeof(float));
    auto* kept = reinterpret_cast<float*>(memory + counts_bytes);
    float* unit = kept + 4 * plane;
    float* mean = unit + plane * dim;
    const auto* on_device = reinterpret_cast<const int32_t*>(memory);
    api_.upload(memory, counts.data(), counts.size() * sizeof(int32_t));
    api_.launch(exact::UnitKeysArgs{view_.k, on_device, unit, kept, heads(), geometry_.n_slots, most});
    api_.launch(exact::MeanKeyArgs{unit, on_device, mean, heads(), most});
    api_.launch(exact::SimilarKeyArgs{unit, mean, on_device, kept + plane,
                                      reinterpret_cast<int32_t*>(kept + 2 * plane), kept + 3 * plane, heads(),
                                      most, threshold});
    redundancy_.values.resize(4 * plane);
    api_.download(redundancy_.values.data(), kept, 4 * plane * sizeof(float));
    redundancy_.fresh = true;
    redundancy_most_ = most;
    redundancy_threshold_ = threshold;
  }
  const size_t plane = n_kv * static_cast<size_t>(redundancy_most_), n = out.size();
  const float* own = redundancy_.values.data() + static_cast<size_t>(kv_head) * redundancy_most_;
  std::copy_n(own + plane, n, out.begin());
  std::vector<int32_t> similar(n);
  std::memcpy(similar.data(), own + 2 * plane, n * sizeof(int32_t));
  forgive({own, n}, similar, {own + 3 * plane, n}, out);
  return true;
}

}  // namespace kvlapse
