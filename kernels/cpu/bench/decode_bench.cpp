#include <algorithm>
#include <chrono>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/decode_session.h"
#include "kernels/cpu/bench/bench.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {

std::vector<BenchRow> bench_decode(const DecodeBench& bench, const Model& model, const Policy& policy) {
  const int warm_up = 4;
  if (bench.context + bench.steps + warm_up >= model.spec.context)
    fail_usage("bench decode: expected a context of at most {}, found {}",
               model.spec.context - bench.steps - warm_up - 1, bench.context);
  std::unique_ptr<Backend> backend = make_cpu_backend(bench.n_threads, bench.mode);
  SessionOptions options;
  options.policy = &policy;
  options.budget.value = bench.budget;
  options.max_tokens = bench.steps + warm_up + 1;
  options.kv_dtype = bench.kv_dtype;
  options.ignore_eos = true;
  DecodeSession session(*backend, model, options);
  for (int b = 0; b < bench.batch; ++b) {
    SequenceRequest request;
    for (int i = 0; i < bench.context; ++i) {
      const uint64_t bits = counter_random({static_cast<uint64_t>(b), static_cast<uint64_t>(i)});
      request.prompt.push_back(static_cast<int32_t>(bits % static_cast<uint64_t>(model.spec.n_vocab)));
    }
    session.add_sequence(std::move(request));
  }
  session.step();
  // Of the prompt's own phases: packing the weights happens once for a model.
  int64_t prefill_ns = 0;
  for (int64_t ns : session.phase_ns()) prefill_ns += ns;

  std::vector<double> step_ms;
  OpBytes before = session.moved();
  for (int i = 0; i < warm_up + bench.steps; ++i) {
    if (i == warm_up) before = session.moved();
    const auto start = std::chrono::steady_clock::now();
    session.step();
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - start;
    if (i >= warm_up) step_ms.push_back(took.count());
  }
  const uint64_t read = (session.moved().read - before.read) / bench.steps;
  // Of as many bytes as a step reads: a small model's step finds part of them in the last-level cache, and so
  // must its limit.
  constexpr size_t kLeast = size_t{1} << 20, kMost = size_t{512} << 20;
  const double gbps = read_bandwidth_gbps(bench.n_threads, std::clamp(size_t{read}, kLeast, kMost));
  const Spread spread = spread_of(step_ms);
  const double floor_ms = static_cast<double>(read) / gbps * 1e-6;
  BenchRow row{"decode",
               fmt::format("{}, context {}, batch {}, {}, {}", model.spec.name, bench.context, bench.batch,
                           dtype_name(bench.kv_dtype), policy.info().name),
               backend->describe(),
               spread.median,
               "ms",
               floor_ms,
               floor_ms / spread.median,
               bench.steps,
               spread.relative,
               {},
               {}};
  row.numbers = {{"context", bench.context},
                 {"batch", bench.batch},
                 {"tokens_per_s", 1e3 * bench.batch / spread.median},
                 {"prompt_tokens_per_s", 1e9 * bench.context * bench.batch / static_cast<double>(prefill_ns)},
                 {"bytes_per_step", static_cast<double>(read)},  // modelled
                 {"read_ceiling_gbps", gbps}};
  return {row};
}

}  // namespace kvlapse
