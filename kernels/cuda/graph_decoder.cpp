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

// A matrix of a step on its way to the device, as bf16.
class HostMatrix {
 public:
  HostMatrix(size_t elements, int64_t columns, const MatrixOrder& order)
      : values_(elements), columns_(columns), order_(order) {}
  // Row r of `matrix` becomes row place(r).
  template <class Place>
  void add(const Matrix& matrix, Place place) {
    std::vector<float> row(static_cast<size_t>(columns_));
    for (int64_t r = 0; r < matrix.rows; ++r) {
      matrix_row(matrix, r, row.data());
      const int64_t to = place(r);
      for (int64_t c = 0; c < columns_; ++c)
        values_[static_cast<size_t>(order_.index(to, c, columns_))] =
            f32_to_bf16(row[static_cast<size_t>(c)]);
    }
  }
  void add(const Matrix& matrix, int64_t first_row = 0) {
    add(matrix, [=](int64_t r) { return first_row + r; });
  }
  void upload(Bf16Buffer& to) const {
    KVLAPSE_CUDA_CHECK(cudaMemcpy(to.data(), values_.data(), values_.size() * 2, cudaMemcpyHostToDevice));
  }

 private:
  std::vector<uint16_t> values_;
  int64_t columns_;
  MatrixOrder order_;
};

template <class T>
void upload_to(T* to, std::span<const T> values) {
  KVLAPSE_CUDA_CHECK(cudaMemcpy(to, values.data(), values.size_bytes(), cudaMemcpyHostToDevice));
}

uint16_t* bits(const Bf16Buffer& buffer) {
  return reinterpret_cast<uint16_t*>(buffer.data());
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
    uint64_t* keys = nullptr;  // [B * H, kMaxDecodeSplits] of all layers' keys
    CudaDecodeArgs attention{};
  };

  struct Chain {
    ChainArgs args;
    int smem_bytes;
  };
  // Of a layer, or of the step's end.
  enum Product { kQkv, kO, kGateUp, kDown, kHead, kProducts };
  enum class Multiplier { chain, product, cublas_lt, gemv };
  struct MatrixShape {
    int rows, columns;
    MatrixOrder order;
  };

  Impl(const DecoderShape& s, const GraphDecoderOptions& o)
      : shape(s),
        options(o),
        n_multiprocessors(device_attribute(cudaDevAttrMultiProcessorCount)),
        smem_bytes(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)),
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
    qkv = DeviceBuffer<float>(rows * qkv_rows());
    q = Bf16Buffer(rows * q_rows());
    k_new = Bf16Buffer(rows * kv_rows());
    v_new = Bf16Buffer(rows * kv_rows());
    attended = Bf16Buffer(rows * q_rows());
    logits = DeviceBuffer<float>(rows * vocab);
    best = DeviceBuffer<unsigned long long>(rows);
    tokens = DeviceBuffer<int32_t>(rows);
    pos = DeviceBuffer<int32_t>(rows);
    step = DeviceBuffer<int32_t>(1);
    importance = DeviceBuffer<float>(o.shared ? rows * s.n_kv_heads * o.n_slots : 0);
    split_softmax = DeviceBuffer<float>(kernel.split_softmax_floats());
    split_output = DeviceBuffer<float>(kernel.split_output_floats());
    arrivals = DeviceBuffer<uint32_t>(rows * kMaxDecodeSplits);
    flags = DeviceBuffer<uint32_t>(1);
    barrier = DeviceBuffer<uint32_t>(rows * s.n_kv_heads);
    head_arrivals = DeviceBuffer<uint32_t>(static_cast<size_t>(s.n_q_heads + 2 * s.n_kv_heads));
    for (auto* zero : {&tokens, &pos, &step}) zero->fill_bytes(0);
    best.fill_bytes(0);
    arrivals.fill_bytes(0);
    flags.fill_bytes(0);
    barrier.fill_bytes(0);
    head_arrivals.fill_bytes(0);
    x.fill_bytes(0);

    const auto dim = static_cast<size_t>(s.head_dim), half = dim / 2;
    std::vector<float> angles(static_cast<size_t>(o.n_positions) * dim);
    for (int p = 0; p < o.n_positions; ++p) {
      const std::span<float> row(angles.data() + static_cast<size_t>(p) * dim, dim);
      s.rope.angles(Pos{p}, row.first(half), row.last(half));
    }
    rope = DeviceBuffer<float>(angles);
    const auto q_width = static_cast<int>(q_rows());
    matrices[kQkv] = {static_cast<int>(qkv_rows()), s.width, {}};
    matrices[kO] = {s.width, q_width, {}};
    matrices[kGateUp] = {2 * s.ffn_width, s.width, {}};
    matrices[kDown] = {s.width, s.ffn_width, {}};
    matrices[kHead] = {s.n_vocab, s.width, {}};
    choose_multiplier();
    if (multiplier == Multiplier::chain) {
      x_words = DeviceBuffer<uint64_t>(rows * width);
      act_words = DeviceBuffer<uint64_t>(rows * ffn / 2);
      x_words.fill_bytes(0);
      act_words.fill_bytes(0);
    } else {
      normed = Bf16Buffer(rows * width);
      act = Bf16Buffer(rows * ffn);
    }
    if (multiplier == Multiplier::cublas_lt) both = Bf16Buffer(rows * 2 * ffn);
  }

  void choose_multiplier() {
    const bool bulk = device_attribute(cudaDevAttrComputeCapabilityMajor) == 9;
    if (bulk && options.batch <= kChainMostRows && shape.width % kChainTileColumns == 0 &&
        shape.ffn_width % kChainTileColumns == 0 && plan_chains()) {
      multiplier = Multiplier::chain;
      for (MatrixShape& m : matrices) m.order = {MatrixOrder::Kind::chain};
      return;
    }
    if (bulk && plan_products()) {
      multiplier = Multiplier::product;
      return;
    }
    if (options.batch > kGemvMostRows) lt = CublasLt::load(without_lt);
    if (lt) {
      multiplier = Multiplier::cublas_lt;
      return;
    }
    multiplier = Multiplier::gemv;
    gemv_rows = std::min(options.batch, kGemvMostRows);
    const int widest = std::max({shape.width, shape.ffn_width, static_cast<int>(q_rows())});
    while (gemv_rows > 1 && !gemv_fits(gemv_rows, widest, smem_bytes)) --gemv_rows;
    if (!gemv_fits(gemv_rows, widest, smem_bytes))
      fail("decoder: matrices of {} columns do not fit the matrix-vector kernel's shared memory", widest);
  }
  // Whether own products fit; matrices are slabs then.
  bool plan_products() {
    clusters = product_clusters(smem_bytes);
    for (int i = 0; i < kProducts; ++i) {
      const MatrixShape& m = matrices[i];
      ProductArgs& a = products[i];
      a = {};
      a.n_rows = options.batch, a.columns = m.columns, a.n_outputs = i == kGateUp ? m.rows / 2 : m.rows;
      choose_product_slabs(a, chain_groups(m.rows), clusters);
      product_smem[i] = plan_product(a, smem_bytes);
      if (product_smem[i] == 0) return false;
    }
    for (int i = 0; i < kProducts; ++i)
      matrices[i].order = {MatrixOrder::Kind::slabs, products[i].slab_groups};
    squares = DeviceBuffer<float>(static_cast<size_t>(n_multiprocessors) * kProductMostRows);
    return true;
  }

  size_t items() const { return static_cast<size_t>(options.batch) * shape.n_kv_heads; }
  int victims_a_layer() const {
    return options.score == FusedScore::none ? 0 : options.shared ? 1 : shape.n_kv_heads;
  }
  size_t q_rows() const { return static_cast<size_t>(shape.n_q_heads) * shape.head_dim; }
  size_t kv_rows() const { return static_cast<size_t>(shape.n_kv_heads) * shape.head_dim; }
  size_t qkv_rows() const { return q_rows() + 2 * kv_rows(); }
  MatrixOrder embedding_order() const { return shape.tied ? matrices[kHead].order : MatrixOrder{}; }
  // Gate and up are one matrix, where their product makes what both give of neighbouring rows.
  bool gates_in_product() const {
    return multiplier == Multiplier::chain || multiplier == Multiplier::product;
  }
  const __nv_bfloat16* head_matrix() const { return shape.tied ? embedding.data() : head.data(); }

  void make_matrices() {
    const auto width = static_cast<size_t>(shape.width);
    const auto matrix = [&](Product i) {
      const MatrixShape& m = matrices[i];
      return Bf16Buffer(static_cast<size_t>(m.order.stored_rows(m.rows) * m.columns));
    };
    embedding = shape.tied ? matrix(kHead) : Bf16Buffer(static_cast<size_t>(shape.n_vocab) * width);
    if (!shape.tied) head = matrix(kHead);
    final_norm = DeviceBuffer<float>(width);
    layers = std::vector<Layer>(static_cast<size_t>(shape.n_layers));
    for (Layer& l : layers) {
      l.qkv = matrix(kQkv);
      l.o = matrix(kO);
      l.gate_up = matrix(kGateUp);
      l.down = matrix(kDown);
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
    const size_t items = this->items(), slots = items * options.n_slots;
    const bool chooses = options.score != FusedScore::none;
    keys = DeviceBuffer<uint64_t>(layers.size() * items * kMaxDecodeSplits);
    for (Layer& l : layers) {
      l.k = Bf16Buffer(slots * shape.head_dim);
      l.v = Bf16Buffer(slots * shape.head_dim);
      if (score_uses_norm(options.score)) l.value_l1 = DeviceBuffer<float>(slots);
      if (chooses) {
        l.protect = DeviceBuffer<uint16_t>(items * ((options.n_slots + 63) / 64 * 4));
        l.recent = DeviceBuffer<int32_t>(items * std::max(options.recent, 1));
      }
      l.keys = keys.data() + static_cast<size_t>(&l - layers.data()) * items * kMaxDecodeSplits;
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
      a.victim_keys = l.keys;
      a.arrivals = arrivals.data();
      a.flags = flags.data();
      a.split_softmax = split_softmax.data();
      a.split_output = split_output.data();
      a.split_barrier = barrier.data();
      a.recent = divisor_of(chooses ? options.recent : 0);
      a.early_state = true;
    }
    fill(0, 0);
  }

  // What follows once weights and caches are there.
  void finish() {
    make_caches();
    if (lt) {
      auto plan = [&](Product i, bool bf16, bool add, auto weights, const void* in, void* out) {
        std::vector<const void*> all;
        for (const Layer& l : layers) all.push_back(weights(l));
        const MatrixShape& m = matrices[i];
        plans[i] = lt->plan({m.rows, m.columns, options.batch, bf16, add}, all, in, out, stream);
      };
      plan(
          kQkv, false, false, [](const Layer& l) { return l.qkv.data(); }, normed.data(), qkv.data());
      plan(
          kO, false, true, [](const Layer& l) { return l.o.data(); }, attended.data(), x.data());
      plan(
          kGateUp, true, false, [](const Layer& l) { return l.gate_up.data(); }, normed.data(), both.data());
      plan(
          kDown, false, true, [](const Layer& l) { return l.down.data(); }, act.data(), x.data());
      plan(
          kHead, false, false, [&](const Layer&) { return head_matrix(); }, normed.data(), logits.data());
    }
    if (multiplier == Multiplier::chain) make_chains();
    if (options.n_reports > 0) {
      const auto n = static_cast<size_t>(options.n_reports) * options.batch;
      choices = PinnedBuffer<AheadChoice>(n);
      victims = PinnedBuffer<uint64_t>(n * layers.size() * victims_a_layer());
      reported = std::vector<Event>(static_cast<size_t>(options.n_reports));
    }
    graph.emplace(stream, [&] { launch_step(nullptr); });
  }

  // The products behind attention `layer` (-1: before the first): of its rest and of the next one's q, k, v,
  // or of the logits. Weights may be missing when only the plan is asked for.
  ChainArgs chain_of(int layer) const {
    const int ffn = shape.ffn_width, width = shape.width;
    const auto q_width = static_cast<int>(q_rows()), qkv_width = static_cast<int>(qkv_rows());
    ChainArgs a{};
    auto groups = [](int64_t rows) { return static_cast<int32_t>(chain_groups(rows)); };
    auto add = [&](const ChainPhase& phase) { a.phases[a.n_phases++] = phase; };
    if (layer >= 0) {
      const Layer* l = layers.empty() ? nullptr : &layers[static_cast<size_t>(layer)];
      add({l ? bits(l->o) : nullptr, nullptr, bits(attended), groups(width), q_width, width,
           ChainOutput::residual});
      add({l ? bits(l->gate_up) : nullptr, l ? l->ffn_norm.data() : x.data(), nullptr, groups(2 * ffn), width,
           ffn, ChainOutput::gated});
      add({l ? bits(l->down) : nullptr, nullptr, nullptr, groups(width), ffn, width, ChainOutput::residual});
    }
    if (layer + 1 < shape.n_layers) {
      const Layer* l = layers.empty() ? nullptr : &layers[static_cast<size_t>(layer + 1)];
      add({l ? bits(l->qkv) : nullptr, l ? l->input_norm.data() : x.data(), nullptr, groups(qkv_width), width,
           qkv_width, ChainOutput::heads});
      if (l) a.bias = l->bias.data(), a.q_norm = l->q_norm.data(), a.k_norm = l->k_norm.data();
    } else {
      add({reinterpret_cast<const uint16_t*>(head_matrix()),
           final_norm.size() > 0 ? final_norm.data() : x.data(), nullptr, groups(shape.n_vocab), width,
           shape.n_vocab, ChainOutput::logits});
    }
    a.x = x.data();
    a.x_words = x_words.data();
    a.act_words = act_words.data();
    a.logits = logits.data();
    a.best = reinterpret_cast<uint64_t*>(best.data());
    a.qkv = qkv.data();
    a.rope = rope.data();
    a.pos = pos.data();
    a.q = bits(q), a.k = bits(k_new), a.v = bits(v_new);
    a.head_arrivals = head_arrivals.data();
    a.number = layer + 1;
    a.n_rows = options.batch;
    a.n_q_heads = shape.n_q_heads;
    a.n_kv_heads = shape.n_kv_heads;
    a.head_dim = shape.head_dim;
    a.eps = shape.norm_eps;
    return a;
  }
  // Whether the device's shared memory holds every chain. Of a single layer, two steps' words would be alike.
  bool plan_chains() const {
    if (shape.n_layers == 1) return false;
    for (int layer = -1; layer < shape.n_layers; ++layer) {
      ChainArgs a = chain_of(layer);
      if (plan_chain(a, smem_bytes) == 0) return false;
    }
    return true;
  }
  void make_chains() {
    for (int layer = -1; layer < shape.n_layers; ++layer) {
      Chain chain{chain_of(layer), 0};
      chain.smem_bytes = plan_chain(chain.args, smem_bytes);
      chains.push_back(chain);
    }
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
      if (held < options.n_slots) continue;
      std::vector<uint64_t> chosen(items() * kMaxDecodeSplits, ~uint64_t{0});
      for (size_t i = 0; i < chosen.size(); i += kMaxDecodeSplits)
        chosen[i] = counter_random({seed, i}) % static_cast<uint64_t>(options.n_slots);
      upload_to<uint64_t>(l.keys, chosen);
    }
    pos.upload(std::vector<int32_t>(static_cast<size_t>(options.batch), held));
    step.fill_bytes(0);
    n_held = held;
  }

  // out (+)= W in, where in is the normed residual (norm given) or bf16 rows. Gate and up are one product
  // whose result is act (gated given). Of a residual, the norm that follows (next_norm given). Own products
  // share a norm with the one that added to the residual before them (added_by given).
  struct Operands {
    const Bf16Buffer& w;
    const DeviceBuffer<float>* norm = nullptr;
    std::optional<Product> added_by = std::nullopt;
    const Bf16Buffer* in = nullptr;
    float* out = nullptr;
    Bf16Buffer* gated = nullptr;
    bool add = false;
    const DeviceBuffer<float>* next_norm = nullptr;
  };

  void multiply(Product product, const Operands& p, LaunchLog* log) {
    cudaStream_t s = stream.get();
    const int columns = matrices[product].columns, n_outputs = matrices[product].rows / (p.gated ? 2 : 1);
    const bool shares_norm = multiplier == Multiplier::product && p.added_by;
    if (multiplier != Multiplier::gemv && p.norm != nullptr && !shares_norm)
      launch_fast_norm(s, {x.data(), p.norm->data(), normed.data(), options.batch, columns, shape.norm_eps},
                       log);
    const Bf16Buffer& in = p.norm ? normed : *p.in;
    if (multiplier == Multiplier::product) {
      ProductArgs a = products[product];
      a.weights = bits(p.w);
      a.input = bits(in);
      a.out = p.out;
      a.gated = p.gated ? bits(*p.gated) : nullptr;
      a.add = p.add;
      a.eps = shape.norm_eps;
      if (shares_norm)
        a.squares = squares.data(), a.n_squares = product_launch_blocks(products[*p.added_by], clusters);
      if (p.next_norm)
        a.scaled = bits(normed), a.next_norm = p.next_norm->data(), a.next_squares = squares.data();
      launch_product(s, a, product_smem[product], clusters, log);
      return;
    }
    if (multiplier == Multiplier::cublas_lt) {
      lt->run(plans[product], p.w.data(), in.data(), p.gated ? static_cast<void*>(both.data()) : p.out, s);
      if (log) log->add("cublasLt", p.w.bytes(), true);
      if (p.gated) launch_fast_silu(s, {both.data(), p.gated->data(), options.batch, n_outputs}, log);
      return;
    }
    for (int b = 0; b < options.batch; b += gemv_rows) {
      const size_t in_row = static_cast<size_t>(b) * columns, out_row = static_cast<size_t>(b) * n_outputs;
      GemvArgs a{};
      a.weights = p.w.data();
      a.x = p.norm ? x.data() + in_row : nullptr;
      a.norm_weight = p.norm ? p.norm->data() : nullptr;
      a.input = p.norm ? nullptr : p.in->data() + in_row;
      a.out = p.out ? p.out + out_row : nullptr;
      a.out_bf16 = p.gated ? p.gated->data() + out_row : nullptr;
      a.n_rows = std::min(gemv_rows, options.batch - b);
      a.n_outputs = a.out_stride = n_outputs;
      a.columns = columns;
      a.eps = shape.norm_eps;
      a.paired = p.gated != nullptr;
      a.add = p.add;
      launch_gemv(s, a, n_multiprocessors, log);
    }
  }

  void launch_step(LaunchLog* log) {
    cudaStream_t s = stream.get();
    const int n = options.batch, width = shape.width;
    launch_fast_embed(s, {embedding.data(), tokens.data(), x.data(), n, width, embedding_order()}, log);
    if (multiplier == Multiplier::chain)
      launch_chains(log);
    else
      launch_products(log);
    if (options.n_reports > 0)
      launch_fast_report(s,
                         {logits.data(), best.data(), keys.data(), flags.data(), step.data(), choices.data(),
                          victims.data(), n, shape.n_vocab, shape.n_layers, shape.n_kv_heads,
                          victims_a_layer(), kernel.plan().n_splits, options.n_reports},
                         log);
    launch_fast_advance(s, {best.data(), tokens.data(), pos.data(), step.data(), n}, log);
  }

  void launch_chains(LaunchLog* log) {
    for (size_t i = 0; i < chains.size(); ++i) {
      if (i > 0) kernel.launch(stream.get(), layers[i - 1].attention, log);
      launch_product_chain(stream.get(), chains[i].args, chains[i].smem_bytes, n_multiprocessors, log);
    }
  }

  void launch_products(LaunchLog* log) {
    cudaStream_t s = stream.get();
    const int n = options.batch;
    std::optional<Product> added_by = std::nullopt;
    for (const Layer& l : layers) {
      const DeviceBuffer<float>& next = &l == &layers.back() ? final_norm : (&l + 1)->input_norm;
      multiply(kQkv, {.w = l.qkv, .norm = &l.input_norm, .added_by = added_by, .out = qkv.data()}, log);
      launch_fast_qkv(
          s,
          {qkv.data(), l.bias.data(), l.q_norm.data(), l.k_norm.data(), rope.data(), pos.data(), q.data(),
           k_new.data(), v_new.data(), n, shape.n_q_heads, shape.n_kv_heads, shape.head_dim, shape.norm_eps},
          log);
      kernel.launch(s, l.attention, log);
      multiply(kO, {.w = l.o, .in = &attended, .out = x.data(), .add = true, .next_norm = &l.ffn_norm}, log);
      multiply(kGateUp, {.w = l.gate_up, .norm = &l.ffn_norm, .added_by = kO, .gated = &act}, log);
      multiply(kDown, {.w = l.down, .in = &act, .out = x.data(), .add = true, .next_norm = &next}, log);
      added_by = kDown;
    }
    multiply(
        kHead,
        {.w = shape.tied ? embedding : head, .norm = &final_norm, .added_by = kDown, .out = logits.data()},
        log);
    launch_fast_argmax(s, {logits.data(), best.data(), n, shape.n_vocab}, log);
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
  Multiplier multiplier = Multiplier::gemv;
  MatrixShape matrices[kProducts];
  ProductArgs products[kProducts];  // of own products, but for what they read and write
  int product_smem[kProducts] = {};
  ProductClusters clusters;
  // Of own products: the residual's, by blocks of the product that added to it last.
  DeviceBuffer<float> squares;
  int plans[kProducts] = {};  // of cuBLASLt
  Bf16Buffer embedding, head;
  DeviceBuffer<float> final_norm, rope;
  std::vector<Layer> layers;
  DeviceBuffer<float> x, qkv, logits, importance, split_softmax, split_output;
  Bf16Buffer normed, q, k_new, v_new, attended, both, act;
  DeviceBuffer<unsigned long long> best;
  DeviceBuffer<int32_t> tokens, pos, step;
  DeviceBuffer<uint64_t> keys;  // [L, B * H, kMaxDecodeSplits]
  DeviceBuffer<uint32_t> arrivals, flags, barrier, head_arrivals;
  std::vector<Chain> chains;  // before the first layer, behind each
  DeviceBuffer<uint64_t> x_words, act_words;
  PinnedBuffer<AheadChoice> choices;  // [n_reports, B]
  PinnedBuffer<uint64_t> victims;     // [n_reports, B, L, victims_a_layer()]
  std::vector<Event> reported;        // [n_reports]
  int64_t n_queued = 0, n_taken = 0;
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
  const auto upload = [&](Bf16Buffer& to, int columns, const MatrixOrder& order, auto fill) {
    HostMatrix matrix(to.size(), columns, order);
    fill(matrix);
    matrix.upload(to);
  };
  const auto upload_product = [&](Bf16Buffer& to, Impl::Product product, auto fill) {
    upload(to, impl_->matrices[product].columns, impl_->matrices[product].order, fill);
  };
  upload(impl_->embedding, w.width, impl_->embedding_order(), [&](HostMatrix& m) { m.add(w.embedding); });
  if (!impl_->shape.tied) upload_product(impl_->head, Impl::kHead, [&](HostMatrix& m) { m.add(w.head); });
  impl_->final_norm.upload(w.final_norm);
  const auto q_rows = static_cast<int64_t>(impl_->q_rows()), kv_rows = static_cast<int64_t>(impl_->kv_rows());
  const bool neighbours = impl_->gates_in_product();
  for (size_t i = 0; i < w.layers.size(); ++i) {
    const LayerWeights& from = w.layers[i];
    Impl::Layer& to = impl_->layers[i];
    upload_product(to.qkv, Impl::kQkv, [&](HostMatrix& m) {
      m.add(from.q);
      m.add(from.k, q_rows);
      m.add(from.v, q_rows + kv_rows);
    });
    upload_product(to.o, Impl::kO, [&](HostMatrix& m) { m.add(from.o); });
    upload_product(to.gate_up, Impl::kGateUp, [&](HostMatrix& m) {
      m.add(from.gate, [&](int64_t r) { return neighbours ? chain_gated_row(r, false) : r; });
      m.add(from.up, [&](int64_t r) { return neighbours ? chain_gated_row(r, true) : w.ffn_width + r; });
    });
    upload_product(to.down, Impl::kDown, [&](HostMatrix& m) { m.add(from.down); });
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

std::string GraphDecoder::describe() const {
  return fmt::format("fused decode steps in bf16, at most {} ahead: products {}, attention in {} splits",
                     max_ahead(), products(), n_splits());
}

int GraphDecoder::n_sequences() const {
  return impl_->options.batch;
}

int GraphDecoder::victims_a_layer() const {
  return impl_->victims_a_layer();
}

void GraphDecoder::hold(const Held& held) {
  const GraphDecoderOptions& o = impl_->options;
  Impl::Layer& l = impl_->layers[static_cast<size_t>(held.layer)];
  const size_t n = held.positions.size(), n_slots = static_cast<size_t>(o.n_slots);
  const size_t item = static_cast<size_t>(held.sequence) * impl_->shape.n_kv_heads + held.kv_head;
  const int next = raw(held.next);
  // Where the step looks for a token's slot: behind those held, or in a victim's.
  if (n >= n_slots || (n != static_cast<size_t>(next) && n + 1 != n_slots))
    fail("decoder: token {} of {} slots: expected {} held, found {}", next, n_slots,
         std::min(static_cast<size_t>(next), n_slots - 1), n);
  const auto send = [&](const Bf16Buffer& to, std::span<const float> rows) {
    std::vector<uint16_t> halves(rows.size());
    for (size_t i = 0; i < rows.size(); ++i) halves[i] = f32_to_bf16(rows[i]);
    upload_to<uint16_t>(bits(to) + item * n_slots * impl_->shape.head_dim, halves);
  };
  send(l.k, held.keys);
  send(l.v, held.values);
  if (l.value_l1.size() > 0) upload_to(l.value_l1.data() + item * n_slots, held.value_l1);
  if (o.score == FusedScore::none) return;
  std::vector<uint64_t> slot(kMaxDecodeSplits, ~uint64_t{0});
  slot[0] = n;
  upload_to<uint64_t>(l.keys + item * kMaxDecodeSplits, slot);
  std::vector<uint16_t> protect((n_slots + 63) / 64 * 4);
  std::vector<int32_t> recent(static_cast<size_t>(std::max(o.recent, 1)), -1);  // -1: stays protected
  for (size_t i = 0; i < n; ++i) {
    const int position = raw(held.positions[i]);
    const bool pinned = position < held.first_free;
    if (!pinned && position < next - o.recent) continue;
    protect[i / 16] |= static_cast<uint16_t>(1u << (i % 16));
    if (!pinned) recent[static_cast<size_t>(position % o.recent)] = static_cast<int32_t>(i);
  }
  upload_to<uint16_t>(l.protect.data() + item * protect.size(), protect);
  upload_to<int32_t>(l.recent.data() + item * recent.size(), recent);
}

void GraphDecoder::begin(const std::vector<int32_t>& tokens, const std::vector<int32_t>& positions) {
  impl_->tokens.upload(tokens);
  impl_->pos.upload(positions);
  impl_->n_held = *std::max_element(positions.begin(), positions.end());
  KVLAPSE_CUDA_CHECK(cudaDeviceSynchronize());
}

void GraphDecoder::queue() {
  run(1);
  impl_->reported[static_cast<size_t>(impl_->n_queued++ % max_ahead())].record(impl_->stream);
}

int GraphDecoder::max_ahead() const {
  return impl_->options.n_reports;
}

AheadDevice::Step GraphDecoder::take() {
  const auto at = static_cast<size_t>(impl_->n_taken++ % max_ahead());
  const size_t choices = static_cast<size_t>(impl_->options.batch),
               victims = choices * impl_->layers.size() * impl_->victims_a_layer();
  impl_->reported[at].wait();
  return {std::span(impl_->choices.data() + at * choices, choices),
          std::span(impl_->victims.data() + at * victims, victims)};
}

uint64_t GraphDecoder::weight_bytes() const {
  const auto bytes = [&](int product) {
    const Impl::MatrixShape& m = impl_->matrices[product];
    return static_cast<uint64_t>(m.rows) * static_cast<uint64_t>(m.columns) * 2;
  };
  uint64_t layer = 0;
  for (int product : {Impl::kQkv, Impl::kO, Impl::kGateUp, Impl::kDown}) layer += bytes(product);
  return bytes(Impl::kHead) + layer * impl_->layers.size();
}

uint64_t GraphDecoder::kv_bytes() const {
  const int slots = std::min(impl_->n_held + 1, impl_->options.n_slots);
  return impl_->kernel.shape().kv_bytes(slots) * impl_->layers.size();
}

std::string GraphDecoder::products() const {
  switch (impl_->multiplier) {
    case Impl::Multiplier::chain: return "chain";
    case Impl::Multiplier::product: return "product";
    case Impl::Multiplier::cublas_lt: return "cublasLt";
    case Impl::Multiplier::gemv: break;
  }
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
