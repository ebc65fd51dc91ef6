// The product's kernel in the emulator against plain sums in fp64.
#include <gtest/gtest.h>

#include <cmath>
#include <set>
#include <vector>

#include "core/base/dtype.h"
#include "core/base/rng.h"
#include "tests/support/kernels/emulated_product.h"

namespace kvlapse {
namespace {

struct ProductCase {
  int n_rows = 5, columns = 64, n_outputs = 16, slab_groups = 2, cluster = 1;
  int n_clusters = 2;  // of the launch, at most
  int smem_bytes = 300000;
  bool add = false, gated = false;
  bool normed = false;  // its input is the first half of a norm, its output of the next one's if it adds
};

class ProductRun {
 public:
  ProductRun(const ProductCase& product, uint64_t seed) : c(product), random_(seed) {
    const int64_t rows = int64_t{c.n_outputs} * (c.gated ? 2 : 1), groups = chain_groups(rows);
    n_slabs_ = static_cast<int>((groups + c.slab_groups - 1) / c.slab_groups);
    // NaN where no element of the matrix lies: it must not reach an output.
    weights_.assign(static_cast<size_t>(n_slabs_ * c.slab_groups * kChainTileRows) * c.columns, 0x7fff);
    matrix_.resize(static_cast<size_t>(rows) * c.columns);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t column = 0; column < c.columns; ++column) {
        const uint16_t value = f32_to_bf16(uniform() / std::sqrt(static_cast<float>(c.columns)) * 4);
        matrix_[r * c.columns + column] = bf16_to_f32(value);
        const int64_t at = c.gated ? chain_gated_row(r % c.n_outputs, r >= c.n_outputs) : r;
        weights_[product_index(at, column, c.columns, c.slab_groups)] = value;
      }
    input_.resize(static_cast<size_t>(c.n_rows) * c.columns);
    for (uint16_t& value : input_) value = f32_to_bf16(uniform());
    out_.resize(static_cast<size_t>(c.n_rows) * c.n_outputs);
    for (float& value : out_) value = uniform();
    gated_.resize(out_.size());
    for (int i = 0; i < kSquares * kProductMostRows; ++i) squares_.push_back(uniform() + 1.5f);
    for (int i = 0; i < c.n_outputs; ++i) next_norm_.push_back(uniform());
    scaled_.resize(out_.size());
    next_squares_.resize(static_cast<size_t>(c.n_clusters) * c.cluster * kProductMostRows);
  }

  double factor(int b) const {
    double sum = 0;
    for (int i = 0; i < kSquares; ++i) sum += squares_[static_cast<size_t>(i) * kProductMostRows + b];
    return c.normed ? 1 / std::sqrt(sum / c.columns + kEps) : 1;
  }
  // What the next norm has of outputs.
  void expect_next_norm(const std::vector<double>& outputs) const {
    const size_t n = static_cast<size_t>(c.n_outputs);
    for (size_t b = 0; b < static_cast<size_t>(c.n_rows); ++b) {
      double expected = 0, sum = 0;
      for (size_t i = 0; i < n; ++i) {
        const double value = outputs[b * n + i];
        expected += value * value;
        ASSERT_NEAR(bf16_to_f32(scaled_[b * n + i]), value * next_norm_[i], 0.005 * std::abs(value) + 1e-4);
      }
      for (size_t i = b; i < next_squares_.size(); i += kProductMostRows) sum += next_squares_[i];
      ASSERT_NEAR(sum, expected, 1e-5 * expected);
    }
  }

  std::vector<double> expected() const {
    std::vector<double> all;
    for (int b = 0; b < c.n_rows; ++b)
      for (int r = 0; r < c.n_outputs; ++r) {
        const double y = sum(b, r);
        all.push_back(c.gated ? y / (1 + std::exp(-y)) * sum(b, c.n_outputs + r)
                              : y + (c.add ? out_[static_cast<size_t>(b) * c.n_outputs + r] : 0));
      }
    return all;
  }
  std::vector<double> run(uint64_t seed) {
    ProductArgs a{};
    a.weights = weights_.data();
    std::vector<uint16_t> storage(input_.size() + 8);  // 16-byte aligned inside
    auto* input = reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(storage.data()) + 15) / 16 * 16);
    std::copy(input_.begin(), input_.end(), input);
    a.input = input;
    a.out = out_.data();
    a.gated = c.gated ? gated_.data() : nullptr;
    a.n_rows = c.n_rows, a.columns = c.columns, a.n_outputs = c.n_outputs;
    a.n_slabs = n_slabs_, a.slab_groups = c.slab_groups, a.cluster = c.cluster, a.add = c.add;
    a.eps = kEps;
    if (c.normed) a.squares = squares_.data(), a.n_squares = kSquares;
    if (c.normed && c.add)
      a.scaled = scaled_.data(), a.next_norm = next_norm_.data(), a.next_squares = next_squares_.data();
    const int smem = plan_product(a, c.smem_bytes);
    EXPECT_GT(smem, 0);
    run_product_emulated(a, smem, std::min(c.n_clusters, n_slabs_) * c.cluster, seed);
    if (!c.gated) return {out_.begin(), out_.end()};
    std::vector<double> all;
    for (uint16_t value : gated_) all.push_back(bf16_to_f32(value));
    return all;
  }

  ProductCase c;

 private:
  float uniform() {
    random_ = mix64(random_);
    return static_cast<float>(random_ >> 40) * 0x1p-23f - 1;
  }
  double sum(int b, int r) const {
    double total = 0;
    for (int column = 0; column < c.columns; ++column)
      total += static_cast<double>(matrix_[static_cast<size_t>(r) * c.columns + column]) *
               bf16_to_f32(input_[static_cast<size_t>(b) * c.columns + column]);
    return total * factor(b);
  }

  static constexpr int kSquares = 37;
  static constexpr float kEps = 1e-6f;
  uint64_t random_;
  int n_slabs_ = 0;
  std::vector<uint16_t> weights_, input_, gated_;
  std::vector<uint16_t> scaled_;
  std::vector<float> matrix_, out_, squares_, next_norm_, next_squares_;
};

void expect_right(const ProductCase& c, uint64_t seed) {
  SCOPED_TRACE(::testing::Message() << c.n_rows << " rows, " << c.columns << " columns, " << c.n_outputs
                                    << " outputs, slabs of " << c.slab_groups << ", " << c.n_clusters
                                    << " clusters of " << c.cluster << ", " << c.smem_bytes << " bytes, add "
                                    << c.add << ", gated " << c.gated << ", normed " << c.normed);
  ProductRun product(c, seed);
  const std::vector<double> expected = product.expected(), found = product.run(seed);
  double largest = 0, worst = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(expected[i]));
    worst = std::max(worst, std::isnan(found[i]) ? INFINITY : std::abs(found[i] - expected[i]));
  }
  EXPECT_LT(worst / largest, c.gated ? 0.004 : 2e-6);
  if (c.normed && c.add) product.expect_next_norm(found);
}

TEST(Product, TilesHoldEveryElementOnce) {
  for (int slab_groups : {2, 3}) {
    std::set<int64_t> at;
    for (int64_t r = 0; r < 96; ++r)
      for (int64_t c = 0; c < 192; ++c) at.insert(product_index(r, c, 192, slab_groups));
    EXPECT_EQ(at.size(), 96u * 192u);
    EXPECT_EQ(*at.rbegin(), 96 * 192 - 1);
  }
  // A lane's eight columns of two tiles are neighbours in the matrix.
  for (int64_t c = 0; c < 8; ++c)
    EXPECT_EQ(product_index(2, 8 + c, 64, 1), c / 4 * 256 + (2 * 4 + 1) * 8 + c % 4 / 2 * 4 + c % 2);
}

TEST(Product, IsTheSumsOfFp64) {
  for (int n_rows : {1, 5, 8, 9, 16, 17, 32})
    expect_right({.n_rows = n_rows, .columns = 320, .n_outputs = 40, .add = n_rows % 2 == 0}, 10 + n_rows);
}

// Every kernel of the table: one slab a cluster, several of a block.
TEST(Product, EveryDivisionAndCluster) {
  for (int groups : {2, 4, 6, 8, 12})
    for (int cluster : {1, 2})
      for (int n_rows : {7, 12, 30}) {
        const auto seed = static_cast<uint64_t>(groups + cluster + n_rows);
        expect_right({.n_rows = n_rows,
                      .columns = 576,
                      .n_outputs = groups * 40,
                      .slab_groups = groups,
                      .cluster = cluster,
                      .n_clusters = cluster == 1 ? 2 : 3,
                      .add = true,
                      .normed = true},
                     seed);
        expect_right({.n_rows = n_rows,
                      .columns = 512,
                      .n_outputs = groups * 12,
                      .slab_groups = groups,
                      .cluster = cluster,
                      .gated = true,
                      .normed = n_rows == 12},
                     seed);
      }
}

// More chunks than buffers and warps, few stages, a rest.
TEST(Product, RingsOfAnyDepthAndAnyNumberOfColumns) {
  for (int smem_bytes : {180000, 232448})
    for (int columns : {64, 448, 2752, 4992})
      for (int groups : {4, 12})
        expect_right({.n_rows = 6,
                      .columns = columns,
                      .n_outputs = 3 * groups * 16 + 8,
                      .slab_groups = groups,
                      .smem_bytes = smem_bytes,
                      .add = true},
                     static_cast<uint64_t>(columns + smem_bytes));
  // Fewer stages than copies would be under way.
  expect_right({.n_rows = 6, .columns = 1984, .n_outputs = 120, .slab_groups = 8, .smem_bytes = 95000}, 5);
}

// Neither the order in which threads run nor how slabs are dealt to clusters changes a bit.
TEST(Product, SameBitsWithAnySeedAndAnyNumberOfClusters) {
  for (const ProductCase& c :
       {ProductCase{.n_rows = 20, .columns = 832, .n_outputs = 96},
        {.n_rows = 20, .columns = 832, .n_outputs = 96, .cluster = 2, .n_clusters = 3}}) {
    const std::vector<double> first = ProductRun(c, 4).run(1);
    for (auto [clusters, seed] : {std::pair{2, 2}, {1, 3}, {3, 4}}) {
      ProductCase again = c;
      if (c.cluster == 1) again.n_clusters = clusters;
      EXPECT_EQ(ProductRun(again, 4).run(seed), first);
    }
  }
}

TEST(Product, SlabsAndPlans) {
  ProductClusters h200;
  h200.of[1] = 132, h200.of[2] = 66;
  ProductArgs a{};
  a.n_rows = 32, a.columns = 4096;
  const auto expect_slabs = [&](int64_t n_groups, int cluster, int groups, int slabs) {
    choose_product_slabs(a, n_groups, h200);
    EXPECT_EQ(a.cluster, cluster) << n_groups;
    EXPECT_EQ(a.slab_groups, groups) << n_groups;
    EXPECT_EQ(a.n_slabs, slabs) << n_groups;
  };
  // Qwen3-8B: q, k, v; o; the vocabulary; gate and up.
  expect_slabs(384, 2, 6, 64);
  expect_slabs(256, 2, 4, 64);
  expect_slabs(9496, 1, 12, 792);
  expect_slabs(1536, 1, 12, 128);
  EXPECT_EQ(product_launch_blocks(a, h200), 128);
  a.n_outputs = 24576;
  const int smem = plan_product(a, 232448);
  EXPECT_GT(smem, 200000);
  EXPECT_LE(smem, 232448);
  EXPECT_EQ(a.n_stages, 4);
  EXPECT_EQ(plan_product(a, 120000), 0);
  EXPECT_EQ(product_bytes(a), 24576ull * 4096 * 2 + 32 * (4096 * 2 + 24576 * 4));
  a.columns = 4100;
  EXPECT_EQ(plan_product(a, 232448), 0);
  a.columns = 4096, a.n_rows = 33;
  EXPECT_EQ(plan_product(a, 232448), 0);
  choose_product_slabs(a, 256, {});
  a.n_rows = 32;
  EXPECT_EQ(plan_product(a, 232448), 0);
  // Few columns are not divided.
  a.columns = 256;
  expect_slabs(256, 1, 2, 128);
}

}  // namespace
}  // namespace kvlapse
