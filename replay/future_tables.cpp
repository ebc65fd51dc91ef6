#include "replay/future_tables.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/base/vector_math.h"

namespace kvlapse {
namespace {

constexpr size_t kKeptBytes = size_t{64} << 20;  // of rows of one window

SharedLayerNeeds stream_needs(bool errors) {
  SharedLayerNeeds needs;
  needs.metrics = false;
  needs.outputs = errors;
  return needs;
}

}  // namespace

// For steps in ascending order: [H][T] mean over the group of the attention weights, or of a / (1 - a) |o -
// v|.
class FutureTables::Stream {
 public:
  Stream(const RowSource& source, int sequence, int layer, bool errors)
      : shared_(source, sequence, layer, stream_needs(errors)), errors_(errors) {
    const CacheGeometry& g = shared_.geometry();
    const auto dim = static_cast<size_t>(g.head_dim);
    row_.resize(static_cast<size_t>(g.n_kv_heads) * shared_.sequence().n_tokens);
    if (!errors) return;
    norms_.resize(row_.size());
    for (int h = 0; h < g.n_kv_heads; ++h)
      for (int i = 0; i < shared_.sequence().n_tokens; ++i)
        norms_[static_cast<size_t>(h) * shared_.sequence().n_tokens + i] =
            dot(shared_.value(h, i), shared_.value(h, i), dim);
  }

  // Only positions up to `step` are set.
  const std::vector<float>& row(int step) {
    const int n_tokens = shared_.sequence().n_tokens;
    if (step >= shared_.end()) {
      const int begin = step / kMetricSteps * kMetricSteps;
      shared_.load(begin, std::min(n_tokens, begin + kMetricSteps));
    }
    const CacheGeometry& g = shared_.geometry();
    const int group = g.group();
    const auto dim = static_cast<size_t>(g.head_dim);
    for (int h = 0; h < g.n_kv_heads; ++h) {
      float* out = row_.data() + static_cast<size_t>(h) * n_tokens;
      std::fill_n(out, step + 1, 0.0f);
      for (int j = 0; j < group; ++j) {
        const int q = h * group + j;
        const float* e = shared_.exps(q, step);
        const float inverse = 1.0f / shared_.row(q, step).total, share = 1.0f / static_cast<float>(group);
        if (!errors_) {
          for (int i = 0; i <= step; ++i) out[i] += e[i] * inverse * share;
          continue;
        }
        for (int i = 0; i <= step; ++i) {
          const float weight = e[i] * inverse;
          const float oo = shared_.row(q, step).output_norm2,
                      vv = norms_[static_cast<size_t>(h) * n_tokens + i];
          const float square = oo + vv - 2 * dot(shared_.output(q, step), shared_.value(h, i), dim);
          out[i] += share * weight / std::max(1.0f - weight, 1e-7f) * std::sqrt(std::max(square, 0.0f));
        }
      }
    }
    return row_;
  }

 private:
  SharedLayer shared_;
  bool errors_;
  std::vector<float> row_, norms_;
};

class FutureTables::Window {
 public:
  Window(const FutureTables& owner, bool errors, int horizon)
      : n_tokens_(owner.n_tokens_),
        horizon_(horizon > 0 ? horizon : owner.n_tokens_),
        width_(static_cast<size_t>(owner.geometry_.n_kv_heads) * n_tokens_),
        lead_(owner.source_, owner.sequence_, owner.layer_, errors),
        ahead_(width_),
        behind_(width_),
        sums_(static_cast<size_t>(kMetricSteps) * width_) {
    const size_t rows = static_cast<size_t>(std::min(horizon_, n_tokens_)) + 1;
    if (rows * width_ * sizeof(float) <= kKeptBytes) {
      kept_.resize(rows * width_);
    } else {
      lag_ = std::make_unique<Stream>(owner.source_, owner.sequence_, owner.layer_, errors);
    }
  }

  // Sums of kv head h by position, over the steps (step, step + horizon].
  const float* sums(int h, int step) {
    const std::lock_guard lock(mutex_);
    while (step >= end_) advance();
    return sums_.data() + static_cast<size_t>(step % kMetricSteps) * width_ +
           static_cast<size_t>(h) * n_tokens_;
  }

 private:
  static void add(std::vector<double>& to, const float* row, int step, int n_tokens) {
    const size_t heads = to.size() / static_cast<size_t>(n_tokens);
    for (size_t h = 0; h < heads; ++h)
      for (size_t i = h * n_tokens; i <= h * n_tokens + static_cast<size_t>(step); ++i) to[i] += row[i];
  }
  // The next block of steps.
  void advance() {
    const int begin = end_;
    end_ = std::min(n_tokens_, begin + kMetricSteps);
    for (int t = begin; t < end_; ++t) {
      for (; lead_next_ < n_tokens_ && lead_next_ <= t + horizon_; ++lead_next_) {
        const std::vector<float>& row = lead_.row(lead_next_);
        add(ahead_, row.data(), lead_next_, n_tokens_);
        if (!lag_) std::ranges::copy(row, kept(lead_next_));
      }
      add(behind_, lag_ ? lag_->row(t).data() : kept(t), t, n_tokens_);
      float* out = sums_.data() + static_cast<size_t>(t % kMetricSteps) * width_;
      for (size_t h = 0; h < width_; h += static_cast<size_t>(n_tokens_))
        for (size_t i = h; i <= h + static_cast<size_t>(t); ++i)
          out[i] = static_cast<float>(ahead_[i] - behind_[i]);
    }
  }
  float* kept(int step) {
    return kept_.data() + static_cast<size_t>(step) % (kept_.size() / width_) * width_;
  }

  int n_tokens_, horizon_;
  size_t width_;
  Stream lead_;
  std::unique_ptr<Stream> lag_;  // where the rows between the two are too many to keep: made again
  std::vector<float> kept_;      // otherwise: those rows, a ring
  int lead_next_ = 0, end_ = 0;
  std::vector<double> ahead_, behind_;  // [H][T] sums over steps up to the lead's and the lag's
  std::vector<float> sums_;             // [kMetricSteps][H][T]
  std::mutex mutex_;
};

struct FutureTables::Blocks {
  Blocks(const FutureTables& owner, int block)
      : n_blocks((owner.n_tokens_ + block - 1) / block),
        width(static_cast<size_t>(owner.geometry_.n_kv_heads) * owner.n_tokens_) {
    means.resize(static_cast<size_t>(n_blocks) * width);
    Stream stream(owner.source_, owner.sequence_, owner.layer_, false);
    for (int t = 0; t < owner.n_tokens_; ++t) {
      const std::vector<float>& row = stream.row(t);
      float* out = means.data() + static_cast<size_t>(t / block) * width;
      for (int h = 0; h < owner.geometry_.n_kv_heads; ++h)
        for (int i = 0; i <= t; ++i) {
          const size_t at = static_cast<size_t>(h) * owner.n_tokens_ + i;
          out[at] += row[at] / static_cast<float>(block);
        }
    }
  }
  int n_blocks;
  size_t width;
  std::vector<float> means;  // [n_blocks][H][T]
};

struct FutureTables::Uses {
  Uses(const FutureTables& owner, float threshold)
      : steps(static_cast<size_t>(owner.geometry_.n_kv_heads) * owner.n_tokens_) {
    Stream stream(owner.source_, owner.sequence_, owner.layer_, false);
    for (int t = 0; t < owner.n_tokens_; ++t) {
      const std::vector<float>& row = stream.row(t);
      for (int h = 0; h < owner.geometry_.n_kv_heads; ++h)
        for (int i = 0; i <= t; ++i) {
          const size_t at = static_cast<size_t>(h) * owner.n_tokens_ + i;
          if (row[at] > threshold) steps[at].push_back(t);
        }
    }
  }
  std::vector<std::vector<int32_t>> steps;  // [H][T] ascending
};

FutureTables::FutureTables(const RowSource& source, int sequence, int layer)
    : source_(source),
      sequence_(sequence),
      layer_(layer),
      geometry_(source.geometry()),
      n_tokens_(source.sequence(sequence).n_tokens) {}

FutureTables::~FutureTables() = default;

size_t FutureTables::memory_bytes(const CacheGeometry& g, int n_tokens) {
  const size_t width = static_cast<size_t>(g.n_kv_heads) * n_tokens;
  const size_t stream = SharedLayer::memory_bytes(g, n_tokens, stream_needs(true));
  const size_t kept = std::min(kKeptBytes, width * sizeof(float) * (static_cast<size_t>(n_tokens) + 1));
  return stream + std::max(stream, kept) + width * (2 * 8 + 4 * kMetricSteps);
}

FutureTables::Window& FutureTables::window(bool errors, int horizon) {
  const std::lock_guard lock(mutex_);
  std::unique_ptr<Window>& held = windows_[{errors, horizon}];
  if (!held) held = std::make_unique<Window>(*this, errors, horizon);
  return *held;
}

void FutureTables::mass(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
                        std::span<float> out) {
  const float* sums = window(false, horizon).sums(kv_head, raw(step));
  for (size_t i = 0; i < positions.size(); ++i) out[i] = sums[raw(positions[i])];
}

void FutureTables::error(int kv_head, Pos step, int horizon, std::span<const Pos> positions,
                         std::span<float> out) {
  const float* sums = window(true, horizon).sums(kv_head, raw(step));
  for (size_t i = 0; i < positions.size(); ++i) out[i] = sums[raw(positions[i])];
}

void FutureTables::peak(int kv_head, Pos step, int horizon, int block, std::span<const Pos> positions,
                        std::span<float> out) {
  const Blocks* blocks = nullptr;
  {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Blocks>& held = blocks_[block];
    if (!held) held = std::make_unique<Blocks>(*this, block);
    blocks = held.get();
  }
  const int first = (raw(step) + 1) / block;
  const int last =
      horizon > 0 ? std::min(blocks->n_blocks - 1, (raw(step) + horizon) / block) : blocks->n_blocks - 1;
  std::fill(out.begin(), out.end(), 0.0f);
  for (int b = first; b <= last; ++b) {
    const float* means = blocks->means.data() + static_cast<size_t>(b) * blocks->width +
                         static_cast<size_t>(kv_head) * n_tokens_;
    for (size_t i = 0; i < positions.size(); ++i) out[i] = std::max(out[i], means[raw(positions[i])]);
  }
}

void FutureTables::next_use(int kv_head, Pos step, int horizon, float threshold,
                            std::span<const Pos> positions, std::span<float> out) {
  const Uses* uses = nullptr;
  {
    const std::lock_guard lock(mutex_);
    std::unique_ptr<Uses>& held = uses_[threshold];
    if (!held) held = std::make_unique<Uses>(*this, threshold);
    uses = held.get();
  }
  for (size_t i = 0; i < positions.size(); ++i) {
    const std::vector<int32_t>& steps =
        uses->steps[static_cast<size_t>(kv_head) * n_tokens_ + raw(positions[i])];
    const auto next = std::upper_bound(steps.begin(), steps.end(), raw(step));
    const bool used = next != steps.end() && (horizon <= 0 || *next <= raw(step) + horizon);
    out[i] = used ? static_cast<float>(*next - raw(step)) : std::numeric_limits<float>::infinity();
  }
}

}  // namespace kvlapse
