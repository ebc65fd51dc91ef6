// Results files: deterministic bytes however the work was cut, interrupted or resumed.
#include "replay/sweep.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>
#include <thread>

#include "replay/comparison.h"
#include "replay/fit_centres.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/sqlite.h"

namespace kvlapse {
namespace {

namespace fs = std::filesystem;
using test::SyntheticProcess;
using test::TemporaryFolder;

std::string bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  EXPECT_TRUE(in) << file;
  return {std::istreambuf_iterator<char>(in), {}};
}

class SweepTest : public testing::Test {
 protected:
  void SetUp() override {
    for (int i = 0; i < 2; ++i) {
      SyntheticProcess process;
      process.seed = static_cast<uint64_t>(i + 1);
      process.n_steps = 200 + 40 * i;
      process.n_sequences = 1 + i;
      test::write_synthetic_trace(folder_ / traces_.emplace_back(i == 0 ? "a.kvl" : "b.kvl"), process);
    }
  }
  std::unique_ptr<Sweep> sweep(SweepOptions options = {},
                               std::string policies = "full,longflow,random,streaming_llm") {
    std::vector<fs::path> files;
    for (const std::string& name : traces_) files.push_back(folder_ / name);
    return std::make_unique<Sweep>(files, parse_policy_list(policies), parse_budget_list("25%,60"), options);
  }
  void run(const fs::path& out, SweepOptions options = {}) {
    ResultsFile results(out, ResultsFile::Open::replace);
    sweep(options)->run(results);
    results.finish();
  }

  TemporaryFolder folder_;
  std::vector<std::string> traces_;
};

TEST_F(SweepTest, BytesDoNotDependOnThreadsBatchesOrShards) {
  run(folder_ / "one.kvr");
  const std::string reference = bytes_of(folder_ / "one.kvr");
  run(folder_ / "again.kvr");
  EXPECT_EQ(bytes_of(folder_ / "again.kvr"), reference);

  SweepOptions small;
  small.cells_at_once = 1;
  small.replay.threads = 1;
  run(folder_ / "small.kvr", small);
  EXPECT_EQ(bytes_of(folder_ / "small.kvr"), reference);

  for (int n_shards : {2, 3, 5, 20}) {  // 20: some shards are empty
    std::vector<fs::path> parts;
    for (int shard = 0; shard < n_shards; ++shard) {
      SweepOptions options;
      options.shard = shard;
      options.n_shards = n_shards;
      run(parts.emplace_back(folder_ / fmt::format("part{}.kvr", shard)), options);
    }
    std::reverse(parts.begin(), parts.end());
    merge_results(parts, folder_ / "merged.kvr", true);
    EXPECT_EQ(bytes_of(folder_ / "merged.kvr"), reference) << n_shards << " shards";
  }
}

TEST_F(SweepTest, InterruptedSweepResumesToTheSameBytes) {
  run(folder_ / "one.kvr");
  SweepOptions options;
  options.cells_at_once = 2;
  const fs::path out = folder_ / "cut.kvr";
  {
    ResultsFile results(out, ResultsFile::Open::create);
    int calls = 0;
    EXPECT_THROW(sweep(options)->run(results, [&](double, double) { return ++calls < 7; }), Interrupted);
  }
  const Results half = read_results(out);
  EXPECT_FALSE(half.complete);
  EXPECT_GT(half.cells.size(), 0u);
  EXPECT_LT(half.cells.size(), 14u);
  EXPECT_THROW(merge_results({out}, folder_ / "no.kvr", false), Error);
  {
    ResultsFile results(out, ResultsFile::Open::resume);
    for (const ResultCell& cell : half.cells) EXPECT_TRUE(results.has(cell.id));
    sweep(options)->run(results);
    results.finish();
  }
  EXPECT_EQ(bytes_of(out), bytes_of(folder_ / "one.kvr"));
}

// kill -9 at some moments: the file opens, holds whole cells only, and resumes to the same bytes.
TEST_F(SweepTest, KilledSweepResumesToTheSameBytes) {
  run(folder_ / "one.kvr");
  const fs::path out = folder_ / "killed.kvr";
  SweepOptions options;
  options.cells_at_once = 1;
  options.replay.threads = 1;
  for (int delay_ms : {3, 15, 40, 80, 150}) {
    fs::remove(out);
    const pid_t child = fork();
    if (child == 0) {
      ResultsFile results(out, ResultsFile::Open::create);
      sweep(options)->run(results);
      _exit(0);  // without finish()
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
    kill(child, SIGKILL);
    waitpid(child, nullptr, 0);
    ResultsFile results(out, ResultsFile::Open::resume);
    sweep(options)->run(results);
    results.finish();
    EXPECT_EQ(bytes_of(out), bytes_of(folder_ / "one.kvr")) << delay_ms << " ms";
  }
}

TEST_F(SweepTest, CellsAreWhatTheySay) {
  run(folder_ / "one.kvr");
  const Results results = read_results(folder_ / "one.kvr", true);
  EXPECT_TRUE(results.complete);
  EXPECT_EQ(results.traces.size(), 2u);
  EXPECT_EQ(results.cells.size(), 2u * (1 + 3 * 2));
  for (const ResultCell& cell : results.cells) {
    EXPECT_EQ(cell.sequences.size(), cell.trace == results.traces[0].hash
                                         ? static_cast<size_t>(results.traces[0].n_sequences)
                                         : static_cast<size_t>(results.traces[1].n_sequences));
    EXPECT_EQ(cell.heads.size(), 2u * 4 * 5);
    EXPECT_LE(value_of(cell.total, "slots_peak"), cell.budget_slots);
    EXPECT_LE(value_of(cell.total, "recall_mean"), 1.0);
    if (cell.policy == "full") {
      EXPECT_EQ(value_of(cell.total, "recall_mean"), 1.0);
      EXPECT_EQ(cell.budget, "100%");
    }
  }
}

TEST_F(SweepTest, VerifyNamesWhatIsWrong) {
  run(folder_ / "one.kvr");
  EXPECT_TRUE(is_results_file(folder_ / "one.kvr"));
  EXPECT_FALSE(is_results_file(folder_ / "a.kvl"));
  EXPECT_FALSE(is_results_file(folder_ / "none.kvr"));
  EXPECT_TRUE(verify_results(folder_ / "one.kvr").violations.empty());
  EXPECT_EQ(verify_results(folder_ / "one.kvr").cells, 14);
  auto damaged = [&](const char* sql) {
    fs::copy_file(folder_ / "one.kvr", folder_ / "bad.kvr", fs::copy_options::overwrite_existing);
    Database::open_for_writing(folder_ / "bad.kvr").execute(sql);
    return verify_results(folder_ / "bad.kvr").violations;
  };
  EXPECT_FALSE(damaged("UPDATE KV_VALUE SET value = 1.5 WHERE metric = 'recall_mean'").empty());
  EXPECT_FALSE(damaged("DELETE FROM KV_CELL WHERE cell IN (SELECT min(cell) FROM KV_CELL)").empty());
  EXPECT_FALSE(damaged("DELETE FROM KV_TRACE").empty());
  EXPECT_FALSE(damaged("UPDATE KV_SERIES SET data = x'00000000'").empty());
  EXPECT_FALSE(damaged("UPDATE KV_SKETCH SET data = x'ffffffff00000000'").empty());
  std::string bytes = bytes_of(folder_ / "one.kvr");
  std::ofstream(folder_ / "short.kvr", std::ios::binary) << bytes.substr(0, bytes.size() / 2);
  EXPECT_FALSE(verify_results(folder_ / "short.kvr").violations.empty());
}

TEST_F(SweepTest, OtherParametersAreOtherCells) {
  std::set<std::string> ids;
  for (const char* policy :
       {"random", "random:seed=1", "longflow", "longflow:cast=fp16", "longflow:granularity=kv_head"}) {
    const auto cells = sweep({}, policy);
    for (const SweepCell& cell : cells->cells()) EXPECT_TRUE(ids.insert(cell.id).second) << policy;
  }
  EXPECT_EQ(sweep({}, "random,random:seed=0,random")->cells().size(), 4u);  // the same policy three times
}

TEST_F(SweepTest, SelectionsAreSaidAndNeverMerged) {
  run(folder_ / "one.kvr");
  SweepOptions part;
  part.replay.layer_begin = 0, part.replay.layer_end = 1;
  part.replay.head_begin = 1, part.replay.head_end = 2;
  part.replay.step_begin = 100, part.replay.step_end = 180;
  run(folder_ / "part.kvr", part);
  const Results all = read_results(folder_ / "one.kvr"), some = read_results(folder_ / "part.kvr", true);
  ASSERT_EQ(some.cells.size(), all.cells.size());
  for (const ResultCell& cell : some.cells) {
    EXPECT_EQ(cell.selection, "--layers 0:1 --heads 1:2 --steps 100:180");
    EXPECT_EQ(cell.heads.size(), 1u * 2 * 5);
    for (const ResultCell& other : all.cells) EXPECT_NE(cell.id, other.id);
  }
  for (const ResultCell& cell : all.cells) EXPECT_EQ(cell.selection, "");
  EXPECT_TRUE(verify_results(folder_ / "part.kvr").violations.empty());
  EXPECT_THROW(merge_results({folder_ / "one.kvr", folder_ / "part.kvr"}, folder_ / "no.kvr", false), Error);
  EXPECT_FALSE(fs::exists(folder_ / "no.kvr"));

  // A file goes on with its own selection only; shards of one selection merge.
  ResultsFile other(folder_ / "one.kvr", ResultsFile::Open::resume);
  EXPECT_THROW(sweep(part)->run(other), Error);
  std::vector<fs::path> parts;
  for (int shard = 0; shard < 2; ++shard) {
    part.shard = shard, part.n_shards = 2;
    run(parts.emplace_back(folder_ / fmt::format("part{}.kvr", shard)), part);
  }
  merge_results(parts, folder_ / "merged.kvr", false);
  EXPECT_EQ(bytes_of(folder_ / "merged.kvr"), bytes_of(folder_ / "part.kvr"));
}

// Results of a version that did not know selections: read as whole ones, and gone on with.
TEST_F(SweepTest, AFileOfTheFirstVersionIsReadAndResumed) {
  run(folder_ / "one.kvr");
  const std::string now = bytes_of(folder_ / "one.kvr");
  {
    Database db = Database::open_for_writing(folder_ / "one.kvr");
    db.execute("DROP VIEW KV_RESULT; ALTER TABLE KV_CELL DROP COLUMN selection; PRAGMA user_version = 1");
    db.execute("DELETE FROM KV_CELL WHERE cell IN (SELECT max(cell) FROM KV_CELL)");
    for (const char* table : {"KV_VALUE", "KV_HEAD", "KV_SKETCH", "KV_SERIES"})
      db.execute(fmt::format("DELETE FROM {} WHERE cell NOT IN (SELECT cell FROM KV_CELL)", table));
    db.execute("CREATE VIEW KV_RESULT AS SELECT * FROM KV_CELL");
  }
  EXPECT_EQ(read_results(folder_ / "one.kvr").cells.size(), 13u);
  EXPECT_TRUE(verify_results(folder_ / "one.kvr").violations.empty());
  ResultsFile results(folder_ / "one.kvr", ResultsFile::Open::resume);
  sweep()->run(results);
  results.finish();
  EXPECT_EQ(bytes_of(folder_ / "one.kvr"), now);
}

TEST_F(SweepTest, ACalibrationIsNotScoredOnItsOwnRecording) {
  const fs::path file = folder_ / "centres.safetensors";
  QueryCentres centres = fit_centres({folder_ / "a.kvl"});
  EXPECT_EQ(centres.traces.size(), 1u);
  EXPECT_EQ(centres.n_queries, 200);
  std::ofstream(file, std::ios::binary) << centres.to_bytes();
  const std::string policy = "triattention:pin_prompt=0:calibration=" + file.string();
  auto over = [&](const char* trace, const std::string& spec) {
    return std::make_unique<Sweep>(std::vector<fs::path>{folder_ / trace}, parse_policy_list(spec),
                                   parse_budget_list("60"), SweepOptions{});
  };
  EXPECT_THROW(over("a.kvl", policy), Error);
  EXPECT_FALSE(over("b.kvl", policy)->cells()[0].fitted_here);
  const auto allowed = over("a.kvl", policy + ":same_trace=allow");
  EXPECT_TRUE(allowed->cells()[0].fitted_here);
  ResultsFile results(folder_ / "r.kvr", ResultsFile::Open::create);
  allowed->run(results);
  over("b.kvl", policy)->run(results);
  results.finish();
  for (const ResultCell& cell : read_results(folder_ / "r.kvr").cells) {
    const bool same = cell.policy.find("same_trace=allow") != std::string::npos;
    EXPECT_EQ(value_of(cell.total, "fitted_on_this_trace") == 1, same);
    EXPECT_NE(cell.policy.find(":fit=" + query_centres_id(file)), std::string::npos);
    EXPECT_GT(value_of(cell.total, "evictions"), 0);
  }
  // The same tokens under another name and content are the same text.
  centres.traces = {"another"};
  std::ofstream(file, std::ios::binary) << centres.to_bytes();
  EXPECT_THROW(over("a.kvl", policy), Error);
}

TEST_F(SweepTest, RefusesAnExistingFileABudgetBelowTheProtectedSetAndABadShard) {
  run(folder_ / "one.kvr");
  EXPECT_THROW(ResultsFile(folder_ / "one.kvr", ResultsFile::Open::create), Error);
  EXPECT_THROW(
      Sweep({folder_ / "a.kvl"}, parse_policy_list("random:pin_prompt=1"), parse_budget_list("10"), {}),
      Error);
  SweepOptions options;
  options.shard = 3;
  options.n_shards = 3;
  EXPECT_THROW(sweep(options), UsageError);
}

TEST(Occupancy, EqualsWhatAReplayHolds) {
  TemporaryFolder folder;
  SyntheticProcess process;
  process.n_steps = 400;
  test::write_synthetic_trace(folder / "a.kvl", process);
  for (const char* policy : {"longflow", "rkv", "full", "random"}) {
    Sweep sweep({folder / "a.kvl"}, parse_policy_list(policy), parse_budget_list("100"), {});
    ResultsFile file(folder / "r.kvr", ResultsFile::Open::replace);
    sweep.run(file);
    file.finish();
    const ResultCell cell = read_results(folder / "r.kvr").cells.at(0);
    const Occupancy modelled =
        occupancy(*make_policy(policy), cell.budget_slots, 2, process.n_prompt, process.n_steps);
    EXPECT_NEAR(value_of(cell.total, "slots_mean"), modelled.mean, 1e-9) << policy;
    EXPECT_EQ(value_of(cell.total, "slots_peak"), modelled.peak) << policy;
  }
}

TEST(Occupancy, MatchedBudgetsCostTheSame) {
  const auto rkv = make_policy("rkv"), longflow = make_policy("longflow");
  const int n_prompt = 100, n_tokens = 4000, budget = 512;
  EXPECT_EQ(matched_budget(*longflow, budget, BudgetMatch::peak, 6, n_prompt, n_tokens), budget);
  EXPECT_EQ(matched_budget(*longflow, budget, BudgetMatch::mean, 6, n_prompt, n_tokens), budget);
  const int by_peak = matched_budget(*rkv, budget, BudgetMatch::peak, 6, n_prompt, n_tokens);
  EXPECT_EQ(occupancy(*rkv, by_peak, 6, n_prompt, n_tokens).peak, budget);
  const int by_mean = matched_budget(*rkv, budget, BudgetMatch::mean, 6, n_prompt, n_tokens);
  EXPECT_NEAR(occupancy(*rkv, by_mean, 6, n_prompt, n_tokens).mean,
              occupancy(*longflow, budget, 6, n_prompt, n_tokens).mean, 0.6);
  EXPECT_LT(by_peak, by_mean);
  EXPECT_LT(by_mean, budget);
}

TEST(Statistics, IntervalsCoverAndDifferencesArePaired) {
  std::vector<double> a, b;
  for (int i = 0; i < 40; ++i) {
    a.push_back(i % 7);
    b.push_back(i % 7 + 0.1 + 0.01 * (i % 3));
  }
  const Interval mean = bootstrap_mean(a);
  EXPECT_LT(mean.low, mean.mean);
  EXPECT_GT(mean.high, mean.mean);
  EXPECT_LT(mean.high - mean.low, 2);
  const Interval difference = bootstrap_difference(a, b);  // small beside the spread of the samples, and real
  EXPECT_LT(difference.high, 0);
  EXPECT_GT(difference.low, -0.13);
  EXPECT_EQ(bootstrap_mean(std::vector<double>{3.0}).high, 3.0);
  const Interval share = wilson(8, 10);  // 0.4902, 0.9433
  EXPECT_NEAR(share.low, 0.4902, 1e-4);
  EXPECT_NEAR(share.high, 0.9433, 1e-4);
  const std::vector<float> x = {1, 2, 2, 4}, y = {10, 20, 20, 30}, z = {4, 3, 3, 1};
  EXPECT_DOUBLE_EQ(spearman(x, y), 1);
  EXPECT_DOUBLE_EQ(spearman(x, z), -1);
}

TEST(Statistics, SketchQuantiles) {
  Sketch sketch, other;
  for (int i = 1; i <= 1000; ++i) (i % 2 ? sketch : other).add(static_cast<float>(i) / 1000);
  sketch.merge(other);
  EXPECT_EQ(sketch.count(), 1000);
  for (double q : {0.1, 0.5, 0.9}) EXPECT_NEAR(sketch.quantile(q), q, 0.03 * q);
  EXPECT_NEAR(sketch.share_above(0.25), 0.75, 0.01);
  EXPECT_EQ(Sketch::from_bytes(sketch.bytes()).quantile(0.3), sketch.quantile(0.3));
  EXPECT_THROW(Sketch::from_bytes(std::vector<std::byte>(7)), Error);
}

TEST_F(SweepTest, ChoosesTheSmallestBudgetThatSuffices) {
  ResultsFile file(folder_ / "r.kvr", ResultsFile::Open::create);
  std::vector<fs::path> files = {folder_ / "b.kvl"};
  Sweep(files, parse_policy_list("longflow,random"), parse_budget_list("30,60,120,200"), {}).run(file);
  file.finish();
  const Results results = read_results(folder_ / "r.kvr", true);
  for (const Choice& choice : choose_budgets(results, "output_error", 1e9, 0.95))
    EXPECT_EQ(choice.budget, "30");
  for (const Choice& choice : choose_budgets(results, "output_error", 0, 0.95)) EXPECT_EQ(choice.budget, "");
  EXPECT_THROW(choose_budgets(results, "output_eror", 1, 0.95), UsageError);
  const std::vector<ComparedRow> rows = compare(results);
  EXPECT_EQ(rows.size(), 8u);
  for (const ComparedRow& row : rows) EXPECT_EQ(row.n_samples, 2);
}

}  // namespace
}  // namespace kvlapse
