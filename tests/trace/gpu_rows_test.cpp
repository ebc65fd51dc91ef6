#include "trace/gpu_rows.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/trace/synthetic_trace.h"
#include "trace/sql.h"
#include "trace/trace_reader.h"
#include "trace/trace_writer.h"
#include "trace/verify.h"
#include "trace/views/kernel_view.h"

namespace kvlapse {
namespace {

GpuKernel kernel(int64_t start, int64_t step, const char* mangled, uint64_t bytes) {
  GpuKernel k;
  k.start_ns = start;
  k.end_ns = start + 500;
  k.mangled_name = mangled;
  k.step = step;
  k.graph_node = 1000 + static_cast<uint64_t>(start);
  if (bytes > 0) k.launch = LaunchRecord{"decode_step", bytes, 3, "attention", false};
  return k;
}

std::string one(const std::filesystem::path& file, const std::string& sql) {
  SqlQuery query(file, sql);
  std::vector<SqlValue> row;
  if (!query.next(row)) return "no row";
  if (auto* text = std::get_if<std::string>(&row[0])) return *text;
  if (auto* whole = std::get_if<int64_t>(&row[0])) return std::to_string(*whole);
  if (auto* real = std::get_if<double>(&row[0])) return fmt::format("{}", *real);
  return "NULL";
}

TEST(GpuRows, BatchesBecomeTheTablesOfNsys) {
  test::TemporaryFolder folder;
  const auto file = folder / "a.kvl";
  test::SyntheticProcess process;
  {
    TraceWriter writer(file, process.header());
    test::SyntheticRun run(writer, process);
    GpuBatch first;
    first.utc_epoch_ns = 42;
    first.devices = {{0, "NVIDIA H100", "GH100", 80, 50, 132, 9, 0}};
    first.kernels = {kernel(100, 0, "_ZN7kvlapse12_GLOBAL__N_118decode_step_kernelILi128EEEvi", 4000),
                     kernel(700, 0, "_ZN7kvlapse12_GLOBAL__N_118decode_step_kernelILi128EEEvi", 0)};
    first.steps = {{0, 90, 1300}};
    first.clocks = {{1'000'000, 0}};
    writer.add_gpu(first);
    for (int i = 0; run.step(); ++i)
      if (i == 100) {
        GpuBatch second;
        second.kernels = {kernel(2000, -1, "nvjet_hsh_64x8", 0)};
        second.copies = {{1, 2, 0, 1, 7, 9, 0, 4096, 1, 1, 0, 2}};
        second.fills = {{3, 4, 0, 1, 7, 9, 0, 0, 64, 2}};
        second.dram = {{0, 100, 5, 6, 7}};
        second.counters = {
            {5, 0, 100, 3900, 40, 9000, 80, 50, LaunchRecord{"decode_step", 4000, 3, "attention", false}}};
        second.sources = {{"activity", "measured", "", "", 3, 0, 10},
                          {"dram", "sampled", "no permission", "run as root", 0, 0, 0}};
        writer.add_gpu(second);
      }
    run.end("eos");
    writer.finish(false);
  }
  EXPECT_EQ(one(file, "SELECT count(*) FROM CUPTI_ACTIVITY_KIND_KERNEL"), "3");
  EXPECT_EQ(
      one(file, "SELECT s.value FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = k.shortName"),
      "decode_step_kernel");
  EXPECT_EQ(one(file,
                "SELECT s.value FROM CUPTI_ACTIVITY_KIND_KERNEL k JOIN StringIds s ON s.id = "
                "k.demangledName"),
            "void kvlapse::(anonymous namespace)::decode_step_kernel<128>(int)");
  EXPECT_EQ(one(file,
                "SELECT l.layer || l.phase || l.launch || l.modelled_bytes FROM KV_LAUNCH l JOIN "
                "CUPTI_ACTIVITY_KIND_KERNEL k ON k.rowid = l.kernel WHERE k.start = 100"),
            "3attentiondecode_step4000");
  EXPECT_EQ(one(file, "SELECT count(*) FROM KV_LAUNCH WHERE launch IS NULL AND step = 0"), "1");
  EXPECT_EQ(one(file,
                "SELECT e.label FROM CUPTI_ACTIVITY_KIND_MEMCPY m JOIN ENUM_CUDA_MEMCPY_OPER e ON e.id = "
                "m.copyKind"),
            "Host-to-Device");
  EXPECT_EQ(one(file, "SELECT read_bytes FROM KV_DRAM_SAMPLE"), "5");
  EXPECT_EQ(one(file, "SELECT bytes_ratio FROM KV_KERNEL_COUNTER"), "0.985");
  EXPECT_EQ(one(file, "SELECT value FROM META_DATA_EXPORT WHERE name = 'EXPORT_SCHEMA_VERSION'"), "3.28.1");
  EXPECT_EQ(one(file, "SELECT state FROM KV_SOURCE WHERE name = 'dram'"), "missing");

  TraceReader reader(file);
  const std::vector<GpuSource> sources = reader.gpu_sources();
  ASSERT_EQ(sources.size(), 2u);
  EXPECT_EQ(sources[0].state(), "recorded");
  EXPECT_EQ(sources[1].reason, "no permission");
  const KernelSummary summary = read_kernels(reader);
  ASSERT_EQ(summary.rows.size(), 2u);
  EXPECT_EQ(summary.rows[0].launches, 2);
  EXPECT_EQ(summary.rows[0].modelled_bytes, 4000);  // of a launch, the second one has none
  EXPECT_NEAR(summary.rows[0].bytes_ratio, 0.985, 1e-9);
  EXPECT_TRUE(verify_trace(file).violations.empty());
}

TEST(GpuRows, VerifySeesWhatDoesNotFit) {
  test::TemporaryFolder folder;
  const auto file = folder / "a.kvl";
  write_synthetic_trace(file, test::SyntheticProcess());
  {
    Database database = Database::open_for_writing(file);
    GpuRows rows(database);
    GpuBatch batch;
    GpuKernel backwards = kernel(100, 0, "k", 0);
    backwards.end_ns = 50;
    batch.kernels = {backwards};
    rows.write(batch);
    database.execute("INSERT INTO KV_LAUNCH(kernel, step) VALUES(77, 0)");
  }
  const VerifyReport report = verify_trace(file);
  ASSERT_EQ(report.violations.size(), 2u);
  EXPECT_NE(report.violations[0].find("CUPTI_ACTIVITY_KIND_KERNEL"), std::string::npos);
  EXPECT_NE(report.violations[1].find("KV_LAUNCH"), std::string::npos);
}

}  // namespace
}  // namespace kvlapse
