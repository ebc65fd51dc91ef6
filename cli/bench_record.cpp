#include "cli/bench_record.h"

#include <fmt/format.h>
#include <unistd.h>

#include <chrono>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/decode_session.h"
#include "kernels/cpu/cpu_backend.h"
#include "trace/recorder.h"

namespace kvlapse::cli {
namespace {

constexpr int kTurnSteps = 64;  // the writer commits so often

struct TemporaryFile {
  std::filesystem::path path =
      std::filesystem::temp_directory_path() / fmt::format("kvlapse_bench_{}.kvl", getpid());
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
  header.rope_theta = model.spec.rope.theta;
  header.meta = {{"model", model.spec.name}, {"device", backend->describe()}};
  const TemporaryFile file;
  Recorder recorder(file.path, header, {.force = true});

  DecodeSession plain(*backend, model, options);
  options.observers = {&recorder};
  DecodeSession recorded(*backend, model, options);
  for (DecodeSession* session : {&plain, &recorded}) {
    session->add_sequence(request);
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
               fmt::format("{}, context {}, {}, {}, {}", model.spec.name, bench.context,
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
  row.numbers = {{"context", bench.context},
                 {"tokens_per_s", 1e3 / with.median},
                 {"tokens_per_s_unrecorded", 1e3 / without.median},
                 {"recorder_share", recorder.overhead_ratio()},
                 {"trace_bytes", static_cast<double>(recorder.writer().file_bytes())}};
  return {row};
}

}  // namespace kvlapse::cli
