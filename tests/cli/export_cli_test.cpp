// export and back: every format gives what the recording holds.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "core/model/tensor_file.h"
#include "tests/support/cli/program.h"
#include "trace/trace_reader.h"

namespace kvlapse::test {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::json;
using testing::HasSubstr;

std::string bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}

template <typename T>
T number_at(const std::string& bytes, size_t offset) {
  T value{};
  EXPECT_LE(offset + sizeof value, bytes.size());
  if (offset + sizeof value <= bytes.size()) std::memcpy(&value, bytes.data() + offset, sizeof value);
  return value;
}

// The stored members of a zip, found through its central directory as numpy does: name -> npy.
std::map<std::string, std::string> members_of(const std::string& zip) {
  std::map<std::string, std::string> members;
  const size_t end = zip.size() - 22;
  EXPECT_EQ(zip.substr(end, 4), "PK\x05\x06");
  size_t at = number_at<uint32_t>(zip, end + 16);
  for (int i = 0; i < number_at<uint16_t>(zip, end + 10); ++i) {
    EXPECT_EQ(zip.substr(at, 4), "PK\x01\x02");
    const auto bytes = number_at<uint32_t>(zip, at + 24), start = number_at<uint32_t>(zip, at + 42);
    const auto name_bytes = number_at<uint16_t>(zip, at + 28);
    EXPECT_EQ(number_at<uint32_t>(zip, start + 14), number_at<uint32_t>(zip, at + 16));  // CRC
    members[zip.substr(at + 46, name_bytes)] = zip.substr(start + 30 + name_bytes, bytes);
    at += 46u + name_bytes;
  }
  return members;
}

class ExportCli : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    folder_ = fs::temp_directory_path() / ("kvlapse_export_" + std::to_string(getpid()));
    fs::create_directories(folder_);
    for (const std::string dtype : {"fp32", "bf16"})
      ASSERT_EQ(run_program({"record", "-q", "-o", path(dtype + ".kvl"), "--max-tokens", "90", "--ignore-eos",
                             "--policy", "h2o", "--budget", "150", "--kv-dtype", dtype})
                    .exit_code,
                0);
  }
  static void TearDownTestSuite() { fs::remove_all(folder_); }
  static std::string path(const std::string& name) { return (folder_ / name).string(); }
  static std::string exported(const std::string& file, const std::string& format, const std::string& name,
                              std::vector<std::string> more = {}) {
    std::vector<std::string> arguments{"export", path(file), "--format", format, "-o", path(name)};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Outcome outcome = run_program(arguments);
    EXPECT_EQ(outcome.exit_code, 0) << outcome.err;
    return path(name);
  }
  static inline fs::path folder_;
};

TEST_F(ExportCli, SafetensorsHoldTheRowsBitForBitAndTheMasks) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const auto file = open_safetensors(exported(dtype + ".kvl", "safetensors", dtype + ".safetensors"));
    const TraceReader trace(path(dtype + ".kvl"));
    const CacheGeometry& g = trace.header().geometry;
    const int n = trace.n_steps(0);
    EXPECT_EQ(file->tensors().size(), static_cast<size_t>(1 + 4 * g.n_layers));
    EXPECT_EQ(file->get("tokens").shape, std::vector<int64_t>{n});
    int64_t evictions = 0;
    for (int layer = 0; layer < g.n_layers; ++layer) {
      for (const auto& [name, kind] :
           {std::pair{"q.L", RowKind::q}, {"k.L", RowKind::k}, {"v.L", RowKind::v}}) {
        const TensorView& tensor = file->get(name + std::to_string(layer));
        const int heads = kind == RowKind::q ? g.n_q_heads : g.n_kv_heads;
        EXPECT_EQ(tensor.shape, (std::vector<int64_t>{n, heads, g.head_dim}));
        std::vector<std::byte> rows(static_cast<size_t>(n) * heads * g.head_dim * dtype_bytes(g.dtype));
        trace.read_rows_raw(0, layer, kind, 0, n, rows.data());
        ASSERT_EQ(tensor.bytes, rows.size());
        EXPECT_EQ(std::memcmp(tensor.data, rows.data(), rows.size()), 0);
      }
      const TensorView& mask = file->get("mask.L" + std::to_string(layer));
      ASSERT_EQ(mask.shape, (std::vector<int64_t>{g.n_kv_heads, n}));
      std::vector<int32_t> last(static_cast<size_t>(g.n_kv_heads) * n);
      std::memcpy(last.data(), mask.data, mask.bytes);
      for (const TraceEviction& e : trace.evictions(0, layer, 0, n)) {
        EXPECT_EQ(last[static_cast<size_t>(e.kv_head) * n + e.pos], e.step);
        ++evictions;
      }
      const auto held = std::count(last.begin(), last.end(), INT32_MAX);
      EXPECT_LE(held, g.n_kv_heads * 150);
    }
    EXPECT_GT(evictions, 100);
  }
}

TEST_F(ExportCli, NpzMembersAreNpyOfTheSameNumbers) {
  for (const std::string dtype : {"fp32", "bf16"}) {
    const auto members =
        members_of(bytes_of(exported(dtype + ".kvl", "npz", dtype + ".npz", {"--layers", "1:3"})));
    EXPECT_EQ(std::count_if(members.begin(), members.end(),
                            [](const auto& m) { return m.first.find(".L") != m.first.npos; }),
              8);
    EXPECT_TRUE(members.contains("tokens.npy") && members.contains("n_prompt.npy"));
    const TraceReader trace(path(dtype + ".kvl"));
    const CacheGeometry& g = trace.header().geometry;
    const int n = trace.n_steps(0);
    const std::string& npy = members.at("k.L2.npy");
    EXPECT_EQ(npy.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
    const size_t header = 10u + number_at<uint16_t>(npy, 8);
    EXPECT_EQ(header % 64, 0u);
    EXPECT_THAT(npy.substr(10, header - 10), HasSubstr("'descr': '<f4', 'fortran_order': False"));
    std::vector<float> rows(static_cast<size_t>(n) * g.n_kv_heads * g.head_dim);
    trace.read_rows(0, 2, RowKind::k, 0, n, rows.data());
    ASSERT_EQ(npy.size(), header + rows.size() * sizeof(float));
    EXPECT_EQ(std::memcmp(npy.data() + header, rows.data(), rows.size() * sizeof(float)), 0);
  }
}

TEST_F(ExportCli, CsvReadsBackAsTheQuery) {
  ASSERT_EQ(run_program({"replay", path("fp32.kvl"), "-q", "--policy", "longflow,random", "--budget",
                         "60,120", "-o", path("r.kvr")})
                .exit_code,
            0);
  std::istringstream csv(bytes_of(exported("r.kvr", "csv", "r.csv")));
  const Outcome outcome =
      run_program({"sql", path("r.kvr"), "SELECT cell, sequence, metric, value FROM KV_VALUE", "--json"});
  std::map<std::string, double> wanted;
  const Json document = Json::parse(outcome.out);
  for (const Json& row : document["rows"])
    wanted[row["cell"].get<std::string>() + "," + row["sequence"].dump() + "," +
           row["metric"].get<std::string>()] = row["value"].is_null() ? 0 : row["value"].get<double>();
  std::string line;
  std::getline(csv, line);
  EXPECT_EQ(line, "trace,cell,policy,budget,budget_slots,budget_share,match,sequence,metric,value\r");
  size_t rows = 0;
  while (std::getline(csv, line)) {
    std::vector<std::string> cells;
    std::istringstream parts(line);
    for (std::string cell; std::getline(parts, cell, ',');) cells.push_back(cell);
    ASSERT_EQ(cells.size(), 10u) << line;
    const auto found = wanted.find(cells[1] + "," + cells[7] + "," + cells[8]);
    ASSERT_NE(found, wanted.end()) << line;
    EXPECT_EQ(std::stod(cells[9]), found->second);
    ++rows;
  }
  EXPECT_EQ(rows, wanted.size());
  EXPECT_GT(rows, 100u);
}

// What Perfetto's importer of Chrome JSON requires of an event.
TEST_F(ExportCli, ChromeTraceEventsAreWellFormed) {
  const Json document = Json::parse(bytes_of(exported("fp32.kvl", "perfetto", "p.json")));
  const TraceReader trace(path("fp32.kvl"));
  const std::vector<TraceStep> steps = trace.steps(0, 0, trace.n_steps(0));
  std::map<std::string, size_t> kinds;
  size_t at = 0;
  for (const Json& event : document["traceEvents"]) {
    const std::string kind = event.at("ph");
    ++kinds[kind];
    EXPECT_TRUE(event.at("pid").is_number_integer() && event.at("name").is_string());
    if (kind == "M") continue;
    EXPECT_TRUE(event.at("ts").is_number());
    if (kind != "X") continue;
    ASSERT_LT(at, steps.size());
    EXPECT_NEAR(event.at("dur").get<double>(), static_cast<double>(steps[at].summary.total_ns) / 1e3, 1e-3);
    EXPECT_EQ(event.at("args").at("token"), steps[at].summary.token);
    ++at;
  }
  EXPECT_EQ(at, steps.size());
  EXPECT_EQ(kinds, (std::map<std::string, size_t>{{"C", 2 * at}, {"M", 2}, {"X", at}}));
}

TEST_F(ExportCli, SaysWhatIsMissing) {
  setenv("KVLAPSE_PYTHON", "/bin/false", 1);
  Outcome outcome = run_program({"export", path("fp32.kvl"), "--format", "parquet", "-o", path("x.parquet")});
  unsetenv("KVLAPSE_PYTHON");
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("pyarrow"));
  outcome =
      run_program({"export", path("fp32.kvl"), "--format", "npz", "--layers", "2:99", "-o", path("x.npz")});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("found 2:99"));
  EXPECT_EQ(run_program({"export", path("fp32.kvl"), "--format", "xlsx", "-o", path("x")}).exit_code, 64);
  outcome = run_program({"predict", "--gpu", "h300", "--policy", "full", "--budget", "512"});
  EXPECT_EQ(outcome.exit_code, 2);
  EXPECT_THAT(outcome.err, HasSubstr("h200"));
  EXPECT_EQ(run_program({"predict", "--gpu", "h200", "--policy", "full", "--budget", "512"}).exit_code, 0);
}

}  // namespace
}  // namespace kvlapse::test
