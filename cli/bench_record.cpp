#include "cli/bench_record.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"
#include "trace/recorder.h"
#include "trace/trace_reader.h"

namespace kvlapse::cli {
namespace {

constexpr int kTurnSteps = 64;  // the writer commits so often

constexpr int64_t kWriterBytes = int64_t{512} << 20;  // more than any queue or page of the WAL
constexpr int kWriterRuns = 3;

struct TemporaryFile {
  explicit TemporaryFile(std::string_view name)
      : path(std::filesystem::temp_directory_path() / fmt::format("kvlapse_bench_{}.{}", getpid(), name)) {}
  std::filesystem::path path;
  ~TemporaryFile() {
    std::error_code ignored;
    std::filesystem::remove(path, ignored);
  }
};

// Milliseconds a step, over one turn.
double turn_ms(DecodeSession& session) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kTurnSteps; ++i) session.step();
  const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
  return took.count() / kTurnSteps;
}

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

// Seconds in which that many bytes reach the disk of the temporary folder.
double disk_seconds(int64_t bytes) {
  const TemporaryFile file("bytes");
  std::vector<uint32_t> block(1 << 18);
  for (size_t i = 0; i < block.size(); ++i) block[i] = static_cast<uint32_t>(i) * 2654435761u;
  const auto start = std::chrono::steady_clock::now();
  const int descriptor = open(file.path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) fail("{}: cannot create", file.path.string());
  bool good = true;
  for (int64_t left = bytes; left > 0 && good; left -= static_cast<int64_t>(block.size() * sizeof block[0])) {
    const auto piece = std::min<int64_t>(left, static_cast<int64_t>(block.size() * sizeof block[0]));
    good = write(descriptor, block.data(), static_cast<size_t>(piece)) == piece;
  }
  good = good && fsync(descriptor) == 0;
  close(descriptor);
  if (!good) fail("{}: cannot write {} bytes", file.path.string(), bytes);
  return seconds_since(start);
}

// Rows of a recording, to be written again: [layer][q, k, v][step][heads][D].
struct RecordedRows {
  RecordedRows(const std::filesystem::path& file, int first, int n) : n_steps(n) {
    const TraceReader reader(file);
    const CacheGeometry& g = reader.header().geometry;
    q_floats = static_cast<size_t>(g.n_q_heads) * g.head_dim;
    kv_floats = static_cast<size_t>(g.n_kv_heads) * g.head_dim;
    for (int layer = 0; layer < g.n_layers; ++layer)
      for (const RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
        std::vector<float>& rows = values.emplace_back(n * (kind == RowKind::q ? q_floats : kv_floats));
        reader.read_rows(0, layer, kind, first, n, rows.data());
      }
  }
  TokenRows at(int layer, int step) const {
    const auto* of_layer = &values[static_cast<size_t>(layer) * 3];
    const auto i = static_cast<size_t>(step % n_steps);
    return {of_layer[0].data() + i * q_floats, of_layer[1].data() + i * kv_floats,
            of_layer[2].data() + i * kv_floats};
  }
  int n_steps;
  size_t q_floats = 0, kv_floats = 0;
  std::vector<std::vector<float>> values;
};

// The writer without a decode in front of it.
struct WriterRun {
  double seconds = 0;    // from the first row to the finished file
  double handed_ns = 0;  // of the calling thread for a token, without its waits
  double waited = 0;     // of its time in the writer's calls
  int64_t token_bytes = 0;
  TraceWriterStats stats;
};

// Hands recorded rows over, `tokens_per_s` of all sequences together; 0: as fast as the writer takes them.
WriterRun run_writer(const TraceHeader& header, const RecordedRows& rows, int packers, double tokens_per_s) {
  using Clock = std::chrono::steady_clock;
  const CacheGeometry& g = header.geometry;
  WriterRun run;
  run.token_bytes = static_cast<int64_t>(static_cast<size_t>(g.n_layers) *
                                         (rows.q_floats + 2 * rows.kv_floats) * dtype_bytes(g.dtype));
  const auto steps = static_cast<int>(kWriterBytes / (run.token_bytes * header.n_sequences)) + 1;
  const std::vector<int32_t> prompt = {0};
  std::vector<int32_t> held(static_cast<size_t>(g.n_kv_heads));
  const TemporaryFile file("kvl");
  TraceWriter writer(file.path, header, {.force = true, .packers = packers});
  const auto start = Clock::now();
  double busy = 0;
  for (int s = 0; s < header.n_sequences; ++s) writer.begin_sequence(s, 0, 0, prompt);
  for (int i = 0; i < steps; ++i) {
    const auto step_start = Clock::now();
    for (int s = 0; s < header.n_sequences; ++s) {
      std::fill(held.begin(), held.end(), i + 1);
      for (int layer = 0; layer < g.n_layers; ++layer) {
        const TokenRows token = rows.at(layer, i);
        LayerRecord record;
        record.held = held;
        record.rows = &token;
        writer.append(s, layer, Pos{i}, record);
      }
      StepSummary summary;
      summary.sequence = s;
      summary.pos = Pos{i};
      writer.step(summary);
    }
    busy += seconds_since(step_start);
    while (tokens_per_s > 0 && seconds_since(start) * tokens_per_s < (i + 1.0) * header.n_sequences) {
    }
  }
  const double waits = 1e-9 * static_cast<double>(writer.stats().queue_wait_ns);
  writer.finish(false);
  run.seconds = seconds_since(start);
  run.stats = writer.stats();
  run.handed_ns = 1e9 * (busy - waits) / steps / header.n_sequences;
  run.waited = waits / busy;
  return run;
}

BenchRow bench_writer(const TraceHeader& header, const RecordedRows& rows, int packers,
                      const std::string& name) {
  std::vector<double> mb_per_s;
  WriterRun run;
  for (int i = 0; i < kWriterRuns; ++i) {
    run = run_writer(header, rows, packers, 0);
    mb_per_s.push_back(1e-6 * static_cast<double>(run.stats.raw_bytes) / run.seconds);
  }
  const auto raw = static_cast<double>(run.stats.raw_bytes);
  const double limit = 1e-6 * raw / disk_seconds(run.stats.stored_bytes);
  const Spread rate = spread_of(mb_per_s);
  const double tokens_per_s = 1e6 * rate.median / static_cast<double>(run.token_bytes);
  const WriterRun paced = run_writer(header, rows, packers, tokens_per_s / 2);
  BenchRow row{"record_writer",     name,        "cpu",         rate.median, "MB/s", limit,
               rate.median / limit, kWriterRuns, rate.relative, {},          {}};
  row.numbers = {{"packers", run.stats.packers},
                 {"tokens_per_s", tokens_per_s},
                 {"cpu_mb_per_s", 1e3 * raw / static_cast<double>(run.stats.writer_cpu_ns)},
                 {"stored_share", static_cast<double>(run.stats.stored_bytes) / raw},
                 {"handover_ns", paced.handed_ns},
                 {"handover_mb_per_s", 1e3 * static_cast<double>(run.token_bytes) / paced.handed_ns},
                 {"handover_waited", paced.waited}};
  return row;
}

}  // namespace

std::vector<BenchRow> bench_record(const DecodeBench& bench, TraceTier tier, const Model& model,
                                   const Policy& policy) {
  const int turns = std::max(1, bench.steps / kTurnSteps), n_tokens = (turns + 1) * kTurnSteps + 1;
  if (bench.context + n_tokens >= model.spec.context)
    fail_usage("bench record: expected context + steps of at most {}, found {}",
               model.spec.context - kTurnSteps - 2, bench.context + bench.steps);
  std::unique_ptr<Backend> backend = make_cpu_backend(bench.n_threads, bench.mode);
  SessionOptions options;
  options.policy = &policy;
  options.budget.value = bench.budget;
  options.max_tokens = n_tokens;
  options.kv_dtype = bench.kv_dtype;
  options.ignore_eos = true;
  SequenceRequest request;
  for (int i = 0; i < bench.context; ++i)
    request.prompt.push_back(static_cast<int32_t>(counter_random({0, static_cast<uint64_t>(i)}) %
                                                  static_cast<uint64_t>(model.spec.n_vocab)));

  TraceHeader header;
  header.geometry = model.spec.cache_geometry(bench.context + n_tokens, bench.kv_dtype);
  header.layer_end = model.spec.n_layers;
  header.tier = tier;
  header.budget_slots = bench.budget;
  header.policy = describe_policy(policy, bench.budget, model.spec.n_layers);
  header.n_sequences = bench.batch;
  header.rope_theta = model.spec.rope.theta;
  header.meta = {{"model", model.spec.name}, {"device", backend->describe()}};
  const TemporaryFile file("kvl");
  Recorder recorder(file.path, header, {.force = true});

  DecodeSession plain(*backend, model, options);
  options.observers = {&recorder};
  DecodeSession recorded(*backend, model, options);
  for (DecodeSession* session : {&plain, &recorded}) {
    for (int i = 0; i < bench.batch; ++i) session->add_sequence(request);
    session->step();
    turn_ms(*session);  // warm-up
  }
  std::vector<double> plain_ms, recorded_ms;
  for (int i = 0; i < turns; ++i) {
    // The first of a turn finds the caches as the other left them: each is first as often.
    if (i % 2 == 0) plain_ms.push_back(turn_ms(plain));
    recorded_ms.push_back(turn_ms(recorded));
    if (i % 2 == 1) plain_ms.push_back(turn_ms(plain));
  }
  recorder.finish(false);

  const Spread without = spread_of(plain_ms), with = spread_of(recorded_ms);
  BenchRow row{"record",
               fmt::format("{}, B {}, context {}, {}, {}, {}", model.spec.name, bench.batch, bench.context,
                           dtype_name(bench.kv_dtype), policy.info().name, tier_name(tier)),
               backend->describe(),
               with.median,
               "ms",
               without.median,
               without.median / with.median,
               turns * kTurnSteps,
               with.relative,
               {},
               {}};
  const TraceWriterStats stats = recorder.writer().stats();
  row.numbers = {{"context", bench.context},
                 {"batch", bench.batch},
                 {"tokens_per_s", 1e3 * bench.batch / with.median},
                 {"tokens_per_s_unrecorded", 1e3 * bench.batch / without.median},
                 {"overhead", with.median / without.median - 1},
                 {"packers", stats.packers},
                 {"queue_waits", static_cast<double>(stats.queue_waits)},
                 {"recorder_share", recorder.overhead_ratio()},
                 {"trace_bytes", static_cast<double>(recorder.writer().file_bytes())}};
  std::vector<BenchRow> rows = {row};
  if (tier == TraceTier::qkv) {
    const RecordedRows recorded_rows(file.path, bench.context, kTurnSteps);
    // As many as a recording has here, and fewer.
    for (int packers = 1; packers <= std::max(2, stats.packers); packers *= 2)
      rows.push_back(
          bench_writer(header, recorded_rows, packers,
                       fmt::format("{} writer, B {}, {}, {} packer{}", model.spec.name, bench.batch,
                                   dtype_name(bench.kv_dtype), packers, packers > 1 ? "s" : "")));
  }
  return rows;
}

}  // namespace kvlapse::cli
