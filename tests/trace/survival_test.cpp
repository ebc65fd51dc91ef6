// What a trace is worth after its writer was killed, its disk filled up, or its bytes changed.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <random>
#include <thread>

#include "core/base/error.h"
#include "tests/support/trace/synthetic_trace.h"
#include "trace/sql.h"
#include "trace/trace_reader.h"
#include "trace/verify.h"

extern char** environ;

namespace kvlapse {
namespace {

using test::SyntheticProcess;
using testing::HasSubstr;
namespace fs = std::filesystem;

// A process whose standard output is read here.
class Child {
 public:
  explicit Child(std::vector<std::string> arguments) {
    int ends[2];
    if (pipe2(ends, O_CLOEXEC) != 0) fail("pipe: {}", std::strerror(errno));
    output_ = ends[0];
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    posix_spawn_file_actions_adddup2(&actions, ends[1], STDOUT_FILENO);
    std::vector<char*> argv;
    for (std::string& argument : arguments) argv.push_back(argument.data());
    argv.push_back(nullptr);
    const int error = posix_spawn(&pid_, argv[0], &actions, nullptr, argv.data(), environ);
    posix_spawn_file_actions_destroy(&actions);
    close(ends[1]);
    if (error != 0) fail("spawn {}: {}", arguments[0], std::strerror(error));
  }
  ~Child() { close(output_); }
  void kill_now() { ::kill(pid_, SIGKILL); }
  // Reads on until the child has printed a number that is not less, or ended.
  void wait_for(int64_t number);
  // All of its output, to its end.
  std::string wait() {
    while (read_more()) {
    }
    int status = 0;
    waitpid(pid_, &status, 0);
    exit_code_ = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
    return text_;
  }
  int exit_code() const { return exit_code_; }

 private:
  bool read_more() {
    char buffer[4096];
    const ssize_t n = read(output_, buffer, sizeof buffer);
    if (n > 0) text_.append(buffer, static_cast<size_t>(n));
    return n > 0;
  }

  pid_t pid_ = -1;
  int output_ = -1, exit_code_ = -1;
  std::string text_;
};

// The last whole number that the child printed.
int64_t last_number(const std::string& text) {
  int64_t last = 0;
  std::istringstream lines(text.substr(0, text.rfind('\n') == std::string::npos ? 0 : text.rfind('\n')));
  for (std::string line; std::getline(lines, line);)
    if (!line.empty() && isdigit(line[0])) last = std::stoll(line);
  return last;
}

void Child::wait_for(int64_t number) {
  while (last_number(text_) < number && read_more()) {
  }
}

void expect_sound(const fs::path& file) {
  const VerifyReport report = verify_trace(file);
  EXPECT_TRUE(report.ok()) << report.violations.front();
}

TEST(TraceSurvival, KilledAtThirtyMomentsKeepsEveryCommittedStep) {
  test::TemporaryFolder folder;
  std::mt19937 random(20251125);
  int files = 0;
  int64_t most_steps = 0;
  for (int round = 0; round < 30; ++round) {
    const fs::path file = folder / fmt::format("{}.kvl", round);
    Child child({KVLAPSE_TRACE_CHILD, file.string(), "100000"});
    // Some moments fall into the making of the file, the others into the first steps.
    if (round >= 8) child.wait_for(static_cast<int64_t>(random() % 150));
    const int wait_us = static_cast<int>(random() % (round < 8 ? 30'000 : 3'000));
    std::this_thread::sleep_for(std::chrono::microseconds(wait_us));
    child.kill_now();
    const int64_t committed = last_number(child.wait());
    if (!fs::exists(file)) {
      EXPECT_EQ(committed, 0);
      continue;
    }
    ++files;
    expect_sound(file);
    TraceReader reader(file);
    EXPECT_FALSE(reader.complete());
    const int n_steps = reader.n_sequences() == 0 ? 0 : reader.n_steps(0);
    EXPECT_GE(n_steps, committed) << "round " << round;
    most_steps = std::max<int64_t>(most_steps, n_steps);
    if (n_steps == 0) continue;
    SyntheticProcess process;
    process.geometry.n_layers = 3;
    process.geometry.head_dim = 16;
    process.n_steps = 100000;
    std::vector<float> row(2 * 16);
    reader.read_rows(0, 2, RowKind::k, n_steps - 1, 1, row.data());
    EXPECT_EQ(row, synthetic_row(process, 0, 2, RowKind::k, n_steps - 1));
  }
  EXPECT_GE(files, 22);
  EXPECT_GT(most_steps, kChunkSteps);
}

// A tmpfs, while it lives.
class SmallDisk {
 public:
  explicit SmallDisk(fs::path where) : where_(std::move(where)) {
    fs::create_directory(where_);
    mounted_ = mount("tmpfs", where_.c_str(), "tmpfs", 0, "size=2m") == 0;
  }
  ~SmallDisk() {
    if (mounted_) umount2(where_.c_str(), MNT_DETACH);
  }
  bool mounted() const { return mounted_; }

 private:
  fs::path where_;
  bool mounted_ = false;
};

void expect_survives_full_disk(const fs::path& file, std::vector<std::string> arguments) {
  Child child(std::move(arguments));
  const std::string output = child.wait();
  EXPECT_EQ(child.exit_code(), 2);
  EXPECT_THAT(output, HasSubstr("a.kvl: cannot"));
  EXPECT_THAT(output, HasSubstr("the disk is full"));
  EXPECT_THAT(output, HasSubstr("the trace is valid and holds"));
  const int64_t committed = last_number(output.substr(0, output.find("error:")));
  EXPECT_GT(committed, 20);  // beyond the prompt
  expect_sound(file);
  {
    TraceReader reader(file);
    EXPECT_FALSE(reader.complete());
    EXPECT_GE(reader.n_steps(0), committed);
  }
}

TEST(TraceSurvival, FullDiskIsSaidAndWhatWasCommittedStays) {
  test::TemporaryFolder folder;
  SmallDisk disk(folder / "disk");
  const fs::path file = folder / "disk/a.kvl";
  // Where nothing may be mounted, the limit of the next test stands in.
  std::vector<std::string> arguments = {KVLAPSE_TRACE_CHILD, file.string(), "100000"};
  if (!disk.mounted()) arguments.push_back(std::to_string(2 << 20));
  RecordProperty("full_disk", disk.mounted() ? "tmpfs of 2 MiB" : "file size limit of 2 MiB");
  expect_survives_full_disk(file, std::move(arguments));
}

TEST(TraceSurvival, FileSizeLimitIsSaidAndWhatWasCommittedStays) {
  test::TemporaryFolder folder;
  const fs::path file = folder / "a.kvl";
  expect_survives_full_disk(file, {KVLAPSE_TRACE_CHILD, file.string(), "100000", std::to_string(2 << 20)});
}

std::vector<char> bytes_of(const fs::path& file) {
  std::ifstream in(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(in), {}};
}
void put_bytes(const fs::path& file, const std::vector<char>& bytes) {
  std::ofstream(file, std::ios::binary).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

// Everything that a trace's readers use, as one string; throws Error.
std::string read_all(const fs::path& file) {
  TraceReader reader(file);
  std::string all;
  const auto add = [&](const void* data, size_t bytes) { all.append(static_cast<const char*>(data), bytes); };
  for (int s = 0; s < reader.n_sequences(); ++s) {
    const TraceSequence sequence = reader.sequence(s);
    add(sequence.tokens.data(), sequence.tokens.size() * sizeof(int32_t));
    const CacheGeometry& g = reader.header().geometry;
    for (int l = 0; l < g.n_layers; ++l) {
      const auto evictions = reader.evictions(s, l, 0, sequence.n_steps);
      add(evictions.data(), evictions.size() * sizeof(TraceEviction));
      std::vector<int32_t> held(static_cast<size_t>(sequence.n_steps) * g.n_kv_heads);
      reader.read_occupancy(s, l, 0, sequence.n_steps, held.data());
      add(held.data(), held.size() * sizeof(int32_t));
      for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
        std::vector<float> rows(static_cast<size_t>(sequence.n_steps) *
                                (kind == RowKind::q ? g.n_q_heads : g.n_kv_heads) * g.head_dim);
        reader.read_rows(s, l, kind, 0, sequence.n_steps, rows.data());
        add(rows.data(), rows.size() * sizeof(float));
      }
    }
  }
  return all;
}

void try_damaged(const fs::path& file, const std::string& good, int& noticed) {
  const VerifyReport report = verify_trace(file, 3);
  noticed += !report.ok();
  std::string found;
  try {
    found = read_all(file);
  } catch (const Error&) {
  }
  // A sound report is a promise.
  if (report.ok()) {
    EXPECT_TRUE(found == good);
  }
  for (const std::string& line : report.violations) EXPECT_EQ(line.find('\n'), std::string::npos) << line;
  try {
    SqlQuery query(file, "SELECT count(*), sum(weight) FROM kv_eviction, (SELECT 1 AS weight)");
    std::vector<SqlValue> row;
    while (query.next(row)) {
    }
  } catch (const Error&) {
  }
}

TEST(TraceSurvival, FlippedBitsAreFoundAndHarmless) {
  test::TemporaryFolder folder;
  SyntheticProcess process;
  process.n_steps = 150;
  process.budget = 60;
  write_synthetic_trace(folder / "good.kvl", process);
  const std::vector<char> good = bytes_of(folder / "good.kvl");
  const std::string content = read_all(folder / "good.kvl");
  std::mt19937 random(7);
  const fs::path bad = folder / "bad.kvl";
  int noticed = 0;
  constexpr int kRounds = 250;
  for (int round = 0; round < kRounds; ++round) {
    std::vector<char> bytes = good;
    // Half of them in the first pages: the schema, the header and the roots of the tables.
    const size_t range = round % 2 == 0 ? bytes.size() : std::min<size_t>(bytes.size(), 8 * 16384);
    for (auto flips = 1 + random() % 3; flips > 0; --flips)
      bytes[random() % range] ^= static_cast<char>(1 << random() % 8);
    put_bytes(bad, bytes);
    try_damaged(bad, content, noticed);
  }
  EXPECT_GT(noticed, kRounds / 5);  // most of this small file are pages of tables without rows
}

TEST(TraceSurvival, TruncatedFilesAreFoundAndHarmless) {
  test::TemporaryFolder folder;
  SyntheticProcess process;
  process.n_steps = 150;
  write_synthetic_trace(folder / "good.kvl", process);
  const std::vector<char> good = bytes_of(folder / "good.kvl");
  const std::string content = read_all(folder / "good.kvl");
  std::mt19937 random(8);
  int noticed = 0;
  for (int round = 0; round < 60; ++round) {
    const size_t size = round < 10 ? static_cast<size_t>(round) * 50 : random() % good.size();
    put_bytes(folder / "bad.kvl",
              std::vector<char>(good.begin(), good.begin() + static_cast<ptrdiff_t>(size)));
    try_damaged(folder / "bad.kvl", content, noticed);
  }
  EXPECT_EQ(noticed, 60);
}

}  // namespace
}  // namespace kvlapse
