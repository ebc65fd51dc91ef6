#include "tests/support/trace/synthetic_gpu.h"

#include <vector>

#include "trace/sqlite.h"

namespace kvlapse::test {
namespace {

// What the format's migration makes, for traces that were written without it.
constexpr const char* kTables =
    "CREATE TABLE IF NOT EXISTS StringIds(id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS CUPTI_ACTIVITY_KIND_KERNEL(start INTEGER NOT NULL, \"end\" INTEGER NOT NULL, "
    "deviceId "
    "INTEGER NOT NULL, contextId INTEGER NOT NULL, streamId INTEGER NOT NULL, demangledName INTEGER NOT "
    "NULL, "
    "shortName INTEGER NOT NULL, registersPerThread INTEGER NOT NULL, gridX INTEGER NOT NULL, gridY INTEGER "
    "NOT NULL, "
    "gridZ INTEGER NOT NULL, blockX INTEGER NOT NULL, blockY INTEGER NOT NULL, blockZ INTEGER NOT NULL, "
    "staticSharedMemory INTEGER NOT NULL, dynamicSharedMemory INTEGER NOT NULL, localMemoryPerThread INTEGER "
    "NOT NULL, "
    "localMemoryTotal INTEGER NOT NULL, gridId INTEGER NOT NULL, tensorSizeMinusOneElements TEXT NOT NULL);"
    "CREATE TABLE IF NOT EXISTS NVTX_EVENTS(start INTEGER NOT NULL, \"end\" INTEGER, eventType INTEGER NOT "
    "NULL, text "
    "TEXT, int64Value INTEGER, eventId INTEGER NOT NULL PRIMARY KEY);"
    "CREATE TABLE IF NOT EXISTS KV_LAUNCH(kernel INTEGER NOT NULL PRIMARY KEY, step INTEGER NOT NULL, layer "
    "INTEGER, "
    "phase TEXT, launch TEXT, modelled_bytes INTEGER);"
    "CREATE TABLE IF NOT EXISTS KV_KERNEL_COUNTER(step INTEGER NOT NULL, ordinal INTEGER NOT NULL, layer "
    "INTEGER, phase "
    "TEXT, launch TEXT, modelled_bytes INTEGER, duration_ns REAL NOT NULL, dram_read_bytes REAL NOT NULL, "
    "dram_write_bytes REAL NOT NULL, l2_bytes REAL NOT NULL, dram_percent REAL NOT NULL, warps_percent REAL "
    "NOT NULL, "
    "bytes_ratio REAL, PRIMARY KEY(step, ordinal)) WITHOUT ROWID;"
    "CREATE TABLE IF NOT EXISTS KV_DRAM_SAMPLE(start_ns INTEGER NOT NULL, end_ns INTEGER NOT NULL, "
    "read_bytes INTEGER "
    "NOT NULL, write_bytes INTEGER NOT NULL, l2_bytes INTEGER NOT NULL);";

}  // namespace

void add_gpu_rows(const std::filesystem::path& trace, int n_layers) {
  Database database = Database::open_for_writing(trace);
  Transaction transaction(database);
  database.execute(kTables);
  database.execute("INSERT INTO StringIds(id, value) VALUES(1, 'fused_decode'), (2, 'matmul')");
  struct Step {
    int64_t start, length;
  };
  std::vector<Step> steps;
  {
    Statement select(database, "SELECT start_ns, total_ns FROM KV_STEP WHERE sequence = 0 ORDER BY step");
    while (select.step())
      steps.push_back({select.integer(0), std::max<int64_t>(select.integer(1), 4 * n_layers)});
  }
  Statement kernel(
      database,
      "INSERT INTO CUPTI_ACTIVITY_KIND_KERNEL(rowid, start, \"end\", deviceId, contextId, streamId, "
      "demangledName, shortName, registersPerThread, gridX, gridY, gridZ, blockX, blockY, blockZ, "
      "staticSharedMemory, dynamicSharedMemory, localMemoryPerThread, localMemoryTotal, gridId, "
      "tensorSizeMinusOneElements) VALUES(?, ?, ?, 0, 1, 7, ?, ?, 64, 32, 1, 1, 128, 1, 1, 0, 0, 0, 0, 0, "
      "'')");
  Statement launch(database, "INSERT INTO KV_LAUNCH VALUES(?, ?, ?, ?, ?, ?)");
  Statement range(database,
                  "INSERT INTO NVTX_EVENTS(start, \"end\", eventType, text, int64Value, eventId) VALUES(?, "
                  "?, 59, 'step', ?, ?)");
  Statement sample(database, "INSERT INTO KV_DRAM_SAMPLE VALUES(?, ?, ?, ?, 0)");
  Statement counter(database,
                    "INSERT INTO KV_KERNEL_COUNTER VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, 0, 50.0, 40.0, ?)");
  int64_t row = 0;
  for (size_t i = 0; i < steps.size(); ++i) {
    const Step& step = steps[i];
    const int64_t share = step.length / (2 * n_layers), ordinal = static_cast<int64_t>(i);
    range.run(step.start, step.start + step.length, ordinal, ordinal + 1);
    sample.run(step.start, step.start + step.length, kSampleBytes - 1000, 1000);
    for (int layer = 0; layer < n_layers; ++layer) {
      for (int part = 0; part < 2; ++part) {
        const int64_t start = step.start + (2 * layer + part) * share;
        const bool attention = part == 0;
        const std::string_view name = attention ? "attention" : "matmul";
        kernel.run(++row, start, start + share * (attention ? 9 : 6) / 10, part + 1, part + 1);
        launch.run(row, ordinal, layer, name, name, attention ? kAttentionBytes : kAttentionBytes / 2);
        if (i == 3 && attention)
          counter.run(ordinal, 2 * layer + part, layer, name, name, kAttentionBytes, 1000.0,
                      kBytesRatio * static_cast<double>(kAttentionBytes), 0.0, kBytesRatio);
      }
    }
  }
  transaction.commit();
}

}  // namespace kvlapse::test
