#include "kernels/cuda/graph_decoder.h"

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/base/dtype.h"
#include "core/base/error.h"
#include "core/base/rng.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cuda/bench_kernels.h"
#include "kernels/cuda/cublas_lt.h"
#include "kernels/cuda/decode_attention.h"
#include "kernels/cuda/device_memory.h"
#include "kernels/cuda/fast_args.h"

namespace kvlapse {
namespace {

using Bf16Buffer = DeviceBuffer<__nv_bfloat16>;
constexpr int kRingSteps = 256;

int attribute(cudaDeviceAttr what) {
  int device = 0, value = 0;
  KVLAPSE_CUDA_CHECK(cudaGetDevice(&device));
  KVLAPSE_CUDA_CHECK(cudaDeviceGetAttribute(&value, what, device));
  return value;
}

// Rows of a matrix as bf16, behind one another in a buffer.
void upload_rows(const Matrix& matrix, Bf16Buffer& to, size_t first_row) {
  const auto columns = static_cast<size_t>(matrix.columns);
  std::vector<float> row(columns);
  std::vector<uint16_t> rounded(columns * static_cast<size_t>(matrix.rows));
  for (int64_t r = 0; r < matrix.rows; ++r) {
    matrix_row(matrix, r, row.data());
    for (size_t c = 0; c < columns; ++c) rounded[static_cast<size_t>(r) * columns + c] = f32_to_bf16(row[c]);
  }
  KVLAPSE_CUDA_CHECK(cudaMemcpy(to.data() + first_row * columns, rounded.data(), rounded.size() * 2,
                                cudaMemcpyHostToDevice));
}

}  // namespace

DecoderShape shape_of(const TransformerWeights& w) {
  const LayerWeights& l = w.layers.front();
  return {static_cast<int>(w.layers.size()),
          w.n_vocab,
          w.width,
          w.ffn_width,
          w.n_q_heads,
          w.n_kv_heads,
          w.head_dim,
          w.norm_eps,
          !l.q_norm.empty(),
          !l.q_bias.empty(),
          w.head.data == w.embedding.data,
          w.rope};
}

struct GraphDecoder::Impl {
  struct Layer {
    Bf16Buffer qkv, o, gate_up, down;
    DeviceBuffer<float> input_norm, ffn_norm, q_norm, k_norm, bias;
    // The cache and what the device keeps of it.
    Bf16Buffer k, v;
    DeviceBuffer<float> value_l1;
    DeviceBuffer<uint16_t> protect;
    DeviceBuffer<int32_t> recent;
    DeviceBuffer<uint64_t> keys;
    CudaDecodeArgs attention{};
  };

  Impl(const DecoderShape& s, const GraphDecoderOptions& o)
      : shape(s),
        options(o),
        n_multiprocessors(attribute(cudaDevAttrMultiProcessorCount)),
        smem_bytes(attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
        kernel({.batch = o.batch,
                .n_q_heads = s.n_q_heads,
                .n_kv_heads = s.n_kv_heads,
                .head_dim = s.head_dim,
                .n_slots = o.n_slots,
                .dtype = DType::bf16,
                .leave_one_out = o.score == FusedScore::leave_one_out}) {
    const auto rows = static_cast<size_t>(o.batch), width = static_cast<size_t>(s.width);
    const auto ffn = static_cast<size_t>(s.ffn_width), vocab = static_cast<size_t>(s.n_vocab);
    if (s.width % 8 != 0 || s.ffn_width % 8 != 0)
      fail("decoder: widths: expected multiples of 8, found {} and {}", s.width, s.ffn_width);
    x = DeviceBuffer<float>(rows * width);
    normed = Bf16Buffer(rows * width);
    qkv = DeviceBuffer<float>(rows * qkv_rows());
    q = Bf16Buffer(rows * q_rows());
    k_new = Bf16Buffer(rows * kv_rows());
    v_new = Bf16Buffer(rows * kv_rows());
    attended = Bf16Buffer(rows * q_rows());
    both = Bf16Buffer(rows * 2 * ffn);
    act = Bf16Buffer(rows * ffn);
    logits = DeviceBuffer<float>(rows * vocab);
    best = DeviceBuffer<unsigned long long>(rows);
    tokens = DeviceBuffer<int32_t>(rows);
    pos = DeviceBuffer<int32_t>(rows);
    ring = DeviceBuffer<int32_t>(rows * kRingSteps);
    step = DeviceBuffer<int32_t>(1);
    importance = DeviceBuffer<float>(o.shared ? rows * s.n_kv_heads * o.n_slots : 0);
    split_softmax = DeviceBuffer<float>(kernel.split_softmax_floats());
    split_output = DeviceBuffer<float>(kernel.split_output_floats());
    arrivals = DeviceBuffer<uint32_t>(rows * kMaxDecodeSplits);
    flags = DeviceBuffer<uint32_t>(1);
    barrier = DeviceBuffer<uint32_t>(rows * s.n_kv_heads);
    for (auto* zero : {&tokens, &pos, &ring, &step}) zero->fill_bytes(0);
    best.fill_bytes(0);
    arrivals.fill_bytes(0);
    flags.fill_bytes(0);
    barrier.fill_bytes(0);
    x.fill_bytes(0);

    const auto dim = static_cast<size_t>(s.head_dim), half = dim / 2;
    std::vector<float> angles(static_cast<size_t>(o.n_positions) * dim);
    for (int p = 0; p < o.n_positions; ++p) {
      const std::span<float> row(angles.data() + static_cast<size_t>(p) * dim, dim);
      s.rope.angles(Pos{p}, row.first(half), row.last(half));
    }
    rope = DeviceBuffer<float>(angles);
    if (o.batch > kGemvMostRows) lt = CublasLt::load(without_lt);
    if (!lt) {
      gemv_rows = std::min(o.batch, kGemvMostRows);
      const int widest = std::max({s.width, s.ffn_width, static_cast<int>(q_rows())});
      while (gemv_rows > 1 && !gemv_fits(gemv_rows, widest, smem_bytes)) --gemv_rows;
      if (!gemv_fits(gemv_rows, widest, smem_bytes))
        fail("decoder: matrices of {} columns do not fit the matrix-vector kernel's shared memory", widest);
    }
  }

  size_t q_rows() const { return static_cast<size_t>(shape.n_q_heads) * shape.head_dim; }
  size_t kv_rows() const { return static_cast<size_t>(shape.n_kv_heads) * shape.head_dim; }
  size_t qkv_rows() const { return q_rows() + 2 * kv_rows(); }
  const __nv_bfloat16* head_matrix() const { return shape.tied ? embedding.data() : head.data(); }

  void make_matrices() {
    const auto width = static_cast<size_t>(shape.width), ffn = static_cast<size_t>(shape.ffn_width);
    embedding = Bf16Buffer(static_cast<size_t>(shape.n_vocab) * width);
    if (!shape.tied) head = Bf16Buffer(embedding.size());
    final_norm = DeviceBuffer<float>(width);
    layers = std::vector<Layer>(static_cast<size_t>(shape.n_layers));
    for (Layer& l : layers) {
      l.qkv = Bf16Buffer(qkv_rows() * width);
      l.o = Bf16Buffer(width * q_rows());
      l.gate_up = Bf16Buffer(2 * ffn * width);
      l.down = Bf16Buffer(width * ffn);
      l.input_norm = DeviceBuffer<float>(width);
      l.ffn_norm = DeviceBuffer<float>(width);
      if (shape.qk_norm) {
        l.q_norm = DeviceBuffer<float>(static_cast<size_t>(shape.head_dim));
        l.k_norm = DeviceBuffer<float>(static_cast<size_t>(shape.head_dim));
      }
      if (shape.qkv_bias) l.bias = DeviceBuffer<float>(qkv_rows());
    }
  }

  void make_caches() {
    const auto items = static_cast<size_t>(options.batch) * shape.n_kv_heads;
    const size_t slots = items * options.n_slots;
    const bool chooses = options.score != FusedScore::none;
    for (Layer& l : layers) {
      l.k = Bf16Buffer(slots * shape.head_dim);
      l.v = Bf16Buffer(slots * shape.head_dim);
      if (score_uses_norm(options.score)) l.value_l1 = DeviceBuffer<float>(slots);
      if (chooses) {
        l.protect = DeviceBuffer<uint16_t>(items * ((options.n_slots + 63) / 64 * 4));
        l.recent = DeviceBuffer<int32_t>(items * std::max(options.recent, 1));
      }
      l.keys = DeviceBuffer<uint64_t>(items * kMaxDecodeSplits);
      CudaDecodeArgs& a = l.attention;
      a = kernel.arguments(l.k.data(), l.v.data(), options.score, options.shared);
      a.q = q.data();
      a.k_new = k_new.data();
      a.v_new = v_new.data();
      a.out = attended.data();
      a.value_l1 = l.value_l1.data();
      a.importance = options.shared && chooses ? importance.data() : nullptr;
      a.protect = l.protect.data();
      a.recent_slots = l.recent.data();
      a.step_pos = pos.data();
      a.victim_keys = l.keys.data();
      a.arrivals = arrivals.data();
      a.flags = flags.data();
      a.split_softmax = split_softmax.data();
      a.split_output = split_output.data();
      a.split_barrier = barrier.data();
      a.recent = chooses ? options.recent : 0;
      a.early_state = true;
    }
    fill(0, 0);
  }

  // What follows once weights and caches are there.
  void finish() {
    make_caches();
    if (lt) {
      const int n = options.batch, width = shape.width, ffn = shape.ffn_width;
      const Layer& l = layers.front();
      auto plan = [&](int rows, int columns, bool bf16, bool add, const void* w, const void* in, void* out) {
        return lt->plan({rows, columns, n, bf16, add}, w, in, out, stream.get());
      };
      const int q_width = static_cast<int>(q_rows());
      plans[0] =
          plan(static_cast<int>(qkv_rows()), width, false, false, l.qkv.data(), normed.data(), qkv.data());
      plans[1] = plan(width, q_width, false, true, l.o.data(), attended.data(), x.data());
      plans[2] = plan(2 * ffn, width, true, false, l.gate_up.data(), normed.data(), both.data());
      plans[3] = plan(width, ffn, false, true, l.down.data(), act.data(), x.data());
      plans[4] = plan(shape.n_vocab, width, false, false, head_matrix(), normed.data(), logits.data());
    }
    graph.emplace(stream, [&] { launch_step(nullptr); });
  }

  void fill(int held, uint64_t seed) {
    for (Layer& l : layers) {
      if (held > 0) {
        launch_fill_random(stream.get(), l.k.data(), l.k.size(), DType::bf16, mix64(seed++));
        launch_fill_random(stream.get(), l.v.data(), l.v.size(), DType::bf16, mix64(seed++));
      } else {
        l.k.fill_bytes(0);
        l.v.fill_bytes(0);
      }
      if (l.value_l1.size() > 0)
        launch_fill_uniform(stream.get(), l.value_l1.data(), l.value_l1.size(), 60, 140, mix64(seed++));
      stream.synchronize();
      if (l.protect.size() > 0) l.protect.fill_bytes(0);
      if (l.recent.size() > 0) l.recent.fill_bytes(0);
      std::vector<uint64_t> keys(l.keys.size(), ~uint64_t{0});
      for (size_t i = 0; i < keys.size(); i += kMaxDecodeSplits)
        keys[i] = counter_random({seed, i}) % static_cast<uint64_t>(options.n_slots);
      if (held >= options.n_slots) l.keys.upload(keys);
    }
    pos.upload(std::vector<int32_t>(static_cast<size_t>(options.batch), held));
    step.fill_bytes(0);
    n_held = held;
  }

  // out (+)= W in, where in is the normed residual (norm given) or bf16 rows. Gate and up are one product
  // whose result is act (gated given).
  struct Product {
    const Bf16Buffer& w;
    int rows, columns;
    const DeviceBuffer<float>* norm = nullptr;
    const Bf16Buffer* in = nullptr;
    float* out = nullptr;
    Bf16Buffer* gated = nullptr;
    bool add = false;
  };

  void multiply(int plan, const Product& p, LaunchLog* log) {
    cudaStream_t s = stream.get();
    if (lt) {
      if (p.norm)
        launch_fast_norm(
            s, {x.data(), p.norm->data(), normed.data(), options.batch, p.columns, shape.norm_eps}, log);
      lt->run(plans[plan], p.w.data(), p.norm ? normed.data() : p.in->data(),
              p.gated ? static_cast<void*>(both.data()) : p.out, s);
      if (log) log->add("cublasLt", p.w.bytes(), true);
      if (p.gated) launch_fast_silu(s, {both.data(), p.gated->data(), options.batch, p.rows}, log);
      return;
    }
    for (int b = 0; b < options.batch; b += gemv_rows) {
      const size_t in_row = static_cast<size_t>(b) * p.columns, out_row = static_cast<size_t>(b) * p.rows;
      GemvArgs a{};
      a.weights = p.w.data();
      a.x = p.norm ? x.data() + in_row : nullptr;
      a.norm_weight = p.norm ? p.norm->data() : nullptr;
      a.input = p.norm ? nullptr : p.in->data() + in_row;
      a.out = p.out ? p.out + out_row : nullptr;
      a.out_bf16 = p.gated ? p.gated->data() + out_row : nullptr;
      a.n_rows = std::min(gemv_rows, options.batch - b);
      a.n_outputs = a.out_stride = p.rows;
      a.columns = p.columns;
      a.eps = shape.norm_eps;
      a.paired = p.gated != nullptr;
      a.add = p.add;
      launch_gemv(s, a, n_multiprocessors, log);
    }
  }

  void launch_step(LaunchLog* log) {
    cudaStream_t s = stream.get();
    const int n = options.batch, width = shape.width, ffn = shape.ffn_width;
    const int q_width = static_cast<int>(q_rows());
    launch_fast_embed(s, {embedding.data(), tokens.data(), x.data(), n, width}, log);
    for (const Layer& l : layers) {
      multiply(0,
               {.w = l.qkv,
                .rows = static_cast<int>(qkv_rows()),
                .columns = width,
                .norm = &l.input_norm,
                .out = qkv.data()},
               log);
      launch_fast_qkv(
          s,
          {qkv.data(), l.bias.data(), l.q_norm.data(), l.k_norm.data(), rope.data(), pos.data(), q.data(),
           k_new.data(), v_new.data(), n, shape.n_q_heads, shape.n_kv_heads, shape.head_dim, shape.norm_eps},
          log);
      kernel.launch(s, l.attention, log);
      multiply(1,
               {.w = l.o, .rows = width, .columns = q_width, .in = &attended, .out = x.data(), .add = true},
               log);
      multiply(2, {.w = l.gate_up, .rows = ffn, .columns = width, .norm = &l.ffn_norm, .gated = &act}, log);
      multiply(3, {.w = l.down, .rows = width, .columns = ffn, .in = &act, .out = x.data(), .add = true},
               log);
    }
    multiply(4,
             {.w = shape.tied ? embedding : head,
              .rows = shape.n_vocab,
              .columns = width,
              .norm = &final_norm,
              .out = logits.data()},
             log);
    launch_fast_argmax(s, {logits.data(), best.data(), n, shape.n_vocab}, log);
    launch_fast_advance(s, {best.data(), tokens.data(), pos.data(), ring.data(), step.data(), n, kRingSteps},
                        log);
  }

  void check_room(int n) const {
    if (n_held + n > options.n_positions)
      fail("decoder: {} steps from position {}: expected at most {} positions", n, n_held,
           options.n_positions);
    if (options.score == FusedScore::none && n_held + n > options.n_slots)
      fail("decoder: {} steps from position {}: expected at most {} slots", n, n_held, options.n_slots);
  }

  DecoderShape shape;
  GraphDecoderOptions options;
  int n_multiprocessors, smem_bytes;
  int gemv_rows = 0;
  int n_held = 0;  // position of the next token
  Stream stream;
  DecodeKernel kernel;
  std::unique_ptr<CublasLt> lt;
  std::string without_lt;
  int plans[5] = {};
  Bf16Buffer embedding, head;
  DeviceBuffer<float> final_norm, rope;
  std::vector<Layer> layers;
  DeviceBuffer<float> x, qkv, logits, importance, split_softmax, split_output;
  Bf16Buffer normed, q, k_new, v_new, attended, both, act;
  DeviceBuffer<unsigned long long> best;
  DeviceBuffer<int32_t> tokens, pos, ring, step;
  DeviceBuffer<uint32_t> arrivals, flags, barrier;
  std::optional<Graph> graph;
};

GraphDecoder::GraphDecoder(const DecoderShape& shape, const GraphDecoderOptions& options, uint64_t seed)
    : impl_(std::make_unique<Impl>(shape, options)) {
  impl_->make_matrices();
  cudaStream_t s = impl_->stream.get();
  auto fill = [&](Bf16Buffer& matrix, size_t columns) {
    if (matrix.size() > 0)
      launch_fill_normal(s, matrix.data(), matrix.size(), mix64(seed++),
                         1.0f / std::sqrt(static_cast<float>(columns)));
  };
  auto ones = [&](DeviceBuffer<float>& vector, float value) {
    if (vector.size() > 0) launch_fill_value(s, vector.data(), vector.size(), value);
  };
  const auto width = static_cast<size_t>(shape.width);
  fill(impl_->embedding, width);
  fill(impl_->head, width);
  ones(impl_->final_norm, 1);
  for (Impl::Layer& l : impl_->layers) {
    fill(l.qkv, width);
    fill(l.o, impl_->q_rows());
    fill(l.gate_up, width);
    fill(l.down, static_cast<size_t>(shape.ffn_width));
    for (DeviceBuffer<float>* norm : {&l.input_norm, &l.ffn_norm, &l.q_norm, &l.k_norm}) ones(*norm, 1);
    ones(l.bias, 0);
  }
  impl_->stream.synchronize();
  impl_->finish();
}

GraphDecoder::GraphDecoder(const TransformerWeights& w, const GraphDecoderOptions& options)
    : impl_(std::make_unique<Impl>(shape_of(w), options)) {
  impl_->make_matrices();
  upload_rows(w.embedding, impl_->embedding, 0);
  if (!impl_->shape.tied) upload_rows(w.head, impl_->head, 0);
  impl_->final_norm.upload(w.final_norm);
  for (size_t i = 0; i < w.layers.size(); ++i) {
    const LayerWeights& from = w.layers[i];
    Impl::Layer& to = impl_->layers[i];
    upload_rows(from.q, to.qkv, 0);
    upload_rows(from.k, to.qkv, impl_->q_rows());
    upload_rows(from.v, to.qkv, impl_->q_rows() + impl_->kv_rows());
    upload_rows(from.o, to.o, 0);
    upload_rows(from.gate, to.gate_up, 0);
    upload_rows(from.up, to.gate_up, static_cast<size_t>(w.ffn_width));
    upload_rows(from.down, to.down, 0);
    to.input_norm.upload(from.input_norm);
    to.ffn_norm.upload(from.ffn_norm);
    to.q_norm.upload(from.q_norm);
    to.k_norm.upload(from.k_norm);
    std::vector<float> bias = from.q_bias;
    bias.insert(bias.end(), from.k_bias.begin(), from.k_bias.end());
    bias.insert(bias.end(), from.v_bias.begin(), from.v_bias.end());
    to.bias.upload(bias);
  }
  impl_->finish();
}

GraphDecoder::~GraphDecoder() = default;

void GraphDecoder::fill_cache(int tokens, uint64_t seed) {
  impl_->fill(tokens, seed);
}

void GraphDecoder::set_tokens(const std::vector<int32_t>& tokens) {
  impl_->stream.synchronize();
  impl_->tokens.upload(tokens);
}

void GraphDecoder::run(int n) {
  impl_->check_room(n);
  for (int i = 0; i < n; ++i) impl_->graph->launch(impl_->stream);
  impl_->n_held += n;
}

std::vector<double> GraphDecoder::time_steps(int n) {
  impl_->check_room(n);
  std::vector<Event> marks(static_cast<size_t>(n) + 1);
  marks[0].record(impl_->stream);
  for (int i = 0; i < n; ++i) {
    impl_->graph->launch(impl_->stream);
    marks[static_cast<size_t>(i) + 1].record(impl_->stream);
  }
  impl_->n_held += n;
  std::vector<double> ms;
  for (size_t i = 1; i < marks.size(); ++i) ms.push_back(marks[i].ms_since(marks[i - 1]));
  return ms;
}

std::vector<int32_t> GraphDecoder::tokens() {
  impl_->stream.synchronize();
  if (impl_->options.score != FusedScore::none && impl_->flags.download()[0] != 0)
    fail("decoder: a step found no slot for its token");
  return impl_->tokens.download();
}

std::vector<float> GraphDecoder::logits() {
  impl_->stream.synchronize();
  return impl_->logits.download();
}

uint64_t GraphDecoder::weight_bytes() const {
  uint64_t bytes =
      static_cast<uint64_t>(impl_->shape.n_vocab) * static_cast<uint64_t>(impl_->shape.width) * 2;
  for (const Impl::Layer& l : impl_->layers)
    bytes += l.qkv.bytes() + l.o.bytes() + l.gate_up.bytes() + l.down.bytes();
  return bytes;
}

uint64_t GraphDecoder::kv_bytes() const {
  const int slots = std::min(impl_->n_held + 1, impl_->options.n_slots);
  return impl_->kernel.shape().kv_bytes(slots) * impl_->layers.size();
}

std::string GraphDecoder::products() const {
  if (impl_->lt) return "cublasLt";
  return impl_->without_lt.empty() ? "gemv" : "gemv (" + impl_->without_lt + ")";
}

int GraphDecoder::n_splits() const {
  return impl_->kernel.plan().n_splits;
}

std::vector<LaunchRecord> GraphDecoder::launches() {
  LaunchLog log;
  const Graph again(impl_->stream, [&] { impl_->launch_step(&log); });
  return log.take();
}

}  // namespace kvlapse
