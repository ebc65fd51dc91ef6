// The product chain's kernel in the emulator against plain sums in fp64.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "tests/support/kernels/emulated_chain.h"

namespace kvlapse {
namespace {

constexpr float kEps = 1e-6f;

// 16-byte aligned, as the kernel reads it.
template <class T>
class Aligned {
 public:
  explicit Aligned(size_t n = 0) : storage_(n + 16 / sizeof(T)), size_(n) {}
  Aligned(const Aligned& other) : Aligned(other.size_) { std::copy_n(other.data(), size_, data()); }
  Aligned& operator=(Aligned other) {
    storage_.swap(other.storage_);
    std::swap(size_, other.size_);
    return *this;
  }
  T* data() const {
    const auto at = reinterpret_cast<uintptr_t>(storage_.data());
    return reinterpret_cast<T*>((at + 15) / 16 * 16);
  }
  T& operator[](size_t i) const { return data()[i]; }
  size_t size() const { return size_; }
  std::vector<T> values() const { return {data(), data() + size_}; }

 private:
  std::vector<T> storage_;
  size_t size_ = 0;
};

struct Geometry {
  int batch = 1, width = 64, ffn = 96, n_q_heads = 4, n_kv_heads = 2, head_dim = 32, n_vocab = 72;
  bool qk_norm = true, bias = false;
  int n_heads() const { return n_q_heads + 2 * n_kv_heads; }
  int q_width() const { return n_q_heads * head_dim; }
};

class Chain {
 public:
  Chain(const Geometry& geometry, uint64_t seed) : g(geometry), random_(seed) {
    const auto rows = static_cast<size_t>(g.batch);
    o = matrix(g.width, g.q_width());
    gate_up = matrix(2 * g.ffn, g.width);
    down = matrix(g.width, g.ffn);
    qkv = matrix(g.n_heads() * g.head_dim, g.width);
    head = matrix(static_cast<int>(chain_groups(g.n_vocab)) * kChainTileRows, g.width);
    x = floats(rows * g.width, 1);
    ffn_norm = floats(g.width, 1), next_norm = floats(g.width, 1);
    attended = halves(rows * g.q_width(), 1);
    q_norm = floats(g.head_dim, 1), k_norm = floats(g.head_dim, 1);
    bias = floats(g.n_heads() * g.head_dim, 1);
    rope = floats(static_cast<size_t>(kPositions) * g.head_dim, 1);
    for (int b = 0; b < g.batch; ++b) pos.push_back((b * 3 + 2) % kPositions);
    x_words = Aligned<uint64_t>(rows * g.width);
    act_words = Aligned<uint64_t>(rows * g.ffn / 2);
    logits = Aligned<float>(rows * g.n_vocab);
    qkv_out = Aligned<float>(rows * g.n_heads() * g.head_dim);
    q = Aligned<uint16_t>(rows * g.q_width());
    k = Aligned<uint16_t>(rows * g.n_kv_heads * g.head_dim);
    v = Aligned<uint16_t>(rows * g.n_kv_heads * g.head_dim);
    best.assign(rows, 0);
    arrivals.assign(g.n_heads(), 0);
  }

  // Everything between two attentions, or the last layer's with the logits.
  ChainArgs args(bool last) {
    ChainArgs a{};
    const auto groups = [](int rows) { return static_cast<int32_t>(chain_groups(rows)); };
    a.phases[0] = {o.data(),    nullptr, attended.data(),      groups(g.width),
                   g.q_width(), g.width, ChainOutput::residual};
    a.phases[1] = {gate_up.data(), ffn_norm.data(), nullptr,           groups(2 * g.ffn),
                   g.width,        g.ffn,           ChainOutput::gated};
    a.phases[2] = {down.data(), nullptr, nullptr, groups(g.width), g.ffn, g.width, ChainOutput::residual};
    const int qkv_rows = g.n_heads() * g.head_dim;
    a.phases[3] = last ? ChainPhase{head.data(), next_norm.data(),   nullptr, groups(g.n_vocab), g.width,
                                    g.n_vocab,   ChainOutput::logits}
                       : ChainPhase{qkv.data(), next_norm.data(), nullptr,           groups(qkv_rows),
                                    g.width,    qkv_rows,         ChainOutput::heads};
    a.n_phases = 4;
    a.x = x.data(), a.x_words = x_words.data(), a.act_words = act_words.data(), a.logits = logits.data(),
    a.best = best.data();
    a.qkv = qkv_out.data();
    a.bias = g.bias ? bias.data() : nullptr;
    a.q_norm = g.qk_norm ? q_norm.data() : nullptr, a.k_norm = g.qk_norm ? k_norm.data() : nullptr;
    a.rope = rope.data(), a.pos = pos.data();
    a.q = q.data(), a.k = k.data(), a.v = v.data();
    a.head_arrivals = arrivals.data();
    a.number = launches++ % 2 + 1;  // as of a model of two layers
    a.n_rows = g.batch, a.n_q_heads = g.n_q_heads, a.n_kv_heads = g.n_kv_heads, a.head_dim = g.head_dim;
    a.eps = kEps;
    return a;
  }
  void run(bool last, int n_blocks, uint64_t seed, int stages = kChainMostStages) {
    ChainArgs a = args(last);
    const int most = plan_chain(a, 1 << 20);
    ASSERT_GT(most, 0);
    const int smem = plan_chain(a, most - (a.n_stages - stages) * kChainStageBytes);
    ASSERT_EQ(a.n_stages, stages);
    run_chain_emulated(a, smem, n_blocks, seed);
  }

  // What the kernel should make, in fp64 except where values are stored.
  struct Expected {
    std::vector<double> x, act, next;  // `next`: logits, or q, k and v of a sequence one behind the other
  };
  Expected expected(bool last) const {
    Expected e;
    for (int b = 0; b < g.batch; ++b) {
      std::vector<double> row(g.width), input(g.q_width());
      for (int c = 0; c < g.q_width(); ++c) input[c] = bf16_to_f32(attended[b * g.q_width() + c]);
      const std::vector<double> attention = times(o, g.width, input);
      for (int c = 0; c < g.width; ++c) row[c] = x[b * g.width + c] + attention[c];
      const std::vector<double> both = times(gate_up, 2 * g.ffn, normed(row, ffn_norm));
      std::vector<double> activation(g.ffn);
      for (int i = 0; i < g.ffn; ++i) {
        const double gate = both[chain_gated_row(i, false)], up = both[chain_gated_row(i, true)];
        activation[i] = bf16_to_f32(f32_to_bf16(static_cast<float>(gate / (1 + std::exp(-gate)) * up)));
      }
      const std::vector<double> added = times(down, g.width, activation);
      for (int c = 0; c < g.width; ++c) row[c] += added[c];
      std::vector<double> next =
          times(last ? head : qkv, last ? g.n_vocab : g.n_heads() * g.head_dim, normed(row, next_norm));
      if (!last) finish_heads(b, next);
      e.x.insert(e.x.end(), row.begin(), row.end());
      e.act.insert(e.act.end(), activation.begin(), activation.end());
      e.next.insert(e.next.end(), next.begin(), next.end());
    }
    return e;
  }
  // What it made of `next`.
  std::vector<double> made(bool last) const {
    if (last) {
      const std::vector<float> all = logits.values();
      return {all.begin(), all.end()};
    }
    std::vector<double> all;
    for (int b = 0; b < g.batch; ++b)
      for (const auto& [rows, heads] : {std::pair{&q, g.n_q_heads}, {&k, g.n_kv_heads}, {&v, g.n_kv_heads}})
        for (int i = 0; i < heads * g.head_dim; ++i)
          all.push_back(bf16_to_f32((*rows)[b * heads * g.head_dim + i]));
    return all;
  }

  Geometry g;
  Aligned<uint16_t> o, gate_up, down, qkv, head, attended, q, k, v;
  Aligned<uint64_t> x_words, act_words;
  Aligned<float> x, ffn_norm, next_norm, q_norm, k_norm, bias, rope, logits, qkv_out;
  std::vector<int32_t> pos;
  std::vector<uint64_t> best;
  std::vector<uint32_t> arrivals;
  int launches = 0;

 private:
  static constexpr int kPositions = 8;

  float uniform() {
    random_ = mix64(random_);
    return static_cast<float>(random_ >> 40) * 0x1p-23f - 1;
  }
  Aligned<float> floats(size_t n, float size) {
    Aligned<float> values(n);
    for (size_t i = 0; i < n; ++i) values[i] = uniform() * size;
    return values;
  }
  Aligned<uint16_t> halves(size_t n, float size) {
    Aligned<uint16_t> values(n);
    for (size_t i = 0; i < n; ++i) values[i] = f32_to_bf16(uniform() * size);
    return values;
  }
  Aligned<uint16_t> matrix(int rows, int columns) {
    return halves(static_cast<size_t>(rows) * columns, 2 / std::sqrt(static_cast<float>(columns)));
  }
  static std::vector<double> times(const Aligned<uint16_t>& tiles, int rows, const std::vector<double>& in) {
    const auto columns = static_cast<int64_t>(in.size());
    std::vector<double> out(rows);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0; c < columns; ++c) out[r] += bf16_to_f32(tiles[chain_index(r, c, columns)]) * in[c];
    return out;
  }
  static std::vector<double> normed(std::vector<double> row, const Aligned<float>& weight) {
    double squares = 0;
    for (double value : row) squares += value * value;
    const double factor = 1 / std::sqrt(squares / static_cast<double>(row.size()) + kEps);
    for (size_t i = 0; i < row.size(); ++i) row[i] *= factor * weight[i];
    return row;
  }
  void finish_heads(int b, std::vector<double>& all) const {
    const int half = g.head_dim / 2;
    for (int h = 0; h < g.n_heads(); ++h) {
      double* row = all.data() + h * g.head_dim;
      const bool is_v = h >= g.n_q_heads + g.n_kv_heads;
      double squares = 0;
      for (int d = 0; d < g.head_dim; ++d) {
        if (g.bias) row[d] += bias[h * g.head_dim + d];
        squares += row[d] * row[d];
      }
      if (is_v) continue;
      if (g.qk_norm)
        for (int d = 0; d < g.head_dim; ++d)
          row[d] *= (h < g.n_q_heads ? q_norm : k_norm)[d] / std::sqrt(squares / g.head_dim + kEps);
      for (int d = 0; d < half; ++d) {
        const double low = row[d], high = row[d + half], c = rope[pos[b] * g.head_dim + d],
                     s = rope[pos[b] * g.head_dim + half + d];
        row[d] = low * c - high * s;
        row[d + half] = high * c + low * s;
      }
    }
  }

  uint64_t random_;
};

// Largest difference, relative to the largest value.
template <class A>
double difference(const A& found, const std::vector<double>& expected) {
  EXPECT_EQ(found.size(), expected.size());
  double largest = 0, worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    worst = std::max(worst, std::isnan(found[i]) ? INFINITY : std::abs(found[i] - expected[i]));
  }
  return worst / largest;
}

std::vector<double> activations(const Aligned<uint64_t>& words) {
  std::vector<double> all;
  for (uint64_t word : words.values())
    for (int shift : {0, 16}) all.push_back(bf16_to_f32(static_cast<uint16_t>(word >> shift)));
  return all;
}

void expect_right(const Geometry& g, bool last, int n_blocks, uint64_t seed, int stages) {
  SCOPED_TRACE("batch " + std::to_string(g.batch) + ", " + std::to_string(n_blocks) + " blocks, " +
               std::to_string(stages) + " stages, last " + std::to_string(last));
  Chain chain(g, seed);
  const Chain::Expected expected = chain.expected(last);
  chain.run(last, n_blocks, seed, stages);
  // An activation may round to the other neighbour.
  EXPECT_LT(difference(activations(chain.act_words), expected.act), 0.006);
  EXPECT_LT(difference(chain.x, expected.x), 1e-3);
  EXPECT_LT(difference(chain.made(last), expected.next), last ? 2e-3 : 0.01);
  for (uint32_t count : chain.arrivals) EXPECT_EQ(count, 0u);
  if (!last) return;
  for (int b = 0; b < g.batch; ++b) {
    const float* row = chain.logits.data() + b * g.n_vocab;
    EXPECT_EQ(~static_cast<uint32_t>(chain.best[b]), std::max_element(row, row + g.n_vocab) - row);
  }
}

TEST(ProductChain, TilesHoldEveryElementOnce) {
  std::set<int64_t> at;
  for (int64_t r = 0; r < 48; ++r)
    for (int64_t c = 0; c < 80; ++c) at.insert(chain_index(r, c, 80));
  EXPECT_EQ(at.size(), 48u * 80u);
  EXPECT_EQ(*at.rbegin(), 48 * 80 - 1);
  EXPECT_EQ(chain_index(3, 5, 80), (3 * 4 + 2) * 8 + 1);
  EXPECT_EQ(chain_index(16 + 9, 32 + 14, 80), (5 + 2) * 256 + (1 * 4 + 3) * 8 + 6);
  EXPECT_EQ(chain_gated_row(9, false), 17);
  EXPECT_EQ(chain_gated_row(9, true), 25);
}

TEST(ProductChain, IsTheSumsOfFp64) {
  for (bool last : {false, true})
    for (int batch : {1, 2, 3, 4}) expect_right({.batch = batch}, last, 3, 11 + batch, 8 + batch);
}

// Chunks of whole columns and a rest, more of them than warps; more blocks than groups; one block.
TEST(ProductChain, ManyColumnsAndAnyNumberOfBlocks) {
  Geometry wide{.batch = 1, .width = 2096, .ffn = 48, .n_q_heads = 2, .n_kv_heads = 1, .n_vocab = 33};
  expect_right(wide, false, 2, 5, 9);
  Geometry deep{.batch = 2, .width = 48, .ffn = 4384, .n_q_heads = 1, .n_kv_heads = 1, .head_dim = 64};
  expect_right(deep, true, 3, 6, 11);
  expect_right({}, false, 1, 7, 8);
  expect_right({}, true, 13, 8, 32);
}

// Stages go from warp to warp: a chunk lands while an older one of the same stage is still under way.
TEST(ProductChain, RingsOfAnyDepthWithCopiesInAnyOrder) {
  const Geometry g{.width = 2048, .ffn = 112, .n_q_heads = 1, .n_kv_heads = 1};
  for (int stages : {8, 9, 11, 15, 17})
    for (uint64_t seed : {1, 2, 3}) expect_right(g, false, 2, seed, stages);
}

TEST(ProductChain, HeadsWithBiasWithoutNormAndOfEverySize) {
  for (int head_dim : {32, 64, 128, 256})
    expect_right({.n_q_heads = 2, .n_kv_heads = 1, .head_dim = head_dim, .qk_norm = false, .bias = true},
                 false, 4, 9, 8);
}

// Neither the order in which threads run nor how groups are dealt to blocks changes a bit.
TEST(ProductChain, SameBitsWithAnySeedAndAnyNumberOfBlocks) {
  const Geometry g{.batch = 3, .width = 320};
  Chain first(g, 4);
  first.run(false, 3, 1, 8);
  for (auto [blocks, seed] : {std::pair{3, 2}, {3, 3}, {5, 4}}) {
    Chain again(g, 4);
    again.run(false, blocks, seed, 8);
    EXPECT_EQ(again.x.values(), first.x.values());
    EXPECT_EQ(again.q.values(), first.q.values());
    EXPECT_EQ(again.v.values(), first.v.values());
  }
}

// A launch takes no word of those before it, whose numbers come again, and finds counters as they did.
TEST(ProductChain, LaunchesFollowOneAnother) {
  Chain chain({.batch = 2}, 21);
  for (int i = 0; i < 5; ++i) {
    const Chain::Expected expected = chain.expected(false);
    chain.run(false, 3, 30 + i, 10);
    EXPECT_LT(difference(chain.made(false), expected.next), 0.01) << i;
  }
}

TEST(ProductChain, PlanRefusesWhatDoesNotFit) {
  Chain chain({.batch = 4}, 1);
  ChainArgs a = chain.args(false);
  EXPECT_GT(plan_chain(a, 232448), 0);
  EXPECT_EQ(plan_chain(a, 60000), 0);
  a.n_rows = 5;
  EXPECT_EQ(plan_chain(a, 232448), 0);
  EXPECT_EQ(chain_bytes(a), 2u * (64 * 128 + 192 * 64 + 64 * 96 + 256 * 64));
}

}  // namespace
}  // namespace kvlapse
