#include "replay/sweep.h"

#include <algorithm>
#include <bit>
#include <map>
#include <set>

#include "core/base/error.h"
#include "replay/fit_centres.h"
#include "replay/trace_rows.h"
#include "trace/sqlite.h"

namespace kvlapse {
namespace {

std::string cell_id(const std::string& trace, const Policy& policy, const std::string& budget,
                    BudgetMatch match, const std::vector<int>& slots, const ReplayEngine& engine,
                    const SweepOptions& options) {
  const PolicyInfo& info = policy.info();
  ContentHash hash;
  hash.add("kvlapse replay").add(kReplayAlgorithm).add(trace).add(canonical_spec(policy)).add(info.version);
  for (const ParameterInfo& p : info.parameters) hash.add(p.name).add(std::bit_cast<int64_t>(p.value));
  const EvictionRule& r = info.rule;
  for (int64_t v :
       {int64_t{r.cadence}, int64_t{r.headroom}, static_cast<int64_t>(r.granularity),
        static_cast<int64_t>(r.gqa), static_cast<int64_t>(r.reclaim), static_cast<int64_t>(r.cast),
        static_cast<int64_t>(r.ties), int64_t{r.pin_prompt}, int64_t{r.sinks},
        std::bit_cast<int64_t>(r.recent), int64_t{r.ragged}, std::bit_cast<int64_t>(r.ragged_floor)})
    hash.add(v);
  hash.add(budget).add(budget_match_name(match));
  for (int s : slots) hash.add(s);
  hash.add(engine.layer_begin()).add(engine.layer_end()).add(options.max_tokens);
  if (options.replay.head_begin >= 0 || options.replay.head_end >= 0)
    hash.add("heads").add(engine.scope().head_begin).add(engine.scope().head_end);
  if (options.replay.step_begin >= 0 || options.replay.step_end >= 0)
    hash.add("steps").add(engine.scope().step_begin).add(engine.scope().step_end);
  if (options.device != nullptr && DeviceReplayer::supports(policy)) hash.add("gpu");
  return hash.hex();
}

// Whether the policy was calibrated on this recording, or on another one of the same tokens.
bool fitted_on(const PolicyInfo& policy, const TraceReader& trace) {
  if (policy.fitted_on.empty()) return false;
  auto knows = [&](const std::string& hash) {
    return std::find(policy.fitted_on.begin(), policy.fitted_on.end(), hash) != policy.fitted_on.end();
  };
  bool found = knows(trace.content_hash());
  for (int s = 0; s < trace.n_sequences(); ++s) found |= knows(token_hash(trace.sequence(s)));
  return found;
}

ResultTrace facts_of(const TraceReader& reader) {
  const TraceHeader& header = reader.header();
  ResultTrace facts;
  facts.hash = reader.content_hash();
  facts.name = reader.file().filename().string();
  auto model = header.meta.find("model");
  if (model != header.meta.end()) facts.model = model->second;
  facts.policy = header.policy.spec;
  facts.kv_dtype = dtype_name(header.geometry.dtype);
  facts.n_layers = header.geometry.n_layers;
  facts.n_q_heads = header.geometry.n_q_heads;
  facts.n_kv_heads = header.geometry.n_kv_heads;
  facts.head_dim = header.geometry.head_dim;
  facts.n_sequences = reader.n_sequences();
  for (int s = 0; s < reader.n_sequences(); ++s) facts.n_tokens += reader.n_steps(s);
  return facts;
}

}  // namespace

Sweep::Sweep(const std::vector<std::filesystem::path>& traces, const std::vector<PolicySpec>& policies,
             const std::vector<Budget>& budgets, SweepOptions options)
    : options_(std::move(options)) {
  if (options_.n_shards < 1 || options_.shard < 0 || options_.shard >= options_.n_shards)
    fail_usage("--shard: expected I/N with 0 <= I < N, found {}/{}", options_.shard, options_.n_shards);
  std::set<std::string> hashes;
  for (const std::filesystem::path& file : traces) {
    Trace trace;
    trace.reader = std::make_unique<TraceReader>(file, TraceReaderOptions{.cache_bytes = size_t{64} << 20});
    trace.facts = facts_of(*trace.reader);
    if (hashes.insert(trace.facts.hash).second) traces_.push_back(std::move(trace));
  }
  std::sort(traces_.begin(), traces_.end(),
            [](const Trace& a, const Trace& b) { return a.facts.hash < b.facts.hash; });
  std::vector<SweepCell> all;
  for (size_t t = 0; t < traces_.size(); ++t) {
    add_cells(t, policies, budgets);
    std::sort(cells_.begin(), cells_.end(),
              [](const SweepCell& a, const SweepCell& b) { return a.id < b.id; });
    cells_.erase(std::unique(cells_.begin(), cells_.end(),
                             [](const SweepCell& a, const SweepCell& b) { return a.id == b.id; }),
                 cells_.end());
    std::move(cells_.begin(), cells_.end(), std::back_inserter(all));
    cells_.clear();
  }
  const auto n = static_cast<int64_t>(all.size());
  const int64_t begin = n * options_.shard / options_.n_shards,
                end = n * (options_.shard + 1) / options_.n_shards;
  std::move(all.begin() + begin, all.begin() + end, std::back_inserter(cells_));
}

Sweep::~Sweep() = default;

std::string Sweep::selection_text(const SweepOptions& options) {
  std::string text;
  auto range = [&](std::string_view name, int begin, int end) {
    if (begin < 0 && end < 0) return;
    text += fmt::format("{}--{} {}:{}", text.empty() ? "" : " ", name, begin, end);
  };
  const ReplayOptions& replay = options.replay;
  range("layers", replay.layer_begin, replay.layer_end);
  range("heads", replay.head_begin, replay.head_end);
  range("steps", replay.step_begin, replay.step_end);
  if (options.max_tokens > 0)
    text += fmt::format("{}--max-tokens {}", text.empty() ? "" : " ", options.max_tokens);
  return text;
}

void Sweep::add_cells(size_t trace, const std::vector<PolicySpec>& policies,
                      const std::vector<Budget>& budgets) {
  const TraceReader& reader = *traces_[trace].reader;
  const TraceRows rows(reader, options_.max_tokens);
  const ReplayEngine engine(rows, options_.replay);
  for (const PolicySpec& spec : policies) {
    const std::shared_ptr<const Policy> policy = make_policy(spec);
    policy->check_model(rows.geometry(), rows.rope_theta());
    const bool fitted_here = fitted_on(policy->info(), reader);
    if (fitted_here && !policy->info().allows_fitted)
      fail(
          "{}: policy {}: its calibration was fitted on this recording or on its tokens: fit it on another "
          "one, "
          "or allow it with same_trace=allow",
          reader.file().string(), spec.name);
    for (const Budget& written : budgets) {
      // A policy that never evicts has one cell.
      const bool has_budget = policy->info().evicts || policy->info().selects;
      const Budget budget = has_budget ? written : Budget{100, true};
      SweepCell cell{trace, policy, budget.text(), {}, fitted_here, {}};
      for (int s = 0; s < rows.n_sequences(); ++s) {
        const RowSequence sequence = rows.sequence(s);
        const int slots = matched_budget(*policy, budget.slots(sequence.n_tokens), options_.match,
                                         rows.geometry().n_layers, sequence.n_prompt, sequence.n_tokens);
        check_budget(*policy, slots, sequence.n_prompt);
        cell.budget_slots.push_back(slots);
      }
      cell.id = cell_id(traces_[trace].facts.hash, *policy, cell.budget, options_.match, cell.budget_slots,
                        engine, options_);
      cells_.push_back(std::move(cell));
      if (!has_budget) break;
    }
  }
}

void Sweep::run(ResultsFile& results, const std::function<bool(double, double)>& progress) {
  std::vector<const SweepCell*> missing;
  for (const SweepCell& cell : cells_)
    if (!results.has(cell.id)) missing.push_back(&cell);
  const auto total = static_cast<double>(missing.size());
  for (size_t begin = 0; begin < missing.size();) {
    size_t end = begin + 1;
    while (end < missing.size() && missing[end]->trace == missing[begin]->trace &&
           end - begin < static_cast<size_t>(options_.cells_at_once))
      ++end;
    const std::vector<const SweepCell*> batch(missing.begin() + static_cast<ptrdiff_t>(begin),
                                              missing.begin() + static_cast<ptrdiff_t>(end));
    run_cells(batch, results, [&](double share) {
      return !progress ||
             progress(static_cast<double>(begin) + share * static_cast<double>(batch.size()), total);
    });
    begin = end;
  }
}

void Sweep::run_cells(const std::vector<const SweepCell*>& cells, ResultsFile& results,
                      const std::function<bool(double)>& progress) {
  const Trace& trace = traces_[cells[0]->trace];
  const TraceRows rows(*trace.reader, options_.max_tokens);
  const int n_sequences = rows.n_sequences();
  std::vector<std::vector<SequenceResult>> done(cells.size());  // [cell][sequence]
  int layer_begin = 0, layer_end = 0;
  for (int s = 0; s < n_sequences; ++s) {
    const RowSequence sequence = rows.sequence(s);
    for (const bool on_gpu : {true, false}) {
      std::vector<ReplayConfig> configs;
      std::vector<size_t> index;
      for (size_t c = 0; c < cells.size(); ++c) {
        if (on_device(*cells[c]) != on_gpu) continue;
        configs.push_back({cells[c]->policy, cells[c]->budget_slots[s]});
        index.push_back(c);
      }
      ReplayOptions options = options_.replay;
      const double share = static_cast<double>(configs.size()) / static_cast<double>(cells.size()),
                   before = on_gpu ? 0.0 : 1.0 - share;
      options.progress = [&, s](int layers, int total) {
        return progress((s + before + share * layers / total) / n_sequences);
      };
      const ReplayEngine engine(rows, options);
      layer_begin = engine.layer_begin();
      layer_end = engine.layer_end();
      if (configs.empty()) continue;
      std::vector<SequenceMetrics> metrics =
          on_gpu ? DeviceReplayer(rows, options, *options_.device).run(s, configs) : engine.run(s, configs);
      for (size_t i = 0; i < index.size(); ++i)
        done[index[i]].push_back(
            {std::move(metrics[i]), sequence.n_tokens, sequence.n_prompt, cells[index[i]]->budget_slots[s]});
    }
  }

  std::vector<ResultCell> out;
  for (size_t c = 0; c < cells.size(); ++c) {
    const SweepCell& cell = *cells[c];
    ResultCell result;
    result.id = cell.id;
    result.trace = trace.facts.hash;
    result.policy = canonical_spec(*cell.policy);
    result.budget = cell.budget;
    result.match = budget_match_name(options_.match);
    result.selection = selection_text(options_);
    int most_tokens = 0;
    for (int s = 0; s < n_sequences; ++s) {
      result.budget_slots = std::max(result.budget_slots, cell.budget_slots[s]);
      most_tokens = std::max(most_tokens, rows.sequence(s).n_tokens);
    }
    result.budget_share = static_cast<double>(result.budget_slots) / most_tokens;
    result.layer_begin = layer_begin;
    result.layer_end = layer_end;
    std::vector<const SequenceResult*> all;
    for (const SequenceResult& sequence : done[c]) {
      all.push_back(&sequence);
      result.sequences.push_back(summarise(rows.geometry(), cell.policy->info(), {&sequence}));
    }
    result.total = summarise(rows.geometry(), cell.policy->info(), all);
    if (on_device(cell)) result.total.push_back({"measured_on_gpu", 1});
    if (cell.fitted_here) result.total.push_back({"fitted_on_this_trace", 1});
    result.heads = summarise_heads(layer_begin, all);
    result.sketches = merged_sketches(all);
    result.series = merged_series(layer_begin, all);
    out.push_back(std::move(result));
  }
  results.add(trace.facts, out);
}

}  // namespace kvlapse
