// What eviction gives back: pages of one generation over time, and a pool of many requests. All modelled from
// the victims that a replay chooses.
#include <fmt/format.h>

#include <algorithm>

#include "cli/command.h"
#include "cli/interrupt.h"
#include "cli/progress.h"
#include "cli/table.h"
#include "core/base/error.h"
#include "core/policy/spec.h"
#include "replay/memory_simulator.h"
#include "replay/page_pool.h"
#include "replay/replay_engine.h"
#include "replay/trace_rows.h"

namespace kvlapse::cli {
namespace {

struct Options {
  std::vector<std::string> traces, pool_lengths;
  std::string policies, budgets, table = "layer", mode;
  int block = 16, points = 0, pool_requests = 0, pool_gap = 0, threads = 0;
  double pool_gib = 0;
  uint64_t seed = 0;
};

// Points of the whole model, step by step, and their summary.
struct Curve {
  std::vector<MemoryPoint> points;
  MemorySummary summary;
};

void add(MemoryPoint& a, const MemoryPoint& b) {
  a.logical += b.logical;
  a.held += b.held;
  a.reclaimable += b.reclaimable;
  a.compacted += b.compacted;
  a.with_state += b.with_state;
}

// What follows from the points. `full_peak_bytes`: the full cache's peak over the same steps.
void sum_up(Curve& curve, int64_t full_peak_bytes) {
  MemorySummary& total = curve.summary;
  for (const MemoryPoint& p : curve.points) {
    total.peak.logical = std::max(total.peak.logical, p.logical);
    total.peak.held = std::max(total.peak.held, p.held);
    total.peak.reclaimable = std::max(total.peak.reclaimable, p.reclaimable);
    total.peak.compacted = std::max(total.peak.compacted, p.compacted);
    total.mean_logical += static_cast<double>(p.logical) / static_cast<double>(curve.points.size());
    total.mean_held += static_cast<double>(p.held) / static_cast<double>(curve.points.size());
  }
  total.full_bytes = full_peak_bytes;
  total.peak.with_state = total.peak.held + total.state_bytes + total.workspace_bytes;
  total.saved_peak_ratio = 1 - static_cast<double>(total.peak.held) / static_cast<double>(total.full_bytes);
}

// Every curve is a sum over layers, so each layer is simulated on its own from its plans. One decision's
// workspace serves all layers in turn.
Curve simulate(const RowSource& rows, const std::vector<std::vector<EvictionPlan>>& plans,
               const RowSequence& sequence, const Policy& policy, int budget, const MemoryOptions& options) {
  const int n_layers = static_cast<int>(plans.size());
  CacheGeometry layer_geometry = rows.geometry();
  layer_geometry.n_layers = 1;
  Curve curve;
  curve.points.resize(sequence.n_tokens);
  MemorySummary& total = curve.summary;
  for (int l = 0; l < n_layers; ++l) {
    const int layer_budget = policy.layer_budget(l, n_layers, budget);
    const int capacity = CacheSite::capacity(policy, layer_budget, layer_geometry.n_kv_heads,
                                             sequence.n_prompt, sequence.n_tokens);
    MemorySimulator memory(layer_geometry, policy, layer_budget, capacity, options);
    size_t next = 0;
    for (int t = 0; t < sequence.n_tokens; ++t) {
      memory.append(Pos{t});
      while (next < plans[l].size() && raw(plans[l][next].step) == t) memory.evict(0, plans[l][next++]);
      add(curve.points[t], memory.finish_step());
    }
    MemorySummary s = memory.summary();
    total.full_bytes += s.full_bytes;
    total.copied_bytes += s.copied_bytes;
    total.state_bytes += s.state_bytes;
    total.workspace_bytes = std::max(total.workspace_bytes, s.workspace_bytes);
    total.peak_slots = std::max(total.peak_slots, s.peak_slots);
    total.saved_nominal_ratio = s.saved_nominal_ratio;
  }
  total.last = curve.points.back();
  sum_up(curve, total.full_bytes);
  return curve;
}

// The sequences of a batch decode together: their prompts end at the same step, and one that has ended holds
// nothing more. What is left at the end is what each of them held at its own.
Curve join(const std::vector<Curve>& curves, const std::vector<RowSequence>& sequences) {
  if (curves.size() == 1) return curves.front();
  int longest_prompt = 0;
  for (const RowSequence& s : sequences) longest_prompt = std::max(longest_prompt, s.n_prompt);
  Curve all;
  MemorySummary& total = all.summary;
  std::vector<int64_t> full;  // by step
  double nominal = 0;
  for (size_t i = 0; i < curves.size(); ++i) {
    const MemorySummary& s = curves[i].summary;
    const size_t first = static_cast<size_t>(longest_prompt - sequences[i].n_prompt);
    const size_t n = curves[i].points.size();
    all.points.resize(std::max(all.points.size(), first + n));
    full.resize(all.points.size());
    for (size_t t = 0; t < n; ++t) {
      add(all.points[first + t], curves[i].points[t]);
      full[first + t] += s.full_bytes / static_cast<int64_t>(n) * static_cast<int64_t>(t + 1);
    }
    add(total.last, s.last);
    total.copied_bytes += s.copied_bytes;
    total.state_bytes += s.state_bytes;
    // Decisions are taken one sequence at a time.
    total.workspace_bytes = std::max(total.workspace_bytes, s.workspace_bytes);
    total.peak_slots = std::max(total.peak_slots, s.peak_slots);
    nominal += s.saved_nominal_ratio * static_cast<double>(s.full_bytes);
    total.full_bytes += s.full_bytes;
  }
  total.saved_nominal_ratio = nominal / static_cast<double>(total.full_bytes);
  sum_up(all, *std::max_element(full.begin(), full.end()));
  return all;
}

Json point_json(const MemoryPoint& p) {
  return {{"logical_bytes", p.logical},
          {"held_bytes", p.held},
          {"reclaimable_bytes", p.reclaimable},
          {"compacted_bytes", p.compacted},
          {"with_state_bytes", p.with_state}};
}

// Generated tokens of every sequence of the recordings.
std::vector<int> recorded_lengths(const std::vector<std::string>& files) {
  std::vector<int> lengths;
  for (const std::string& file : files) {
    const TraceReader trace(file);
    for (int s = 0; s < trace.n_sequences(); ++s)
      if (const int n = trace.n_steps(s) - trace.sequence(s).n_prompt; n > 0) lengths.push_back(n);
  }
  if (!files.empty() && lengths.empty())
    fail("--pool-lengths: expected recordings with generated tokens, found none");
  return lengths;
}

Json pool_json(const Options& o, const Curve& curve, const CacheGeometry& geometry,
               const RowSequence& sequence, const std::vector<int>& lengths) {
  const auto page_bytes = static_cast<int64_t>(geometry.head_token_bytes()) * o.block;
  const auto pool_pages = static_cast<int64_t>(o.pool_gib * (1 << 30)) / page_bytes;
  std::vector<int64_t> pages, logical;
  for (const MemoryPoint& p : curve.points) {
    pages.push_back((p.held - p.reclaimable) / page_bytes);
    logical.push_back(p.logical);
  }
  const int most = sequence.n_tokens - sequence.n_prompt;
  std::vector<PoolRequest> requests =
      lengths.empty() ? draw_requests(o.pool_requests, sequence.n_prompt, sequence.n_prompt,
                                      std::max(1, most / 4), most, o.pool_gap, o.seed)
                      : draw_requests(o.pool_requests, sequence.n_prompt, lengths, most, o.pool_gap, o.seed);
  PoolReport r = simulate_pool(requests, pages, logical, page_bytes, pool_pages);
  return {{"requests", o.pool_requests},
          {"pool_bytes", pool_pages * page_bytes},
          {"steps", r.steps},
          {"generated_tokens", r.generated_tokens},
          {"recomputed_tokens", r.recomputed_tokens},
          {"preemptions", r.preemptions},
          {"pages_allocated", r.pages_allocated},
          {"pages_freed", r.pages_freed},
          {"pages_peak", r.pages_peak},
          {"running_mean", r.running_mean},
          {"running_peak", r.running_peak},
          {"used_mean_ratio", r.used_mean_ratio},
          {"fragmentation_ratio", r.fragmentation_ratio},
          {"tokens_per_step", r.tokens_per_step}};
}

std::string mib(double bytes) {
  return fmt::format("{:.2f}", bytes / (1 << 20));
}

void run_memory(const Options& o, Context& context) {
  const std::vector<int> lengths = recorded_lengths(o.pool_lengths);
  Json rows_json = Json::array();
  Table table({"policy", "budget", "mode", "logical peak MiB", "held peak", "reclaimable end",
               "compacted end", "with state", "saved", "nominal"});
  Table pool({"policy", "budget", "mode", "running mean", "preemptions", "recomputed", "fragmentation",
              "tokens/step"});
  for (const std::string& file : o.traces) {
    TraceReader reader(file);
    TraceRows rows(reader);
    const int n_sequences = rows.n_sequences();
    std::vector<RowSequence> sequences;
    size_t longest = 0;
    for (int i = 0; i < n_sequences; ++i) {
      sequences.push_back(rows.sequence(i));
      if (sequences.back().n_tokens > sequences[longest].n_tokens) longest = static_cast<size_t>(i);
    }
    // By sequence: a share is taken of each one's length.
    std::vector<std::vector<ReplayConfig>> configs(n_sequences,
                                                   std::vector<ReplayConfig>{{make_policy("full"), 0}});
    std::vector<std::string> written{""};
    for (const PolicySpec& spec : parse_policy_list(o.policies)) {
      std::shared_ptr<const Policy> policy = make_policy(spec);
      if (!policy->info().evicts) continue;
      for (const Budget& b : parse_budget_list(o.budgets)) {
        written.push_back(b.text());
        for (int i = 0; i < n_sequences; ++i) {
          configs[i].push_back({policy, b.slots(sequences[i].n_tokens)});
          check_budget(*policy, configs[i].back().budget, sequences[i].n_prompt);
        }
      }
    }

    const int n_layers = rows.layer_end() - rows.layer_begin();
    std::vector<std::vector<Curve>> curves(configs[0].size());  // by sequence
    Progress progress(fmt::format("replaying {}", file), n_layers * n_sequences, "layers", !context.quiet);
    for (int i = 0; i < n_sequences; ++i) {
      std::vector<std::vector<std::vector<EvictionPlan>>> plans(
          configs[i].size(), std::vector<std::vector<EvictionPlan>>(n_layers));
      ReplayOptions replay;
      replay.threads = o.threads;
      replay.progress = [&](int done, int) {
        progress.update(i * n_layers + done);
        return !interrupted();
      };
      ReplayEngine(rows, replay)
          .decide(i, configs[i], [&](size_t config, int layer, const EvictionPlan& plan) {
            plans[config][layer - rows.layer_begin()].push_back(plan);
          });
      for (size_t c = 0; c < configs[i].size(); ++c) {
        const Policy& policy = *configs[i][c].policy;
        const MemoryOptions options{o.block, parse_block_table(o.table),
                                    o.mode.empty() ? natural_mode(policy) : parse_free_mode(o.mode)};
        curves[c].push_back(simulate(rows, plans[c], sequences[i], policy, configs[i][c].budget, options));
      }
    }
    progress.finish();

    for (size_t c = 0; c < curves.size(); ++c) {
      const Policy& policy = *configs[longest][c].policy;
      const int budget_slots = configs[longest][c].budget;  // the largest of a share
      const MemoryOptions options{o.block, parse_block_table(o.table),
                                  o.mode.empty() ? natural_mode(policy) : parse_free_mode(o.mode)};
      const Curve curve = join(curves[c], sequences);
      const MemorySummary& s = curve.summary;
      Json row = {{"trace", file},
                  {"policy", canonical_spec(policy)},
                  {"budget", written[c]},
                  {"budget_slots", budget_slots},
                  {"sequences", n_sequences},
                  {"block_tokens", o.block},
                  {"table", block_table_name(options.table)},
                  {"mode", free_mode_name(options.mode)},
                  {"full_bytes", s.full_bytes},
                  {"peak", point_json(s.peak)},
                  {"end", point_json(s.last)},
                  {"mean_logical_bytes", s.mean_logical},
                  {"mean_held_bytes", s.mean_held},
                  {"copied_bytes", s.copied_bytes},
                  {"state_bytes", s.state_bytes},
                  {"workspace_bytes", s.workspace_bytes},
                  {"peak_slots", s.peak_slots},
                  {"saved_peak_ratio", s.saved_peak_ratio},
                  {"saved_nominal_ratio", s.saved_nominal_ratio},
                  {"provenance", "modelled"}};
      if (o.points > 0) {
        Json points = Json::array();
        for (int i = 0; i < o.points; ++i) {
          size_t t = (curve.points.size() - 1) * static_cast<size_t>(i) / std::max(1, o.points - 1);
          Json p = point_json(curve.points[t]);
          p["step"] = t;
          points.push_back(std::move(p));
        }
        row["points"] = std::move(points);
      }
      const std::string budget = budget_slots > 0 ? fmt::format("{}", budget_slots) : "-";
      std::string mode(free_mode_name(options.mode));
      table.add({canonical_spec(policy), budget, mode, mib(static_cast<double>(s.peak.logical)),
                 mib(static_cast<double>(s.peak.held)), mib(static_cast<double>(s.last.reclaimable)),
                 mib(static_cast<double>(s.last.compacted)), mib(static_cast<double>(s.peak.with_state)),
                 fmt::format("{:.1f} %", 100 * s.saved_peak_ratio),
                 fmt::format("{:.1f} %", 100 * s.saved_nominal_ratio)});
      if (o.pool_requests > 0) {
        row["pool"] = pool_json(o, curves[c][longest], rows.geometry(), sequences[longest], lengths);
        const Json& p = row["pool"];
        pool.add({canonical_spec(policy), budget, mode,
                  fmt::format("{:.1f}", p["running_mean"].get<double>()),
                  fmt::format("{}", p["preemptions"].get<int64_t>()),
                  fmt::format("{}", p["recomputed_tokens"].get<int64_t>()),
                  fmt::format("{:.1f} %", 100 * p["fragmentation_ratio"].get<double>()),
                  fmt::format("{:.1f}", p["tokens_per_step"].get<double>())});
      }
      rows_json.push_back(std::move(row));
    }
  }
  if (context.json) {
    print_json({{"rows", rows_json}});
    return;
  }
  fmt::print("pages of {} tokens, one table per {}; modelled\n{}", o.block, o.table, table.text());
  if (o.pool_requests > 0)
    fmt::print("\npool of {:g} GiB, {} requests of a quarter to all of the recorded length\n{}", o.pool_gib,
               o.pool_requests, pool.text());
}

}  // namespace

void add_memory(CLI::App& app, Context& context) {
  CLI::App* command = add_command(
      app, context, "memory",
      "modelled: pages held, holes, reclaimable and peak bytes of a policy over a trace, its batch together",
      "  kvlapse memory run.kvl --policy longflow,rkv --budget 25% --block 16\n"
      "  kvlapse memory run.kvl --policy random --budget 512 --mode holes --pool 10000 --pool-gib 1");
  auto o = std::make_shared<Options>();
  command->add_option("traces", o->traces, "recordings with q, k, v")->required();
  command->add_option("--policy", o->policies, "policies, comma-separated; full is always shown")->required();
  command->add_option("--budget", o->budgets, "budgets, comma-separated")->required();
  command->add_option("--block", o->block, "tokens of a page")
      ->capture_default_str()
      ->check(CLI::Range(1, 65536));
  command->add_option("--table", o->table, "block tables: one per layer, or per kv head (head)")
      ->capture_default_str();
  command->add_option("--mode", o->mode, "holes, compact or fill (default: the reference's)");
  command->add_option("--points", o->points, "points of the curves to print with --json");
  command->add_option("--pool", o->pool_requests,
                      "requests, as the longest sequence, that share a pool of pages");
  command->add_option("--pool-gib", o->pool_gib, "size of the pool")->capture_default_str();
  command
      ->add_option(
          "--pool-lengths", o->pool_lengths,
          "requests as long as the sequences of these recordings (default: uniform, a quarter of the "
          "trace to all of it)")
      ->type_name("TRACE.kvl");
  command->add_option("--pool-gap", o->pool_gap, "decode steps between arrivals (default: all at once)");
  command->add_option("--seed", o->seed, "of the requests' lengths");
  command->add_option("-j,--threads", o->threads, "threads (default: all)");
  command->callback([o, &context] {
    if (o->pool_requests > 0 && !(o->pool_gib > 0))
      fail_usage("memory: --pool needs --pool-gib above 0, found {}", o->pool_gib);
    run_memory(*o, context);
  });
}

}  // namespace kvlapse::cli
