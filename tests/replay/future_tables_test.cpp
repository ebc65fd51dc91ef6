#include "replay/future_tables.h"

#include <gtest/gtest.h>

#include <cmath>

#include "replay/synthetic_rows.h"

namespace kvlapse {
namespace {

constexpr int kTokens = 150, kHeads = 2, kGroup = 2, kDim = 16;

struct Naive {
  // [H][t][i] mean over the group.
  std::vector<double> weights = std::vector<double>(kHeads * kTokens * kTokens), errors = weights;
  double& at(std::vector<double>& of, int h, int t, int i) {
    return of[(static_cast<size_t>(h) * kTokens + t) * kTokens + i];
  }

  explicit Naive(MemoryRows& rows) {
    for (int h = 0; h < kHeads; ++h)
      for (int t = 0; t < kTokens; ++t)
        for (int j = 0; j < kGroup; ++j) {
          const float* q = rows.row(0, 0, RowKind::q, t) + (h * kGroup + j) * kDim;
          std::vector<double> a(t + 1), o(kDim);
          double total = 0;
          for (int i = 0; i <= t; ++i) {
            for (int d = 0; d < kDim; ++d)
              a[i] += static_cast<double>(q[d]) * rows.row(0, 0, RowKind::k, i)[h * kDim + d];
            total += a[i] = std::exp(a[i] / std::sqrt(kDim));
          }
          for (int i = 0; i <= t; ++i) {
            a[i] /= total;
            for (int d = 0; d < kDim; ++d) o[d] += a[i] * rows.row(0, 0, RowKind::v, i)[h * kDim + d];
          }
          for (int i = 0; i <= t; ++i) {
            double square = 0;
            for (int d = 0; d < kDim; ++d)
              square += std::pow(o[d] - rows.row(0, 0, RowKind::v, i)[h * kDim + d], 2);
            at(weights, h, t, i) += a[i] / kGroup;
            if (t > 0) at(errors, h, t, i) += a[i] / (1 - a[i]) * std::sqrt(square) / kGroup;
          }
        }
  }
};

TEST(FutureTables, EqualTheirDefinition) {
  MemoryRows rows = synthetic_rows({1, kHeads * kGroup, kHeads, kDim, 0, DType::f32}, kTokens, 10, 4);
  Naive naive(rows);
  FutureTables tables(rows, 0, 0);
  std::vector<Pos> positions;
  std::vector<float> mass(kTokens), error(kTokens), peak(kTokens), use(kTokens);
  for (int step = 9; step < kTokens; ++step) {
    positions.push_back(Pos{step % 3 == 0 ? step : step / 2});
    const auto n = positions.size();
    for (int horizon : {1, 7, 64, 0})
      for (int h = 0; h < kHeads; ++h) {
        tables.mass(h, Pos{step}, horizon, positions, {mass.data(), n});
        tables.error(h, Pos{step}, horizon, positions, {error.data(), n});
        tables.next_use(h, Pos{step}, horizon, 0.02f, positions, {use.data(), n});
        tables.peak(h, Pos{step}, horizon, 16, positions, {peak.data(), n});
        const int end = horizon == 0 ? kTokens : std::min(kTokens, step + horizon + 1);
        for (size_t p = 0; p < n; ++p) {
          const int i = raw(positions[p]);
          double sum = 0, errors = 0, next = INFINITY;
          for (int t = step + 1; t < end; ++t) {
            sum += naive.at(naive.weights, h, t, i);
            errors += naive.at(naive.errors, h, t, i);
            if (std::isinf(next) && naive.at(naive.weights, h, t, i) > 0.02) next = t - step;
          }
          EXPECT_NEAR(mass[p], sum, 1e-5);
          EXPECT_NEAR(error[p], errors, 2e-4 * (1 + errors));
          EXPECT_EQ(use[p], next);
          double most = 0;
          for (int b = (step + 1) / 16; b * 16 < kTokens && (horizon == 0 || b <= (step + horizon) / 16);
               ++b) {
            double mean = 0;
            for (int t = b * 16; t < std::min(kTokens, b * 16 + 16); ++t)
              mean += i <= t ? naive.at(naive.weights, h, t, i) / 16 : 0;
            most = std::max(most, mean);
          }
          EXPECT_NEAR(peak[p], most, 1e-5);
        }
      }
  }
}

}  // namespace
}  // namespace kvlapse
