#include "core/base/vector_math.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "core/base/row_math.h"
#include "core/base/scalar_math.h"
#include "tests/support/core/every_target.h"

namespace kvlapse {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

std::vector<float> random_values(std::mt19937& rng, size_t n, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<float> values(n);
  for (float& v : values) v = normal(rng);
  return values;
}

void expect_same_bits(std::span<const float> a, std::span<const float> b, const char* what, size_t n) {
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i)
    ASSERT_EQ(std::bit_cast<uint32_t>(a[i]), std::bit_cast<uint32_t>(b[i]))
        << what << " n=" << n << " element " << i << ": " << a[i] << " and " << b[i];
}

// Sizes below, at and around every vector width, and a few large ones.
std::vector<size_t> sizes() {
  std::vector<size_t> n;
  for (size_t i = 0; i <= 70; ++i) n.push_back(i);
  for (size_t i : {127, 128, 129, 255, 1000, 4096, 4099}) n.push_back(i);
  return n;
}

class VectorMath : public EveryTarget {};
class RowMath : public EveryTarget {};
INSTANTIATE_TEST_SUITE_P(Simd, VectorMath, simd_targets(), simd_target_name);
INSTANTIATE_TEST_SUITE_P(Simd, RowMath, simd_targets(), simd_target_name);

TEST_P(VectorMath, EqualsTheScalarDefinitionBitForBit) {
  std::mt19937 rng(1);
  for (size_t n : sizes())
    for (float scale : {1.0f, 1e-22f, 30.0f}) {
      std::vector<float> a = random_values(rng, n, scale), b = random_values(rng, n, 1.0f);
      EXPECT_EQ(std::bit_cast<uint32_t>(dot(a.data(), b.data(), n)),
                std::bit_cast<uint32_t>(scalar::dot(a.data(), b.data(), n)))
          << n;
      EXPECT_EQ(std::bit_cast<uint32_t>(sum(a)), std::bit_cast<uint32_t>(scalar::sum(a))) << n;
      EXPECT_EQ(std::bit_cast<uint32_t>(l1_norm(a)), std::bit_cast<uint32_t>(scalar::l1_norm(a))) << n;
      EXPECT_EQ(std::bit_cast<uint32_t>(max_value(a)), std::bit_cast<uint32_t>(scalar::max_value(a))) << n;

      // One element more than is written, so that a store past the end shows.
      std::vector<float> x(n + 1, 7.0f), y(n + 1, 7.0f);
      auto both = [&](auto&& simd, auto&& plain, const char* what) {
        simd(std::span(x).first(n));
        plain(std::span(y).first(n));
        expect_same_bits(x, y, what, n);
      };
      both([&](auto out) { exp_minus(a, 0.5f, out); }, [&](auto out) { scalar::exp_minus(a, 0.5f, out); },
           "exp_minus");
      const float base = softmax_base(max_value(a));
      both([&](auto out) { exp_over(a, base, out); }, [&](auto out) { scalar::exp_over(a, base, out); },
           "exp_over");
      float lse = 0, reference = 0;
      both([&](auto out) { lse = softmax(a, out); }, [&](auto out) { reference = scalar::softmax(a, out); },
           "softmax");
      EXPECT_EQ(std::bit_cast<uint32_t>(lse), std::bit_cast<uint32_t>(reference));
      both([&](auto out) { multiply_add(a, b, out); }, [&](auto out) { scalar::multiply_add(a, b, out); },
           "multiply_add");
      both([&](auto out) { add_scaled(0.3f, b, out); }, [&](auto out) { scalar::add_scaled(0.3f, b, out); },
           "add_scaled");
      both([&](auto out) { kvlapse::scale(1.7f, out); }, [&](auto out) { scalar::scale(1.7f, out); },
           "scale");
    }
}

TEST_P(VectorMath, SpecialValues) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> odd = {0.0f,   -0.0f,  kInf,   -kInf,   nan,   88.36f, 88.38f,
                            -87.2f, -87.4f, 1e-40f, -1e-40f, 88.4f, 1.0f};
  for (size_t shift = 0; shift < odd.size(); ++shift) {  // every value in every lane
    std::rotate(odd.begin(), odd.begin() + 1, odd.end());
    std::vector<float> x(odd.size()), y(odd.size());
    exp_minus(odd, 0.0f, x);
    scalar::exp_minus(odd, 0.0f, y);
    for (size_t i = 0; i < odd.size(); ++i) {
      if (std::isnan(odd[i])) {
        EXPECT_TRUE(std::isnan(x[i]) && std::isnan(y[i]));
      } else {
        EXPECT_EQ(std::bit_cast<uint32_t>(x[i]), std::bit_cast<uint32_t>(y[i])) << odd[i];
      }
    }
    EXPECT_EQ(max_value(odd), kInf);
  }
  std::vector<float> zeros(20, -0.0f);
  EXPECT_FALSE(std::signbit(max_value(zeros)));
  EXPECT_EQ(max_value({}), -kInf);

  std::vector<float> nothing(21, -kInf);
  EXPECT_EQ(softmax(nothing, nothing), -kInf);
  EXPECT_EQ(sum(nothing), 0.0f);
}

TEST_P(VectorMath, ExpIsAccurate) {
  std::vector<float> x, y;
  for (float v = -87.2f; v < 88.3f; v += 0.01237f) x.push_back(v);
  y.resize(x.size());
  exp_minus(x, 0.0f, y);
  for (size_t i = 0; i < x.size(); ++i) {
    double exact = std::exp(static_cast<double>(x[i]));
    ASSERT_LT(std::abs(y[i] - exact) / exact, 2e-7) << x[i];
  }
}

TEST_P(VectorMath, SoftmaxIsAccurate) {
  std::mt19937 rng(5);
  for (float scale : {0.1f, 3.0f, 200.0f, 20000.0f}) {
    const std::vector<float> logits = random_values(rng, 777, scale);
    const double most = max_value(logits);
    double total = 0;
    for (float x : logits) total += std::exp(x - most);
    std::vector<float> weights(logits.size());
    EXPECT_NEAR(softmax(logits, weights), most + std::log(total), 1e-6 * most);
    const double tolerance = 4e-7 + 2e-10 * scale;  // of the largest logit's own rounding
    for (size_t i = 0; i < logits.size(); ++i) {
      const double exact = std::exp(logits[i] - most) / total;
      ASSERT_NEAR(weights[i], exact, tolerance * exact + 1e-40) << logits[i] << " of " << scale;
    }
  }
}

// What replay rests on: a row's weights are the same bits from exponentials over a larger row's base.
TEST_P(VectorMath, WeightsDoNotDependOnTheBase) {
  std::mt19937 rng(6);
  for (float scale : {1.0f, 10.0f, 60.0f}) {
    const std::vector<float> logits = random_values(rng, 333, scale);
    std::vector<float> own(logits.size()), shared(logits.size());
    softmax(logits, own);
    const float base = softmax_base(max_value(logits));
    for (int above = 0; above <= 12; ++above) {
      exp_over(logits, base + static_cast<float>(above), shared);
      const float total = sum(shared);
      if (total < kLeastSharedSum) continue;
      EXPECT_TRUE(above <= 6 || scale < 10) << "a row of few large weights has little sum";
      kvlapse::scale(1.0f / total, shared);
      expect_same_bits(own, shared, "weights", own.size());
    }
  }
}

TEST_P(VectorMath, SoftmaxOfWhatIsNotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (float odd : {nan, kInf})
    for (size_t n : {3, 40}) {
      std::vector<float> logits(n, 1.0f), weights(n);
      logits[n / 2] = odd;
      softmax(logits, weights);
      EXPECT_TRUE(std::isnan(weights[n / 2])) << odd;
    }
  std::vector<float> far = {1e9f, -1e9f, 1e9f, 0}, weights(4);
  softmax(far, weights);
  EXPECT_EQ(weights, (std::vector<float>{0.5f, 0, 0.5f, 0}));
}

TEST_P(RowMath, EqualsTheScalarDefinitionBitForBit) {
  std::mt19937 rng(2);
  for (DType type : {DType::f32, DType::f16, DType::bf16})
    for (size_t dim : {1, 7, 16, 24, 64, 80, 100, 128})
      for (size_t n : {0, 1, 7, 8, 9, 31})
        for (size_t n_x : {1, 2, 3, 4, 5, 7}) {
          const size_t stride = dim + 3, n_rows = n + 5;
          std::vector<float> plain = random_values(rng, n_rows * stride, 1.0f);
          std::vector<uint16_t> half(plain.size());
          for (size_t i = 0; i < plain.size(); ++i)
            half[i] = type == DType::f16 ? f32_to_f16(plain[i]) : f32_to_bf16(plain[i]);
          const int32_t* no_index = nullptr;
          std::vector<int32_t> index(n);
          for (int32_t& i : index) i = static_cast<int32_t>(rng() % n_rows);
          for (const int32_t* gather : {no_index, static_cast<const int32_t*>(index.data())}) {
            RowView rows{type == DType::f32 ? static_cast<const void*>(plain.data()) : half.data(), type,
                         stride, gather};
            std::vector<float> x = random_values(rng, n_x * dim, 1.0f),
                               weights = random_values(rng, n_x * (n + 1), 1.0f);
            std::vector<float> a(n_x * (n + 2), 5.0f), b = a, c(n_x * (dim + 1), 5.0f), d = c;
            dot_rows(rows, n, dim, x.data(), dim, n_x, 0.37f, a.data(), n + 2);
            scalar::dot_rows(rows, n, dim, x.data(), dim, n_x, 0.37f, b.data(), n + 2);
            expect_same_bits(a, b, "dot_rows", n);
            weighted_rows(rows, n, dim, weights.data(), n + 1, n_x, c.data(), dim + 1);
            scalar::weighted_rows(rows, n, dim, weights.data(), n + 1, n_x, d.data(), dim + 1);
            expect_same_bits(c, d, "weighted_rows", n);
          }
        }
}

TEST_P(RowMath, DotsFromColumnsAreDotsOfRowsBitForBit) {
  std::mt19937 rng(5);
  for (DType type : {DType::f32, DType::f16, DType::bf16})
    for (size_t dim : {1, 7, 8, 16, 24, 64, 80, 100, 128})
      for (size_t n : {0, 1, 7, 8, 9, 31, 32, 33, 63, 64})
        for (size_t n_x : {1, 2, 3, 4, 5, 8, 12}) {
          const size_t stride = dim + 3, room = kColumnRows + 2;
          std::vector<float> plain = random_values(rng, (n + 1) * stride, 1.0f);
          std::vector<uint16_t> half(plain.size());
          for (size_t i = 0; i < plain.size(); ++i)
            half[i] = type == DType::f16 ? f32_to_f16(plain[i]) : f32_to_bf16(plain[i]);
          std::vector<int32_t> reversed(n);
          for (size_t i = 0; i < n; ++i) reversed[i] = static_cast<int32_t>(n - 1 - i);
          const RowView rows{type == DType::f32 ? static_cast<const void*>(plain.data()) : half.data(), type,
                             stride, n % 2 ? reversed.data() : nullptr};
          const std::vector<float> x = random_values(rng, n_x * dim, 1.0f);
          // One element more than may be written, so that a store past the end shows.
          std::vector<float> columns(dim * kColumnRows + 1, 5.0f), a(n_x * room, 5.0f), b = a;
          to_columns(rows, n, dim, columns.data());
          EXPECT_EQ(columns.back(), 5.0f);
          dot_columns(columns.data(), n, dim, x.data(), dim, n_x, 0.37f, a.data(), room);
          scalar::dot_rows(rows, n, dim, x.data(), dim, n_x, 0.37f, b.data(), room);
          const size_t written = (n + 31) / 32 * 32;
          for (size_t j = 0; j < n_x; ++j) {
            expect_same_bits(std::span(a).subspan(j * room, n), std::span(b).subspan(j * room, n),
                             "dot_columns", n);
            for (size_t i = written; i < room; ++i) EXPECT_EQ(a[j * room + i], 5.0f);
          }
        }
}

TEST_P(RowMath, DotOfARowIsTheVectorDot) {
  std::mt19937 rng(3);
  std::vector<float> rows = random_values(rng, 9 * 72, 1.0f), x = random_values(rng, 72, 1.0f), out(9);
  dot_rows({rows.data(), DType::f32, 72, nullptr}, 9, 72, x.data(), 72, 1, 1.0f, out.data(), 9);
  for (size_t i = 0; i < 9; ++i) EXPECT_EQ(out[i], dot(rows.data() + i * 72, x.data(), 72));
}

TEST_P(RowMath, AttentionOutputAddsChunksInOrder) {
  std::mt19937 rng(4);
  const size_t n = 2 * kValueChunk + 17, dim = 40, n_x = 5;
  std::vector<float> rows = random_values(rng, n * dim, 1.0f), weights = random_values(rng, n_x * n, 1.0f);
  std::vector<float> out(n_x * dim);
  attention_output({rows.data(), DType::f32, dim, nullptr}, n, dim, weights.data(), n, n_x, out.data(), dim);
  for (size_t j = 0; j < n_x; ++j)
    for (size_t d = 0; d < dim; ++d) {
      float total = 0;
      for (size_t begin = 0; begin < n; begin += kValueChunk) {
        float partial = 0;
        for (size_t i = begin; i < std::min(n, begin + kValueChunk); ++i)
          partial = std::fma(weights[j * n + i], rows[i * dim + d], partial);
        total += partial;
      }
      ASSERT_EQ(out[j * dim + d], total);
    }
}

}  // namespace
}  // namespace kvlapse
