#include "replay/published.h"

#include <fmt/format.h>

#include <array>
#include <cmath>
#include <memory>

#include "core/policy/spec.h"

namespace kvlapse {
namespace {

constexpr PublishedRow kRkvRows[] = {
    {8192, "full", 0, 1, 75.44, true},         {8192, "full", 0, 62, 849.13, false},
    {8192, "rkv", 1024, 1, 80.46, false},      {8192, "rkv", 1024, 402, 3251.52, true},
    {8192, "rkv", 1536, 287, 2525.75, false},  {8192, "rkv", 3072, 150, 1520.99, true},
    {8192, "rkv", 819, 479, 3809.15, false},   {8192, "rkv", 2785, 167, 1608.01, false},
    {8192, "rkv", 4423, 105, 1257.83, false},  {16384, "full", 0, 1, 69.41, false},
    {16384, "full", 0, 30, 347.03, false},     {16384, "rkv", 1024, 1, 80.95, false},
    {16384, "rkv", 1024, 402, 3188.82, false}, {16384, "rkv", 1536, 287, 2447.61, false},
    {16384, "rkv", 3072, 150, 1406.28, false}, {16384, "rkv", 1638, 271, 2300.28, true},
    {16384, "rkv", 5570, 82, 797.43, false},   {16384, "rkv", 8847, 46, 584.77, false},
};

// Inverse of a symmetric positive 3 x 3 matrix by Gauss-Jordan elimination.
std::array<std::array<double, 3>, 3> inverse(std::array<std::array<double, 3>, 3> a) {
  std::array<std::array<double, 3>, 3> b{{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
  for (int i = 0; i < 3; ++i) {
    double pivot = a[i][i];
    for (int j = 0; j < 3; ++j) a[i][j] /= pivot, b[i][j] /= pivot;
    for (int r = 0; r < 3; ++r) {
      if (r == i) continue;
      double factor = a[r][i];
      for (int j = 0; j < 3; ++j) a[r][j] -= factor * a[i][j], b[r][j] -= factor * b[i][j];
    }
  }
  return b;
}

GpuProfile unit_profile(const PublishedTable& table) {
  GpuProfile gpu;
  gpu.name = std::string(table.gpu);
  gpu.memory_gib = {table.memory_gib, 0, "data sheet"};
  gpu.weight_read_gbps = {table.weight_read_gbps, 0, "data sheet"};
  gpu.kv_read_gbps = {1, 0, ""};
  return gpu;
}

}  // namespace

PublishedTable published_rkv() {
  // 32 layers, 8 kv heads of 128, fp16: 131,072 bytes a token. All weights but the embedding table are read
  // each step.
  const int64_t embedding = int64_t{128256} * 4096 * 2;
  const int64_t total = int64_t{8030261248} * 2;
  return {"rkv",
          "Zefan-Cai/R-KV d15c976, README, throughput table",
          "DeepSeek-R1-Distill-Llama-8B",
          "A100 80GB",
          {{32, 32, 8, 128, 0, DType::f16}, total - embedding, total},
          80.0e9 / (1024.0 * 1024 * 1024),
          2039,
          1,
          kRkvRows};
}

GpuProfile fit_profile(const PublishedTable& table) {
  GpuProfile gpu = unit_profile(table);
  // y = a + b * batch + c * batch * bytes, weighted by 1 / y so that the residual is relative.
  std::array<std::array<double, 3>, 3> normal{};
  std::array<double, 3> right{};
  std::vector<std::array<double, 3>> features;
  std::vector<double> target;
  for (const PublishedRow& row : table.rows) {
    if (!row.calibrates) continue;
    std::unique_ptr<Policy> policy = make_policy(row.policy);
    Prediction p = predict(gpu, table.shape, *policy, row.budget, row.batch, table.n_prompt, row.n_output);
    double y = row.batch / row.tokens_per_s;
    double weights_s = static_cast<double>(table.shape.weight_bytes) / (table.weight_read_gbps * 1e9);
    std::array<double, 3> x{1 / y, row.batch / y,
                            static_cast<double>(p.kv_bytes + p.eviction_bytes) / 1e9 / y};
    features.push_back(x);
    target.push_back((y - weights_s) / y);
    for (int i = 0; i < 3; ++i) {
      right[i] += x[i] * target.back();
      for (int j = 0; j < 3; ++j) normal[i][j] += x[i] * x[j];
    }
  }
  std::array<std::array<double, 3>, 3> covariance = inverse(normal);
  std::array<double, 3> fit{};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) fit[i] += covariance[i][j] * right[j];
  double residual = 0;
  for (size_t n = 0; n < features.size(); ++n) {
    double e = target[n];
    for (int i = 0; i < 3; ++i) e -= fit[i] * features[n][i];
    residual += e * e;
  }
  residual /= std::max<double>(1, static_cast<double>(features.size()) - 3);
  auto error = [&](int i) { return std::sqrt(covariance[i][i] * residual); };
  std::string provenance = fmt::format("fitted to {} rows of {}", features.size(), table.source);
  gpu.step_overhead_us = {fit[0] * 1e6, error(0) * 1e6, provenance};
  gpu.per_sequence_us = {fit[1] * 1e6, error(1) * 1e6, provenance};
  gpu.kv_read_gbps = {1 / fit[2], error(2) / (fit[2] * fit[2]), provenance};
  return gpu;
}

std::vector<ReproducedRow> reproduce(const PublishedTable& table, const GpuProfile& profile) {
  std::vector<ReproducedRow> rows;
  for (const PublishedRow& row : table.rows) {
    std::unique_ptr<Policy> policy = make_policy(row.policy);
    Prediction p =
        predict(profile, table.shape, *policy, row.budget, row.batch, table.n_prompt, row.n_output);
    rows.push_back({row, p, p.tokens_per_s / row.tokens_per_s - 1});
  }
  return rows;
}

LongFlowClaim reproduce_longflow(GpuProfile profile) {
  profile.name = "A100 40GB";
  profile.memory_gib = {40.0e9 / (1024.0 * 1024 * 1024), 0, "data sheet"};
  profile.weight_read_gbps = {1555, 0, "data sheet"};
  // Qwen3-1.7B: 28 layers, 8 kv heads of 128, fp16; 1.72e9 parameters, embeddings tied.
  const int64_t weights = int64_t{1720574976} * 2;
  DecoderShape shape{{28, 16, 8, 128, 0, DType::f16}, weights, weights};
  constexpr int kPrompt = 512, kOutput = 16384, kBudget = 3200;
  auto best = [&](std::string_view spec) {
    std::unique_ptr<Policy> policy = make_policy(spec);
    int batch = largest_batch(profile, shape, *policy, kBudget, kPrompt, kOutput);
    return predict(profile, shape, *policy, kBudget, batch, kPrompt, kOutput);
  };
  LongFlowClaim claim;
  claim.longflow = best("longflow");
  claim.batch = claim.longflow.batch;
  for (auto [against, published] :
       {std::pair<std::string_view, double>{"full", 11.8}, {"h2o", 3.67}, {"rkv", 3.3}}) {
    Prediction p = best(against);
    claim.ratios.push_back({against, published, claim.longflow.tokens_per_s / p.tokens_per_s, p.batch});
  }
  return claim;
}

}  // namespace kvlapse
