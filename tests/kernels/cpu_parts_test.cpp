// The parts of the CPU backend on their own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <random>
#include <tuple>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/base/scalar_math.h"
#include "core/base/vector_math.h"
#include "core/model/tensor_file.h"
#include "core/policy/spec.h"
#include "kernels/cpu/activations.h"
#include "kernels/cpu/bench/bench.h"
#include "kernels/cpu/cpu_attention.h"
#include "kernels/cpu/integer_matmul.h"
#include "kernels/cpu/matmul.h"
#include "kernels/cpu/sampler.h"
#include "kernels/cpu/thread_team.h"
#include "tests/support/core/every_target.h"

namespace kvlapse {
namespace {

std::vector<float> random_values(std::mt19937& rng, size_t n) {
  std::normal_distribution<float> normal(0, 1);
  std::vector<float> values(n);
  for (float& v : values) v = normal(rng);
  return values;
}

class Matmul : public EveryTarget {};
class Activations : public EveryTarget {};
class Attention : public EveryTarget {};
INSTANTIATE_TEST_SUITE_P(Simd, Matmul, simd_targets(), simd_target_name);
INSTANTIATE_TEST_SUITE_P(Simd, Activations, simd_targets(), simd_target_name);
INSTANTIATE_TEST_SUITE_P(Simd, Attention, simd_targets(), simd_target_name);

TEST(ThreadTeam, EveryThreadRunsAndBarriersHold) {
  for (int n : {1, 2, 5}) {
    ThreadTeam team(n);
    for (int round = 0; round < 50; ++round) {
      std::vector<int> first(n, 0), seen(n, 0);
      team.run([&](int thread) {
        first[thread] = 1;
        team.barrier();
        seen[thread] = std::accumulate(first.begin(), first.end(), 0);
        team.barrier();
        first[thread] = 0;
      });
      EXPECT_THAT(seen, testing::Each(n));
    }
  }
}

TEST(ThreadTeam, RethrowsAndGoesOn) {
  ThreadTeam team(3);
  EXPECT_THROW(team.run([](int thread) {
    if (thread == 2) fail("expected");
  }),
               Error);
  std::atomic<int> ran{0};
  team.run([&](int) { ++ran; });
  EXPECT_EQ(ran, 3);
}

TEST(ThreadTeam, SharesCoverEverythingOnce) {
  for (int64_t n : {0, 1, 7, 8, 100})
    for (int threads : {1, 2, 3, 8})
      for (int64_t unit : {1, 8}) {
        int64_t next = 0;
        for (int t = 0; t < threads; ++t) {
          const Share s = share_of(n, t, threads, unit);
          EXPECT_EQ(s.begin, next);
          EXPECT_LE(s.begin, s.end);
          next = s.end;
        }
        EXPECT_EQ(next, n);
      }
}

TEST_P(Matmul, EveryOutputIsTheRowsDot) {
  std::mt19937 rng(1);
  const int64_t rows = 29, columns = 96;
  std::vector<float> plain = random_values(rng, rows * columns);
  std::vector<uint16_t> half(plain.size());
  for (TensorType type : {TensorType::f32, TensorType::f16, TensorType::bf16}) {
    const DType dtype = type == TensorType::f16 ? DType::f16 : DType::bf16;
    if (type != TensorType::f32) narrow(dtype, plain.data(), plain.size(), half.data());
    const Matrix w{type, rows, columns,
                   reinterpret_cast<const std::byte*>(
                       type == TensorType::f32 ? static_cast<void*>(plain.data()) : half.data())};
    std::vector<float> row(columns), scratch(matmul_scratch(columns));
    for (size_t n_x : {1, 2, 5, 9}) {
      const std::vector<float> x = random_values(rng, n_x * columns);
      std::vector<float> y(n_x * rows, 7.0f);
      matmul_rows(w, 3, rows, x.data(), columns, n_x, y.data(), rows, scratch.data());
      for (size_t j = 0; j < n_x; ++j)
        for (int64_t r = 0; r < rows; ++r) {
          matrix_row(w, r, row.data());
          const float expected = r < 3 ? 7.0f : scalar::dot(row.data(), x.data() + j * columns, columns);
          ASSERT_EQ(std::bit_cast<uint32_t>(y[j * rows + r]), std::bit_cast<uint32_t>(expected)) << r;
        }
    }
  }
}

TEST_P(Matmul, QuantisedRowsAreThoseOfTheDequantisedMatrix) {
  std::mt19937 rng(6);
  const int64_t rows = 21, columns = 256;
  for (TensorType type :
       {TensorType::q8_0, TensorType::q4_0, TensorType::q4_1, TensorType::q5_1, TensorType::q6_k}) {
    std::vector<std::byte> blocks(columns / block_elements(type) * block_bytes(type) * rows);
    for (std::byte& b : blocks) b = static_cast<std::byte>(rng());
    // Scales of moderate size at every fp16 place that a type may have one.
    for (size_t b = 0; b < blocks.size(); b += block_bytes(type))
      for (size_t at : {size_t{0}, size_t{2}, size_t{208}})
        if (at + 2 <= block_bytes(type)) {
          const uint16_t half = f32_to_f16(0.01f * static_cast<float>(rng() % 200) - 1);
          std::memcpy(blocks.data() + b + at, &half, 2);
        }
    const Matrix w{type, rows, columns, blocks.data()};
    std::vector<float> row(columns), widened(columns), scratch(matmul_scratch(columns));
    for (size_t n_x : {1, 2, 3, 7}) {
      const std::vector<float> x = random_values(rng, n_x * columns);
      std::vector<float> y(n_x * rows);
      matmul_rows(w, 0, rows, x.data(), columns, n_x, y.data(), rows, scratch.data());
      for (int64_t r = 0; r < rows; ++r) {
        dequantize(type, w.row(r), columns, row.data());
        matrix_row(w, r, widened.data());
        ASSERT_EQ(row, widened) << tensor_type_name(type);
        for (size_t j = 0; j < n_x; ++j)
          ASSERT_EQ(std::bit_cast<uint32_t>(y[j * rows + r]),
                    std::bit_cast<uint32_t>(scalar::dot(row.data(), x.data() + j * columns, columns)))
              << tensor_type_name(type) << " row " << r;
      }
    }
  }
}

TEST_P(Matmul, IntegerRowsEqualTheirDefinitionAndAreClose) {
  std::mt19937 rng(8);
  const int64_t rows = 19, columns = 320;
  for (TensorType type : {TensorType::q8_0, TensorType::q4_0, TensorType::q4_1}) {
    std::vector<std::byte> blocks(columns / 32 * block_bytes(type) * rows);
    for (std::byte& b : blocks) b = static_cast<std::byte>(rng());
    for (size_t b = 0; b < blocks.size(); b += block_bytes(type))
      for (size_t at : {0, 2}) {
        if (at == 2 && type != TensorType::q4_1) continue;
        const uint16_t half = f32_to_f16(0.01f * static_cast<float>(rng() % 200) - 1);
        std::memcpy(blocks.data() + b + at, &half, 2);
      }
    const Matrix w{type, rows, columns, blocks.data()};
    std::vector<float> row(columns);
    std::vector<std::byte> bytes(packed_group_bytes(type, columns) * 3);
    pack_groups(w, 0, 3, bytes.data());
    const PackedMatrix packed{type, rows, columns, bytes.data()};
    for (size_t n_x : {1, 2, 3, 6, 8, 17}) {
      std::vector<float> x = random_values(rng, n_x * columns);
      std::fill_n(x.begin() + 32, 32, 0.0f);    // a block of zeros
      std::fill_n(x.begin() + 64, 32, 1e-40f);  // and one whose scale has no inverse
      IntegerActivations integers;
      integers.assign(x.data(), columns, n_x, columns);
      std::vector<float> y(n_x * rows);
      integer_matmul(packed, 0, 8, integers, y.data(), rows);
      integer_matmul(packed, 8, rows, integers, y.data(), rows);
      for (int64_t r = 0; r < rows; ++r) {
        dequantize(type, w.row(r), columns, row.data());
        for (size_t j = 0; j < n_x; ++j) {
          ASSERT_EQ(std::bit_cast<uint32_t>(y[j * rows + r]),
                    std::bit_cast<uint32_t>(scalar::integer_dot(type, w.row(r), integers, j)))
              << tensor_type_name(type) << " row " << r;
          double exact = 0, size = 0;
          for (int64_t c = 0; c < columns; ++c) {
            exact += static_cast<double>(row[c]) * x[j * columns + c];
            size += std::abs(static_cast<double>(row[c]) * x[j * columns + c]);
          }
          ASSERT_NEAR(y[j * rows + r], exact, size * 1e-4) << tensor_type_name(type);
        }
      }
    }
  }
}

TEST_P(Activations, RoundingIsTheScalarRounding) {
  std::mt19937 rng(2);
  std::vector<float> values = random_values(rng, 1000);
  for (float& v : values) v *= std::exp2(static_cast<float>(static_cast<int>(rng() % 40) - 30));
  values.insert(values.end(), {0.0f, -0.0f, 65504.0f, 65519.0f, 65520.0f, -1e9f, 6e-8f, 2.9e-8f, 3e-8f});
  for (DType type : {DType::f16, DType::bf16}) {
    std::vector<float> rounded = values;
    round_to(type, rounded);
    for (size_t i = 0; i < values.size(); ++i) {
      const float expected =
          type == DType::f16 ? f16_to_f32(f32_to_f16(values[i])) : bf16_to_f32(f32_to_bf16(values[i]));
      ASSERT_EQ(std::bit_cast<uint32_t>(rounded[i]), std::bit_cast<uint32_t>(expected)) << values[i];
    }
  }
}

TEST_P(Activations, SiluNormAndRotation) {
  std::mt19937 rng(3);
  const std::vector<float> x = random_values(rng, 50), up = random_values(rng, 50),
                           weight = random_values(rng, 50);
  std::vector<float> gate = x, normed(50);
  silu_multiply(gate, up);
  for (size_t i = 0; i < x.size(); ++i) {
    const double exact = x[i] / (1 + std::exp(-static_cast<double>(x[i]))) * up[i];
    EXPECT_NEAR(gate[i], exact, 2e-6 * (1 + std::abs(exact)));
  }
  rms_norm(x, weight, 1e-6f, normed.data());
  double mean = 1e-6;
  for (float v : x) mean += static_cast<double>(v) * v / 50;
  for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(normed[i], x[i] / std::sqrt(mean) * weight[i], 1e-5);

  std::vector<float> row = {1, 0, 0, 2}, cos = {0, 1}, sin = {1, 0};
  rotate_half(row.data(), 4, cos.data(), sin.data());
  EXPECT_EQ(row, (std::vector<float>{0, 0, 1, 2}));
}

TEST(Sampler, DrawsFollowTheDistribution) {
  const std::vector<float> logits = {std::log(0.5f), std::log(0.3f), std::log(0.15f), std::log(0.05f)};
  std::vector<float> scratch;
  auto share = [&](SampleRow row) {
    std::vector<double> counts(4);
    const int n = 20000;
    for (int i = 0; i < n; ++i) {
      row.random = counter_random({7, static_cast<uint64_t>(i)});
      counts[sample_token(logits, row, scratch).token] += 1.0 / n;
    }
    return counts;
  };
  SampleRow row;
  row.temperature = 1;
  std::vector<double> got = share(row);
  for (int i = 0; i < 4; ++i) EXPECT_NEAR(got[i], std::exp(logits[i]), 0.015);
  row.top_k = 2;
  got = share(row);
  EXPECT_NEAR(got[0], 0.5 / 0.8, 0.015);
  EXPECT_EQ(got[2] + got[3], 0);
  row.top_k = 0;
  row.top_p = 0.9;  // 0.5 + 0.3 does not reach it, 0.95 does
  got = share(row);
  EXPECT_NEAR(got[2], 0.15 / 0.95, 0.015);
  EXPECT_EQ(got[3], 0);
}

TEST(Sampler, ReportsLogprobAndLead) {
  const std::vector<float> logits = {1, 3, 3, 2};
  std::vector<float> scratch;
  SampleResult greedy = sample_token(logits, {}, scratch);
  EXPECT_EQ(greedy.token, 1);  // the first of equals
  EXPECT_EQ(greedy.margin, 0);
  EXPECT_NEAR(greedy.logprob, 3 - std::log(std::exp(1) + 2 * std::exp(3) + std::exp(2)), 1e-6);
  SampleRow forced;
  forced.forced = 3;
  EXPECT_EQ(sample_token(logits, forced, scratch).token, 3);
  EXPECT_EQ(sample_token(logits, forced, scratch).margin, -1);
}

TEST_P(Attention, AgreesWithTheDefinition) {
  std::mt19937 rng(4);
  for (DType type : {DType::f32, DType::bf16})
    for (int n_slots : {1, 255, 256, 700}) {
      const CacheGeometry g{1, 6, 2, 24, n_slots, type};
      CpuKvStore store(g, 0);
      SlotTable table(g.n_kv_heads, n_slots);
      std::vector<float> q;
      for (int p = 0; p < n_slots; ++p) {
        q = random_values(rng, 6 * 24);
        std::vector<float> k = random_values(rng, 2 * 24), v = random_values(rng, 2 * 24);
        for (auto* row : {&q, &k, &v}) round_to(type, *row);
        store.store(table, q.data(), k.data(), v.data());
        table.append(Pos{p});
      }
      ThreadTeam team(3);
      CpuAttention attention(team);
      std::vector<float> out(6 * 24);
      const CpuAttendRow row{&store, &table, out.data()};
      attention.decode({&row, 1});
      for (int head = 0; head < 6; ++head) {
        const int h = g.kv_head_of(head);
        const std::span<const float> keys = store.keys(h, n_slots), values = store.values(h, n_slots);
        std::vector<float> logits(n_slots), weights(n_slots), expected(24);
        for (int s = 0; s < n_slots; ++s)
          logits[s] = scalar::dot(keys.data() + s * 24, q.data() + head * 24, 24) * attention_scale(24);
        scalar::softmax(logits, weights);
        attention_output({values.data(), DType::f32, 24, nullptr}, n_slots, 24, weights.data(), n_slots, 1,
                         expected.data(), 24);
        EXPECT_THAT(store.logits(head, n_slots), testing::ElementsAreArray(logits));
        EXPECT_THAT(store.attention(head, n_slots), testing::ElementsAreArray(weights));
        EXPECT_THAT(store.output(head), testing::ElementsAreArray(expected));
        EXPECT_THAT(std::vector<float>(out.begin() + head * 24, out.begin() + (head + 1) * 24),
                    testing::ElementsAreArray(expected));
        double plain = 0;
        for (int s = 0; s < n_slots; ++s) plain += static_cast<double>(weights[s]) * values[s * 24 + 5];
        EXPECT_NEAR(expected[5], plain, 1e-5);
      }
    }
}

// The reference shares nothing with the blocks: the definition in plain C++, for each query over what it may
// see.
TEST_P(Attention, BlocksOfAPromptGiveTheBitsOfTheDefinition) {
  std::mt19937 rng(9);
  for (DType type : {DType::f32, DType::f16, DType::bf16})
    for (const auto& [first, n_rows, dim] :
         {std::tuple{0, 1, 24}, {0, 13, 64}, {63, 9, 64}, {250, 21, 64}, {300, 8, 100}, {190, 3, 128}}) {
      const int n_slots = first + n_rows;
      const size_t q_width = 6 * static_cast<size_t>(dim), kv_width = 2 * static_cast<size_t>(dim);
      const CacheGeometry g{1, 6, 2, dim, n_slots, type};
      CpuKvStore store(g, 0);
      SlotTable table(g.n_kv_heads, n_slots);
      const std::vector<float> q = random_values(rng, n_rows * q_width);
      for (int p = 0; p < n_slots; ++p) {
        std::vector<float> k = random_values(rng, kv_width), v = random_values(rng, kv_width);
        for (auto* row : {&k, &v}) round_to(type, *row);
        store.store(table, q.data(), k.data(), v.data());
        table.append(Pos{p});
      }
      ThreadTeam team(2);
      CpuAttention attention(team);
      std::vector<float> out(n_rows * q_width);
      attention.block(store, n_rows, first, q.data(), q_width, out.data(), q_width);
      for (int r = 0; r < n_rows; ++r)
        for (int head = 0; head < 6; ++head) {
          const size_t seen = static_cast<size_t>(first) + r + 1, d = dim, at = r * q_width + head * d;
          const int h = g.kv_head_of(head);
          const RowView keys{store.keys(h, n_slots).data(), DType::f32, d, nullptr};
          std::vector<float> weights(seen), partial(d), expected(d, 0.0f);
          scalar::dot_rows(keys, seen, d, q.data() + at, d, 1, attention_scale(dim), weights.data(), seen);
          scalar::softmax(weights, weights);
          const float* values = store.values(h, n_slots).data();
          for (size_t begin = 0; begin < seen; begin += kValueChunk) {
            scalar::weighted_rows({values + begin * d, DType::f32, d, nullptr},
                                  std::min(kValueChunk, seen - begin), d, weights.data() + begin, seen, 1,
                                  partial.data(), d);
            for (size_t i = 0; i < d; ++i) expected[i] += partial[i];
          }
          for (size_t i = 0; i < d; ++i)
            ASSERT_EQ(std::bit_cast<uint32_t>(out[at + i]), std::bit_cast<uint32_t>(expected[i]))
                << "row " << r << " of " << n_rows << " after " << first << ", head " << head << ", column "
                << i;
        }
    }
}

TEST(CpuKvStore, RowsAndWindowSurviveCompaction) {
  const CacheGeometry g{1, 2, 1, 8, 16, DType::f16};
  CpuKvStore store(g, 3);
  SlotTable table(1, 16);
  for (int p = 0; p < 10; ++p) {
    const std::vector<float> q(16, static_cast<float>(p)), k(8, static_cast<float>(p)),
        v(8, static_cast<float>(-p));
    store.store(table, q.data(), k.data(), v.data());
    table.append(Pos{p});
  }
  const std::vector<Slot> order = {Slot{7}, Slot{2}, Slot{9}};
  store.compact(0, order);
  table.compact(0, order);
  for (int i = 0; i < 3; ++i) {
    const auto pos = static_cast<float>(raw(order[i]));
    EXPECT_EQ(store.keys(0, 3)[i * 8], pos);
    EXPECT_EQ(store.values(0, 3)[i * 8 + 7], -pos);
    EXPECT_EQ(store.value_l1(0, 3)[i], 8 * pos);
  }
  EXPECT_EQ(store.window_queries(3)[0], 7);
  EXPECT_EQ(store.window_queries(2)[16], 9);
  // Query 7 sees keys 7 and 2, not 9.
  const std::span<const float> logits = store.window_logits(table, 1, 3);
  ASSERT_EQ(logits.size(), 9u);
  EXPECT_FLOAT_EQ(logits[0], 7 * 7 * 8 * attention_scale(8));
  EXPECT_FLOAT_EQ(logits[1], 7 * 2 * 8 * attention_scale(8));
  EXPECT_EQ(logits[2], -std::numeric_limits<float>::infinity());
  EXPECT_FLOAT_EQ(logits[8], 9 * 9 * 8 * attention_scale(8));
}

TEST(Bench, RowsAreComplete) {
  std::unique_ptr<Policy> longflow = make_policy("longflow");
  AttentionBench attention;
  attention.n_threads = 1;
  attention.n_slots = 64;
  attention.cache_bytes = 1 << 20;
  attention.runs = 3;
  for (const BenchRow& row : bench_attention(attention, *longflow)) {
    EXPECT_GT(row.median, 0) << row.name;
    EXPECT_GT(row.limit, 0) << row.name;
    EXPECT_GT(row.ratio_to_limit, 0) << row.name;
    EXPECT_EQ(row.runs, 3);
  }
  const Model model = load_model(KVLAPSE_TEST_DATA "/tiny_qwen3");
  DecodeBench decode;
  decode.context = 100;
  decode.steps = 5;
  decode.budget = 50;
  const std::vector<BenchRow> rows = bench_decode(decode, model, *longflow);
  ASSERT_EQ(rows.size(), 1u);
  EXPECT_GT(rows[0].median, 0);
  decode.context = 300;
  EXPECT_THROW(bench_decode(decode, model, *longflow), UsageError);
}

}  // namespace
}  // namespace kvlapse
