#include <chrono>
#include <deque>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/live_memory.h"
#include "kernels/cpu/activations.h"
#include "kernels/cpu/bench/bench.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvlapse {
namespace {

using Clock = std::chrono::steady_clock;

double micros(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::micro>(to - from).count();
}

struct Site {
  Site(Backend& backend, const CacheGeometry& geometry, const Policy& policy, int budget)
      : memory(backend, geometry, policy.info().query_window), site(geometry, 0, policy, budget, 1, memory) {}
  LiveMemory memory;
  CacheSite site;
};

// Repeatable rows of a spread that keeps softmax neither flat nor concentrated.
class Tokens {
 public:
  explicit Tokens(const AttentionBench& bench)
      : dtype_(bench.dtype),
        q_(static_cast<size_t>(bench.n_q_heads) * bench.head_dim),
        k_(static_cast<size_t>(bench.n_kv_heads) * bench.head_dim),
        v_(k_.size()) {}
  TokenRows next() {
    for (std::vector<float>* row : {&q_, &k_, &v_}) {
      for (float& value : *row) value = 3 * unit_float(mix64(++counter_)) - 1.5f;
      round_to(dtype_, *row);
    }
    return {q_.data(), k_.data(), v_.data()};
  }

 private:
  DType dtype_;
  std::vector<float> q_, k_, v_;
  uint64_t counter_ = 0;
};

}  // namespace

std::vector<BenchRow> bench_attention(const AttentionBench& bench, const Policy& policy) {
  if (!policy.info().evicts || policy.info().rule.cadence != 1)
    fail_usage("bench attention: expected a policy that evicts every step, found {}", policy.info().name);
  if (bench.n_q_heads % bench.n_kv_heads != 0)
    fail_usage("bench attention: kv heads: expected a divisor of {} query heads, found {}", bench.n_q_heads,
               bench.n_kv_heads);
  std::unique_ptr<Backend> backend = make_cpu_backend(bench.n_threads);
  TransformerWeights shape;
  shape.width = shape.ffn_width = shape.n_vocab = 8;
  shape.n_q_heads = bench.n_q_heads;
  shape.n_kv_heads = bench.n_kv_heads;
  shape.head_dim = bench.head_dim;
  backend->prepare(shape, bench.batch, bench.dtype);

  const CacheGeometry one{1, bench.n_q_heads, bench.n_kv_heads, bench.head_dim, bench.n_slots, bench.dtype};
  const size_t layer_bytes = 2 * one.layer_plane_bytes() * bench.batch;
  const int n_layers =
      static_cast<int>(std::max<size_t>(2, (bench.cache_bytes + layer_bytes - 1) / layer_bytes));
  std::deque<Site> sites;  // [layer][batch]
  Tokens tokens(bench);
  for (int i = 0; i < n_layers * bench.batch; ++i) {
    Site& s = sites.emplace_back(*backend, one, policy, bench.n_slots);
    for (int p = 0; p + 1 < bench.n_slots; ++p) s.site.append_prompt(Pos{p}, tokens.next());
  }

  std::vector<AttendRow> rows(bench.batch);
  std::vector<double> attend_us, evict_us;
  const int warm_up = 2;
  for (int run = 0; run < warm_up + bench.runs; ++run) {
    const Pos pos{bench.n_slots - 1 + run};
    std::vector<double> layer_us;
    for (int layer = 0; layer < n_layers; ++layer) {
      for (int b = 0; b < bench.batch; ++b) {
        Site& s = sites[layer * bench.batch + b];
        s.site.append(pos, tokens.next());
        s.memory.attended(s.site.table());
        rows[b] = {&s.memory.kv(), &s.site.table(), -1};
      }
      const auto start = Clock::now();
      backend->attend(rows);
      layer_us.push_back(micros(start, Clock::now()));
    }
    const auto start = Clock::now();
    backend->parallel(n_layers * bench.batch, [&](int i) { sites[i].site.finish(pos); });
    const double each = micros(start, Clock::now()) / n_layers;
    if (run < warm_up) continue;
    attend_us.push_back(spread_of(layer_us).median);
    evict_us.push_back(each);
  }
  const double gbps = read_bandwidth_gbps(bench.n_threads, bench.cache_bytes);
  const Spread attend = spread_of(attend_us), evict = spread_of(evict_us);
  const double floor_us = static_cast<double>(layer_bytes) / gbps * 1e-3;
  const std::string name =
      fmt::format("{} slots, {} over {} heads of {}, {}, batch {}", bench.n_slots, bench.n_q_heads,
                  bench.n_kv_heads, bench.head_dim, dtype_name(bench.dtype), bench.batch);

  BenchRow row{"attention",
               name,
               backend->describe(),
               attend.median,
               "us",
               floor_us,
               floor_us / attend.median,
               bench.runs,
               attend.relative,
               {},
               {}};
  row.texts = {{"dtype", std::string(dtype_name(bench.dtype))}};
  row.numbers = {{"batch", bench.batch},
                 {"slots", bench.n_slots},
                 {"q_heads", bench.n_q_heads},
                 {"kv_heads", bench.n_kv_heads},
                 {"head_dim", bench.head_dim},
                 {"kv_bytes", static_cast<double>(layer_bytes)},
                 {"median_us", attend.median},
                 {"floor_us", floor_us},
                 {"read_ceiling_gbps", gbps},
                 {"share_of_ceiling", floor_us / attend.median},
                 {"with_eviction", attend.median + evict.median}};
  BenchRow cost{"attention",
                fmt::format("importance and eviction of {}: {}", policy.info().name, name),
                backend->describe(),
                evict.median,
                "us",
                0.1 * attend.median,
                evict.median / (0.1 * attend.median),
                bench.runs,
                evict.relative,
                {},
                {}};
  cost.numbers = {{"share_of_attention", evict.median / attend.median}};
  return {row, cost};
}

}  // namespace kvlapse
