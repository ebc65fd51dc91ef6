#include "replay/replay_engine.h"

#include <tbb/global_control.h>
#include <tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <optional>

#include "replay/future_tables.h"
#include "replay/parallel_for.h"
#include "replay/value_tile.h"

namespace kvlapse {
namespace {

constexpr int kMostWindowRows = 512;  // logits of older queries are computed when asked for

size_t config_bytes(const CacheGeometry& g, int n_tokens, const ReplayConfig& config) {
  const size_t capacity = config.policy->info().evicts
                              ? static_cast<size_t>(std::min(n_tokens, config.budget + 512))
                              : static_cast<size_t>(n_tokens);
  const size_t retention = static_cast<size_t>(g.n_kv_heads) * n_tokens * 5;
  // Eight steps of weights ahead, of each query head.
  const size_t slots =
      static_cast<size_t>(8 * g.n_q_heads + g.n_kv_heads * (config.policy->info().state_columns + 1)) *
      capacity * 4;
  const size_t ahead =
      contains(config.policy->info().signals, Signal::future) ? FutureTables::memory_bytes(g, n_tokens) : 0;
  return retention + slots + ahead + size_t{256} * 1024;
}

bool looks_ahead(const std::vector<ReplayConfig>& configs) {
  return std::any_of(configs.begin(), configs.end(), [](const ReplayConfig& config) {
    return contains(config.policy->info().signals, Signal::future);
  });
}

// The metrics of the loaded block, a kv head at a time: a tile of tokens stays in the core's cache while
// every configuration adds what it needs of it.
void close_block(const SharedLayer& shared, std::vector<ValueTile>& tiles,
                 const std::vector<std::unique_ptr<ConfigRun>>& runs) {
  const MetricScope& scope = runs[0]->collector()->scope();
  const int begin = std::max({shared.begin(), shared.sequence().n_prompt, scope.step_begin}),
            end = shared.end();
  if (begin >= end) return;
  parallel_for(scope.head_begin, scope.head_end, [&](int h) {
    ValueTile& tile = tiles[h];
    tile.begin(shared, h);
    for (const auto& run : runs) run->collector()->begin_outputs(h, begin, end);
    for (int first = 0; first < end; first += ValueTile::kTokens) {
      tile.load(first, std::min(end, first + ValueTile::kTokens));
      for (const auto& run : runs) run->collector()->add_tile(h, tile);
    }
    tile.finish();
    for (const auto& run : runs) run->collector()->finish_outputs(h, tile);
  });
}

int layer_capacity(const SharedLayer& shared, const ReplayConfig& config) {
  const CacheGeometry& g = shared.geometry();
  return CacheSite::capacity(*config.policy,
                             config.policy->layer_budget(shared.layer(), g.n_layers, config.budget),
                             g.n_kv_heads, shared.sequence().n_prompt, shared.sequence().n_tokens);
}

}  // namespace

SharedLayerNeeds shared_needs(const std::vector<ReplayConfig>& configs, bool metrics) {
  SharedLayerNeeds needs;
  needs.metrics = metrics;
  if (metrics) needs.window = 1;  // the query before, for the cosine of consecutive ones
  for (const ReplayConfig& config : configs) {
    const PolicyInfo& info = config.policy->info();
    needs.window = std::max(needs.window, std::min(info.query_window, kMostWindowRows));
    needs.all_queries |= info.query_window > kMostWindowRows;
    needs.alike_above = std::max(needs.alike_above, info.alike_above);  // one value in the catalogue
    needs.keys |=
        contains(info.signals, Signal::keys) || info.query_window > kMostWindowRows || info.cache_positions;
  }
  return needs;
}

int first_attended_step(const std::vector<ReplayConfig>& configs, const RowSequence& sequence) {
  for (const ReplayConfig& config : configs)
    if (config.policy->info().state_columns > 0) return 0;
  return std::max(0, sequence.n_prompt - 1) / kMetricSteps * kMetricSteps;
}

ConfigRun::ConfigRun(const SharedLayer& shared, const ReplayConfig& config, const MetricScope* scope,
                     FutureInputs* future, PlanVisitor visitor)
    : shared_(shared),
      retention_(shared.geometry().n_kv_heads, shared.sequence().n_tokens),
      memory_(shared, layer_capacity(shared, config)),
      visitor_(std::move(visitor)),
      selects_(config.policy->info().selects) {
  CacheGeometry geometry = shared.geometry();
  geometry.n_slots = layer_capacity(shared, config);
  const SiteFacts facts{.rope_theta = shared.rope_theta(), .future = future, .may_select = true};
  site_ = std::make_unique<CacheSite>(geometry, shared.layer(), *config.policy, config.budget,
                                      shared.sequence().n_prompt, memory_, facts);
  if (scope) collector_ = std::make_unique<MetricsCollector>(shared, retention_, *scope, selects_);
}

void ConfigRun::evicted(const EvictionPlan* plan) {
  if (plan == nullptr) return;
  retention_.apply(*plan, shared_.geometry().n_kv_heads);
  if (collector_) collector_->on_evicted(*plan);
  if (visitor_) visitor_(*plan);
}

void ConfigRun::advance() {
  const int n_prompt = shared_.sequence().n_prompt, end = shared_.end();
  for (; next_ < end; ++next_) {
    const Pos pos{next_};
    if (next_ < n_prompt) {
      site_->append_prompt(pos, {});
      if (next_ == n_prompt - 1) evicted(site_->finish_prompt());
      continue;
    }
    site_->append(pos, {});
    memory_.attend(site_->table(), pos);
    if (collector_) {
      collector_->on_attended(site_->table(), next_);
      for (int h = 0; h < site_->table().n_kv_heads(); ++h)
        if (!memory_.moved(h).empty()) collector_->on_moved(h, next_, memory_.moved(h));
      if (selects_) collector_->on_selected(site_->table(), next_, site_->select());
    }
    const bool probes = collector_ && collector_->scope().has_step(next_) && next_ >= next_probe_ &&
                        (next_ + 1) % site_->rule().cadence == 0 &&
                        site_->table().max_count() > site_->budget() - site_->rule().headroom;
    if (probes) probe_.take(*site_, memory_, shared_, next_);
    const EvictionPlan* plan = site_->finish(pos);
    if (probes) {
      site_->evictor().count_sensitivity(false);
      if (plan != nullptr) {
        next_probe_ = (next_ / kProbeSteps + 1) * kProbeSteps;
        collector_->on_probe(probe_.correlations(site_->evictor().scores()), site_->evictor().sensitivity());
      }
    }
    evicted(plan);
  }
}

ReplayEngine::ReplayEngine(const RowSource& source, ReplayOptions options)
    : source_(source), options_(std::move(options)) {
  layer_begin_ = options_.layer_begin < 0 ? source.layer_begin() : options_.layer_begin;
  layer_end_ = options_.layer_end < 0 ? source.layer_end() : options_.layer_end;
  if (layer_begin_ < source.layer_begin() || layer_end_ > source.layer_end() || layer_begin_ >= layer_end_)
    fail("replay: layers: expected a range within the recorded {}:{}, found {}:{}", source.layer_begin(),
         source.layer_end(), layer_begin_, layer_end_);
  const int n_heads = source.geometry().n_kv_heads;
  int most_tokens = 0;
  for (int s = 0; s < source.n_sequences(); ++s)
    most_tokens = std::max(most_tokens, source.sequence(s).n_tokens);
  scope_.head_begin = options_.head_begin < 0 ? 0 : options_.head_begin;
  scope_.head_end = options_.head_end < 0 ? n_heads : options_.head_end;
  if (scope_.head_end > n_heads || scope_.head_begin >= scope_.head_end)
    fail("replay: heads: expected a range within the kv heads 0:{}, found {}:{}", n_heads, scope_.head_begin,
         scope_.head_end);
  scope_.step_begin = options_.step_begin < 0 ? 0 : options_.step_begin;
  scope_.step_end = options_.step_end < 0 ? most_tokens : options_.step_end;
  if (scope_.step_end > most_tokens || scope_.step_begin >= scope_.step_end)
    fail("replay: steps: expected a range within the positions 0:{}, found {}:{}", most_tokens,
         scope_.step_begin, scope_.step_end);
  const bool selects_steps = options_.step_begin >= 0 || options_.step_end >= 0;
  for (int s = 0; s < source.n_sequences() && selects_steps; ++s) {
    const RowSequence rows = source.sequence(s);
    if (std::max(scope_.step_begin, rows.n_prompt) >= std::min(scope_.step_end, rows.n_tokens))
      fail("replay: steps {}:{}: sequence {}: expected a generated token there, its are {}:{}",
           scope_.step_begin, scope_.step_end, s, rows.n_prompt, rows.n_tokens);
  }
}

void ReplayEngine::over_layers(int sequence, const std::vector<ReplayConfig>& configs, bool metrics,
                               const std::function<ConfigRun::PlanVisitor(size_t, int)>& visitor,
                               const std::function<void(int, Runs&)>& finished) const {
  const RowSequence rows = source_.sequence(sequence);
  const int n_steps = std::min(rows.n_tokens, scope_.step_end);
  SharedLayerNeeds needs = shared_needs(configs, metrics);
  needs.measured_from = scope_.step_begin;
  const int threads = options_.threads > 0 ? options_.threads : tbb::this_task_arena::max_concurrency();
  const int n_layers = layer_end_ - layer_begin_;
  size_t of_configs = 0;
  for (const ReplayConfig& config : configs)
    of_configs += config_bytes(source_.geometry(), rows.n_tokens, config);
  auto layer_bytes = [&] {
    return of_configs + SharedLayer::memory_bytes(source_.geometry(), rows.n_tokens, needs) +
           (metrics ? ValueTile::memory_bytes(source_.geometry()) * source_.geometry().n_kv_heads : 0);
  };
  if (layer_bytes() > options_.memory_bytes)
    fail(
        "replay: memory: one layer of {} tokens under {} configurations needs {} MiB, the setting allows {} "
        "MiB",
        rows.n_tokens, configs.size(), (layer_bytes() >> 20) + 1, options_.memory_bytes >> 20);
  const int at_once = static_cast<int>(std::min<size_t>(
      {static_cast<size_t>(threads), static_cast<size_t>(n_layers), options_.memory_bytes / layer_bytes()}));

  const tbb::global_control limit(tbb::global_control::max_allowed_parallelism, static_cast<size_t>(threads));
  tbb::task_arena arena(threads);
  std::atomic<int> next{layer_begin_}, done{0};
  std::atomic<bool> stop{false};
  auto over_layer = [&](int layer) {
    SharedLayer shared(source_, sequence, layer, needs);
    std::vector<ValueTile> tiles(static_cast<size_t>(source_.geometry().n_kv_heads));
    std::optional<FutureTables> future;
    if (looks_ahead(configs)) future.emplace(source_, sequence, layer);
    Runs runs;
    for (size_t c = 0; c < configs.size(); ++c)
      runs.push_back(std::make_unique<ConfigRun>(shared, configs[c], metrics ? &scope_ : nullptr,
                                                 future ? &*future : nullptr,
                                                 visitor ? visitor(c, layer) : nullptr));
    for (int begin = first_attended_step(configs, rows); begin < n_steps; begin += kMetricSteps) {
      if (stop) return;
      shared.load(begin, std::min(n_steps, begin + kMetricSteps));
      parallel_for(size_t{0}, runs.size(), [&](size_t c) { runs[c]->advance(); });
      if (metrics && shared.end() > rows.n_prompt) close_block(shared, tiles, runs);
    }
    finished(layer, runs);
  };
  arena.execute([&] {
    // `at_once` workers take layers in turn; inside one, configurations run in parallel. A worker that waits
    // for its own configurations must not start another layer: that would hold two layers' memory.
    parallel_for(0, at_once, [&](int) {
      for (int layer = next++; layer < layer_end_ && !stop; layer = next++) {
        tbb::this_task_arena::isolate([&] { over_layer(layer); });
        if (options_.progress && !options_.progress(++done, n_layers)) stop = true;
      }
    });
  });
  if (stop) throw Interrupted("replay: interrupted");
}

std::vector<SequenceMetrics> ReplayEngine::run(int sequence, const std::vector<ReplayConfig>& configs) const {
  std::vector<SequenceMetrics> results(configs.size(), SequenceMetrics(layer_end_ - layer_begin_));
  over_layers(sequence, configs, true, nullptr, [&](int layer, Runs& runs) {
    for (size_t c = 0; c < runs.size(); ++c) results[c][layer - layer_begin_] = runs[c]->finish();
  });
  return results;
}

void ReplayEngine::decide(int sequence, const std::vector<ReplayConfig>& configs,
                          const std::function<void(size_t, int, const EvictionPlan&)>& visitor) const {
  over_layers(
      sequence, configs, false,
      [&](size_t c, int layer) {
        return [&visitor, c, layer](const EvictionPlan& plan) { visitor(c, layer, plan); };
      },
      [](int, Runs&) {});
}

}  // namespace kvlapse
