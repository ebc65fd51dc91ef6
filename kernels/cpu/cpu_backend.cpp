#include "kernels/cpu/cpu_backend.h"

#include <hwy/targets.h>

#include <algorithm>
#include <thread>

#include "core/base/error.h"
#include "kernels/cpu/activations.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/host_array.h"
#include "kernels/cpu/integer_matmul.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/sampler.h"
#include "kernels/cpu/thread_team.h"

namespace kvlapse {
namespace {

constexpr uint64_t kFloat = sizeof(float);
constexpr int64_t kRowUnit = 8;  // rows of a matrix that one thread takes together

class CpuBackend final : public Backend {
 public:
  CpuBackend(int n_threads, MatmulMode mode)
      : team_(n_threads), attention_(team_), mode_(mode), thread_scratch_(n_threads) {}

  std::string describe() const override {
    // Of the targets that most of the kernels are compiled for.
    const int64_t targets = (hwy::SupportedTargets() & HWY_TARGETS) | HWY_STATIC_TARGET;
    return fmt::format("cpu {}, {} {}{}", hwy::TargetName(targets & -targets), team_.size(),
                       team_.size() == 1 ? "thread" : "threads",
                       mode_ == MatmulMode::int16 ? ", int16 products" : "");
  }

  void prepare(const TransformerWeights& weights, int n_rows, DType kv_dtype) override {
    if (kv_dtype == DType::f8e4m3) fail("kv dtype: expected fp32, fp16 or bf16 on the cpu, found fp8");
    w_ = &weights;
    pack(weights);
    kv_dtype_ = kv_dtype;
    q_width_ = static_cast<size_t>(weights.n_q_heads) * weights.head_dim;
    kv_width_ = static_cast<size_t>(weights.n_kv_heads) * weights.head_dim;
    const auto rows = static_cast<size_t>(n_rows);
    const auto width = static_cast<size_t>(weights.width), ffn = static_cast<size_t>(weights.ffn_width);
    half_dim_ = static_cast<size_t>(weights.head_dim) / 2;
    x_.assign(rows * width, 0);
    normed_ = projected_ = x_;
    q_.assign(rows * q_width_, 0);
    attended_ = q_;
    k_.assign(rows * kv_width_, 0);
    v_ = k_;
    gate_.assign(rows * ffn, 0);
    up_ = gate_;
    cos_.assign(rows * half_dim_, 0);
    sin_ = cos_;
    const size_t scratch = std::max({matmul_scratch(weights.width), matmul_scratch(weights.ffn_width),
                                     matmul_scratch(static_cast<int64_t>(q_width_))});
    const size_t widest = std::max({width, ffn, q_width_});
    for (ThreadScratch& s : thread_scratch_) {
      s.panel.assign(scratch, 0);
      if (mode_ == MatmulMode::int16) s.integers.reserve(rows, widest);
    }
    logits_.clear();
    n_rows_ = 0;
  }

  std::unique_ptr<KvStore> make_kv_store(const CacheGeometry& geometry, int query_window) override {
    return std::make_unique<CpuKvStore>(geometry, query_window);
  }

  OpBytes embed(std::span<const BatchRow> rows) override {
    n_rows_ = rows.size();
    for (size_t r = 0; r < n_rows_; ++r) {
      matrix_row(w_->embedding, rows[r].token, x_.data() + r * w_->width);
      w_->rope.angles(rows[r].pos, std::span(cos_).subspan(r * half_dim_, half_dim_),
                      std::span(sin_).subspan(r * half_dim_, half_dim_));
    }
    return {n_rows_ * w_->embedding.row_bytes(), n_rows_ * w_->width * kFloat};
  }

  OpBytes project_qkv(int layer) override {
    const LayerWeights& l = w_->layers[layer];
    const PackedLayer& packed = packed_[layer];
    const auto width = static_cast<size_t>(w_->width), dim = static_cast<size_t>(w_->head_dim);
    const int n_heads = w_->n_q_heads + 2 * w_->n_kv_heads;
    team_.run([&](int thread) {
      norm_rows(l.input_norm, thread);
      team_.barrier();
      ThreadScratch& scratch = thread_scratch_[thread];
      scratch.input = {normed_.data(), width, n_rows_, width};
      take_integers(scratch, {&packed.q, &packed.k, &packed.v});
      // Whole heads, so that each is finished by the thread that computed it.
      const Share mine = share_of(n_heads, thread, team_.size());
      for (int64_t head = mine.begin; head < mine.end; ++head) {
        const bool is_q = head < w_->n_q_heads, is_k = !is_q && head < w_->n_q_heads + w_->n_kv_heads;
        const int64_t index = is_q   ? head
                              : is_k ? head - w_->n_q_heads
                                     : head - w_->n_q_heads - w_->n_kv_heads;
        const Matrix& matrix = is_q ? l.q : is_k ? l.k : l.v;
        const PackedMatrix& packed_matrix = is_q ? packed.q : is_k ? packed.k : packed.v;
        const std::vector<float>& bias = is_q ? l.q_bias : is_k ? l.k_bias : l.v_bias;
        const std::vector<float>& norm = is_q ? l.q_norm : l.k_norm;
        std::vector<float>& out = is_q ? q_ : is_k ? k_ : v_;
        const size_t stride = is_q ? q_width_ : kv_width_, first = static_cast<size_t>(index) * dim;
        multiply(matrix, packed_matrix, {static_cast<int64_t>(first), static_cast<int64_t>(first + dim)},
                 scratch, out.data(), stride);
        for (size_t r = 0; r < n_rows_; ++r) {
          const std::span<float> row(out.data() + r * stride + first, dim);
          if (!bias.empty()) add({bias.data() + first, dim}, row.data());
          if (is_q || is_k) {
            if (!norm.empty()) rms_norm(row, norm, w_->norm_eps, row.data());
            rotate_half(row.data(), dim, cos_.data() + r * half_dim_, sin_.data() + r * half_dim_);
          }
          round_to(kv_dtype_, row);
        }
      }
    });
    return {l.q.bytes() + l.k.bytes() + l.v.bytes() + n_rows_ * width * kFloat,
            n_rows_ * (q_width_ + 2 * kv_width_) * kFloat};
  }

  QkvRow qkv_row(int row) const override {
    return {q_.data() + row * q_width_, k_.data() + row * kv_width_, v_.data() + row * kv_width_};
  }

  OpBytes attend(std::span<const AttendRow> attend) override {
    attend_rows_.clear();
    OpBytes bytes;
    for (const AttendRow& a : attend) {
      auto* store = static_cast<CpuKvStore*>(a.store);
      attend_rows_.push_back({store, a.table, a.row < 0 ? nullptr : attended_.data() + a.row * q_width_});
      for (int h = 0; h < w_->n_kv_heads; ++h)
        bytes.read += static_cast<uint64_t>(a.table->count(h)) * store->geometry().head_token_bytes();
      bytes.written += q_width_ * kFloat;
    }
    attention_.decode(attend_rows_);
    return bytes;
  }

  OpBytes attend_block(KvStore& store, int first_slots) override {
    attention_.block(static_cast<CpuKvStore&>(store), static_cast<int>(n_rows_), first_slots, q_.data(),
                     q_width_, attended_.data(), q_width_);
    const uint64_t slots = static_cast<uint64_t>(first_slots) + n_rows_;
    return {slots * store.geometry().head_token_bytes() * w_->n_kv_heads, n_rows_ * q_width_ * kFloat};
  }

  OpBytes output_and_ffn(int layer) override {
    const LayerWeights& l = w_->layers[layer];
    const PackedLayer& packed = packed_[layer];
    const auto width = static_cast<size_t>(w_->width), ffn = static_cast<size_t>(w_->ffn_width);
    team_.run([&](int thread) {
      ThreadScratch& scratch = thread_scratch_[thread];
      const Share outputs = share_of(w_->width, thread, team_.size(), kRowUnit);
      const Share hidden = share_of(w_->ffn_width, thread, team_.size(), kRowUnit);
      project_onto_x(l.o, packed.o, attended_, q_width_, outputs, scratch);
      team_.barrier();
      norm_rows(l.ffn_norm, thread);
      team_.barrier();
      if (hidden.begin < hidden.end) {
        scratch.input = {normed_.data(), width, n_rows_, width};
        take_integers(scratch, {&packed.gate, &packed.up});
        multiply(l.gate, packed.gate, hidden, scratch, gate_.data(), ffn);
        multiply(l.up, packed.up, hidden, scratch, up_.data(), ffn);
        const auto n = static_cast<size_t>(hidden.end - hidden.begin);
        for (size_t r = 0; r < n_rows_; ++r) {
          const size_t at = r * ffn + hidden.begin;
          silu_multiply({gate_.data() + at, n}, {up_.data() + at, n});
        }
      }
      team_.barrier();
      project_onto_x(l.down, packed.down, gate_, ffn, outputs, scratch);
    });
    return {l.o.bytes() + l.gate.bytes() + l.up.bytes() + l.down.bytes() +
                n_rows_ * (q_width_ + 2 * width + ffn) * kFloat,
            n_rows_ * (2 * width + ffn) * kFloat};
  }

  OpBytes head(std::span<const int> rows) override {
    const auto width = static_cast<size_t>(w_->width), vocab = static_cast<size_t>(w_->n_vocab);
    if (logits_.size() < rows.size() * vocab) logits_.resize(rows.size() * vocab);
    team_.run([&](int thread) {
      const Share mine = share_of(static_cast<int64_t>(rows.size()), thread, team_.size());
      for (int64_t i = mine.begin; i < mine.end; ++i)
        rms_norm({x_.data() + rows[i] * width, width}, w_->final_norm, w_->norm_eps,
                 normed_.data() + i * width);
      team_.barrier();
      const Share vocabulary = share_of(w_->n_vocab, thread, team_.size(), kRowUnit);
      if (vocabulary.begin == vocabulary.end) return;
      ThreadScratch& scratch = thread_scratch_[thread];
      scratch.input = {normed_.data(), width, rows.size(), width};
      take_integers(scratch, {&packed_head_});
      multiply(w_->head, packed_head_, vocabulary, scratch, logits_.data(), vocab);
    });
    return {w_->head.bytes() + rows.size() * width * kFloat, rows.size() * vocab * kFloat};
  }

  void sample(std::span<const SampleRow> rows, std::span<SampleResult> results) override {
    auto one = [&](int i, int thread) {
      results[i] = sample_token(logits(i), rows[i], sample_scratch_[thread]);
    };
    sample_scratch_.resize(team_.size());
    if (rows.size() == 1) return one(0, 0);
    team_.run([&](int thread) {
      const Share mine = share_of(static_cast<int64_t>(rows.size()), thread, team_.size());
      for (int64_t i = mine.begin; i < mine.end; ++i) one(static_cast<int>(i), thread);
    });
  }

  std::span<const float> logits(int row) override {
    return {logits_.data() + static_cast<size_t>(row) * w_->n_vocab, static_cast<size_t>(w_->n_vocab)};
  }

  std::span<const float> residual(int row) override {
    return {x_.data() + static_cast<size_t>(row) * w_->width, static_cast<size_t>(w_->width)};
  }

  void parallel(int n, const std::function<void(int)>& task) override {
    if (n == 1) return task(0);
    std::atomic<int> next{0};
    team_.run([&](int) {
      for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) task(i);
    });
  }

 private:
  // normed = RMSNorm(x) * weight; rows are divided among the threads.
  void norm_rows(std::span<const float> weight, int thread) {
    const auto width = static_cast<size_t>(w_->width);
    const Share mine = share_of(static_cast<int64_t>(n_rows_), thread, team_.size());
    for (int64_t r = mine.begin; r < mine.end; ++r)
      rms_norm({x_.data() + r * width, width}, weight, w_->norm_eps, normed_.data() + r * width);
  }

  // What one thread multiplies with, and where it does so.
  struct Input {
    const float* x = nullptr;
    size_t stride = 0, n_rows = 0, columns = 0;
  };
  struct ThreadScratch {
    Input input;
    IntegerActivations integers;  // of the input
    std::vector<float> panel;
  };

  // Matrices as integer products read them; not packed in exact mode or where the type or shape has no such
  // kernel.
  struct PackedLayer {
    PackedMatrix q, k, v, o, gate, up, down;
  };

  // Packs what the mode multiplies in integers.
  void pack(const TransformerWeights& weights) {
    packed_.assign(weights.layers.size(), {});
    packed_head_ = {};
    if (mode_ == MatmulMode::exact) return;

    struct Job {
      const Matrix* from;
      PackedMatrix* to;
      size_t offset;
    };
    std::vector<Job> jobs;
    size_t bytes = 0;
    auto add_job = [&](const Matrix& from, PackedMatrix& to) {
      if (!can_be_packed(from.type)) return;
      to = {from.type, from.rows, from.columns, nullptr};
      jobs.push_back({&from, &to, bytes});
      bytes += (packed_group_bytes(from.type, from.columns) * to.n_groups() + 63) / 64 * 64;
    };
    const bool whole_heads = weights.head_dim % PackedMatrix::kRows == 0;
    for (size_t i = 0; i < packed_.size(); ++i) {
      const LayerWeights& l = weights.layers[i];
      PackedLayer& p = packed_[i];
      if (whole_heads) {
        add_job(l.q, p.q);
        add_job(l.k, p.k);
        add_job(l.v, p.v);
      }
      add_job(l.o, p.o);
      add_job(l.gate, p.gate);
      add_job(l.up, p.up);
      add_job(l.down, p.down);
    }
    add_job(weights.head, packed_head_);
    packed_bytes_ = HostArray<std::byte>(bytes);
    team_.run([&](int thread) {
      for (const Job& job : jobs) {
        const Share mine = share_of(job.to->n_groups(), thread, team_.size());
        pack_groups(*job.from, mine.begin, mine.end, packed_bytes_.data() + job.offset);
      }
    });
    for (const Job& job : jobs) job.to->data = packed_bytes_.data() + job.offset;
  }

  // Rounds the thread's input once for the matrices that it is about to be multiplied with, when one of them
  // is packed.
  static void take_integers(ThreadScratch& scratch, std::initializer_list<const PackedMatrix*> matrices) {
    const Input& in = scratch.input;
    if (std::any_of(matrices.begin(), matrices.end(), [](const PackedMatrix* m) { return m->data; }))
      scratch.integers.assign(in.x, in.stride, in.n_rows, in.columns);
  }

  // y = W input, rows [mine.begin, mine.end).
  static void multiply(const Matrix& w, const PackedMatrix& packed, Share mine, ThreadScratch& scratch,
                       float* y, size_t y_stride) {
    const Input& in = scratch.input;
    if (packed.data)
      integer_matmul(packed, mine.begin, mine.end, scratch.integers, y, y_stride);
    else
      matmul_rows(w, mine.begin, mine.end, in.x, in.stride, in.n_rows, y, y_stride, scratch.panel.data());
  }

  // x += W in, for the output rows of one thread.
  void project_onto_x(const Matrix& w, const PackedMatrix& packed, const std::vector<float>& in,
                      size_t in_stride, Share mine, ThreadScratch& scratch) {
    if (mine.begin == mine.end) return;
    const auto width = static_cast<size_t>(w_->width);
    scratch.input = {in.data(), in_stride, n_rows_, in_stride};
    take_integers(scratch, {&packed});
    multiply(w, packed, mine, scratch, projected_.data(), width);
    for (size_t r = 0; r < n_rows_; ++r) {
      const size_t at = r * width + mine.begin;
      add({projected_.data() + at, static_cast<size_t>(mine.end - mine.begin)}, x_.data() + at);
    }
  }

  ThreadTeam team_;
  CpuAttention attention_;
  MatmulMode mode_;
  std::vector<PackedLayer> packed_;
  PackedMatrix packed_head_;
  HostArray<std::byte> packed_bytes_;
  const TransformerWeights* w_ = nullptr;
  DType kv_dtype_ = DType::f32;
  size_t n_rows_ = 0, q_width_ = 0, kv_width_ = 0, half_dim_ = 0;
  std::vector<float> x_, normed_, projected_;  // [R, width]
  std::vector<float> q_, attended_, k_, v_;    // [R, Hq D] twice, [R, H D] twice
  std::vector<float> gate_, up_;               // [R, ffn]
  std::vector<float> cos_, sin_;               // [R, D/2]
  std::vector<float> logits_;                  // [rows of head(), V]
  std::vector<ThreadScratch> thread_scratch_;
  std::vector<std::vector<float>> sample_scratch_;
  std::vector<CpuAttendRow> attend_rows_;
};

}  // namespace

std::unique_ptr<Backend> make_cpu_backend(int n_threads, MatmulMode mode) {
  if (n_threads == 0) n_threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  if (n_threads < 1 || n_threads > 1024) fail("threads: expected 1 to 1024, found {}", n_threads);
  return std::make_unique<CpuBackend>(n_threads, mode);
}

bool has_integer_products(const TransformerWeights& weights) {
  if (can_be_packed(weights.head.type)) return true;
  for (const LayerWeights& l : weights.layers)
    for (const Matrix* m : {&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down})
      if (can_be_packed(m->type)) return true;
  return false;
}

}  // namespace kvlapse
