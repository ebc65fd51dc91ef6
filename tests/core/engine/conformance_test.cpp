#include "core/engine/conformance.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "core/base/error.h"

namespace kvlapse {
namespace {

std::unique_ptr<TensorFile> open(const std::string& name) {
  return open_safetensors(std::filesystem::path(KVLAPSE_TEST_DATA) / name);
}

ConformanceReport check(const std::string& vectors, const std::string& source, bool decoding = false) {
  auto file = open(vectors), beside = open(source);
  ConformanceReport report;
  check_policy_vectors(*file, {file.get(), beside.get()}, decoding, report);
  return report;
}

void expect_exact(const ConformanceReport& report, size_t n_groups) {
  EXPECT_EQ(report.rows.size(), n_groups);
  for (const ConformanceRow& row : report.rows) {
    EXPECT_EQ(row.kept_mismatches, 0) << row.group << " of " << row.file;
    EXPECT_EQ(row.ties, 0) << row.group << " of " << row.file;
    EXPECT_GT(row.steps, 0) << row.group;
    EXPECT_LT(row.max_score_error.value_or(0), 2e-5) << row.group;
    EXPECT_LT(row.max_output_error.value_or(0), 5e-6) << row.group;
  }
}

TEST(Conformance, LongFlowAndRkvRepositories) {
  expect_exact(check("gold_public_a.safetensors", "gold_public_a.safetensors"), 8);
  expect_exact(check("gold_public_b.safetensors", "gold_public_b.safetensors"), 8);
}

TEST(Conformance, KvpressInPositionOrder) {
  expect_exact(check("kvpress_public_a.safetensors", "gold_public_a.safetensors"), 14);
  expect_exact(check("kvpress_public_b.safetensors", "gold_public_b.safetensors"), 14);
}

TEST(Conformance, RecordsOfDecodingPressAreSkippedUnlessAskedFor) {
  EXPECT_EQ(check("kvpress_public_a.safetensors", "gold_public_a.safetensors").skipped.size(), 14u);
  ConformanceReport report = check("kvpress_public_a.safetensors", "gold_public_a.safetensors", true);
  std::erase_if(report.rows, [](const ConformanceRow& row) { return !row.group.starts_with("decoding_"); });
  expect_exact(report, 5);
}

TEST(Conformance, VectorsWithoutTheirTensorsAreRefused) {
  EXPECT_THROW(check("kvpress_public_a.safetensors", "gold_public_b.safetensors"), Error);
}

}  // namespace
}  // namespace kvlapse
