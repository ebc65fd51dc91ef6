#include "core/engine/decode_session.h"

#include <algorithm>
#include <chrono>
#include <deque>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/engine/live_memory.h"

namespace kvlapse {
namespace {

using Clock = std::chrono::steady_clock;

// One layer of one sequence.
struct Layer {
  Layer(Backend& backend, const CacheGeometry& geometry, int layer, const Policy& policy, int budget,
        int n_prompt, int total_tokens, double rope_theta)
      : memory(backend, geometry, std::min(policy.info().query_window, total_tokens)),
        site(geometry, layer, policy, budget, n_prompt, memory, {.rope_theta = rope_theta}) {}
  LiveMemory memory;
  CacheSite site;
};

struct Sequence {
  SequenceState state;
  std::vector<int32_t> teacher;
  uint64_t seed = 0;
  int limit = 0;  // generated tokens
  std::deque<Layer> layers;
  std::vector<float> prompt_logits;  // behind the first token
  int logits_row = -1;               // of the backend's last head(); -1: prompt_logits
};

}  // namespace

struct DecodeSession::Impl {
  Impl(Backend& b, const Model& m, SessionOptions o)
      : backend(b), spec(m.spec), weights(m.weights.transformer), options(std::move(o)) {
    if (options.max_tokens < 1) fail_usage("max tokens: expected at least 1, found {}", options.max_tokens);
    if (options.prefill_block < 1)
      fail_usage("prefill block: expected at least 1, found {}", options.prefill_block);
    if (!(options.sampling.temperature >= 0))
      fail_usage("temperature: expected 0 or more, found {}", options.sampling.temperature);
    if (!(options.sampling.top_p > 0 && options.sampling.top_p <= 1))
      fail_usage("top-p: expected a number in (0, 1], found {}", options.sampling.top_p);
    if (options.sampling.top_k < 0) fail_usage("top-k: expected 0 or more, found {}", options.sampling.top_k);
    for (StepObserver* observer : options.observers) prompt_attention |= observer->wants_prompt_attention();
    prompt_attention |= options.policy->info().state_columns > 0;
    decides = options.policy->info().evicts || options.policy->info().state_columns > 0;
  }

  int64_t now_ns() const {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - began).count();
  }

  // Attributes the time since the last mark to a phase.
  void mark(StepPhase phase) {
    const int64_t now = now_ns();
    step_ns[static_cast<int>(phase)] += now - last_mark;
    last_mark = now;
  }
  int64_t begin_step() {
    step_ns.fill(0);
    return last_mark = now_ns();
  }

  bool interrupted() const { return options.interrupt && options.interrupt->load(std::memory_order_relaxed); }

  void end(int sequence, std::string_view reason) {
    SequenceState& state = sequences[sequence].state;
    state.live = false;
    state.end_reason = reason;
    for (StepObserver* observer : options.observers) observer->on_end(sequence, reason);
  }

  // The host's side of a layer for the rows of a step: places K and V, attends, and shows the observers.
  void attend_rows(int layer) {
    for (size_t i = 0; i < rows.size(); ++i) {
      Layer& l = sequences[live[i]].layers[layer];
      l.site.append(rows[i].pos, token_rows(static_cast<int>(i)));
      attend[i] = {&l.memory.kv(), &l.site.table(), static_cast<int>(i), l.site.fused_choice()};
      l.memory.attended(l.site.table());
    }
    moved += backend.attend(attend);
    mark(StepPhase::attention);
    if (!backend.queues_steps()) show_rows(layer);
  }

  // A layer of the step to the observers.
  void show_rows(int layer) {
    if (options.observers.empty()) return;
    for (size_t i = 0; i < rows.size(); ++i) {
      Layer& l = sequences[live[i]].layers[layer];
      show(live[i], layer, rows[i].pos, host_rows(layer, static_cast<int>(i)), l);
    }
    mark(StepPhase::observe);
  }

  void show(int sequence, int layer, Pos pos, const TokenRows& token, Layer& l) {
    for (StepObserver* observer : options.observers)
      observer->on_attended(sequence, layer, pos, token, l.site.table(), l.memory);
  }

  void show_plan(int sequence, int layer, const EvictionPlan* plan) {
    if (!plan) return;
    sequences[sequence].state.evictions += static_cast<int64_t>(plan->drops.size());
    for (StepObserver* observer : options.observers) observer->on_evicted(sequence, layer, *plan);
  }

  TokenRows token_rows(int row) const {
    const Backend::QkvRow r = backend.qkv_row(row);
    return {r.q, r.k, r.v};
  }

  TokenRows host_rows(int layer, int row) {
    const Backend::QkvRow r = backend.host_row(layer, row);
    return {r.q, r.k, r.v};
  }

  // Decisions of all layers at the step's end, in parallel: none depends on another, and none is needed
  // earlier.
  void evict_rows() {
    if (!decides) return;
    const int n_layers = spec.n_layers;
    plans.assign(rows.size() * n_layers, nullptr);
    backend.parallel(static_cast<int>(plans.size()), [&](int i) {
      const int row = i / n_layers;
      plans[i] = sequences[live[row]].layers[i % n_layers].site.finish(rows[row].pos);
    });
    mark(StepPhase::evict);
    for (size_t i = 0; i < plans.size(); ++i)
      show_plan(live[i / n_layers], static_cast<int>(i % n_layers), plans[i]);
    if (!options.observers.empty()) mark(StepPhase::observe);
  }

  // What is asked of a step's logits: known before they are.
  void ask(std::span<const int> chosen) {
    samples.clear();
    for (size_t i = 0; i < chosen.size(); ++i) {
      const Sequence& s = sequences[chosen[i]];
      SampleRow row{options.sampling.temperature, options.sampling.top_k, options.sampling.top_p, 0, -1};
      const auto at = static_cast<uint64_t>(s.state.tokens.size());  // position of the token to be chosen
      row.random = counter_random({s.seed, at});
      if (!s.teacher.empty()) row.forced = s.teacher[s.state.generated()];
      samples.push_back(row);
    }
  }

  // Logits of some rows are ready: chooses a token for each and ends what is at its end.
  void choose(std::span<const int> chosen, std::span<const Pos> fed, int64_t start_ns) {
    ask(chosen);
    results.resize(samples.size());
    backend.sample(samples, results);
    mark(StepPhase::sample);
    const int64_t total_ns = last_mark - start_ns;
    for (int p = 0; p < kStepPhases; ++p) totals[p] += step_ns[p];

    for (size_t i = 0; i < chosen.size(); ++i) {
      Sequence& s = sequences[chosen[i]];
      StepSummary summary;
      summary.sequence = chosen[i];
      summary.pos = fed[i];
      summary.token = s.state.tokens[raw(fed[i])];
      summary.next_token = results[i].token;
      summary.logprob = results[i].logprob;
      summary.margin = results[i].margin;
      summary.start_ns = start_ns;
      summary.total_ns = total_ns;
      summary.waited_ns = backend.waited_ns();
      if (!backend.queues_steps()) summary.phase_ns = step_ns;
      s.state.n_fed = raw(fed[i]) + 1;
      s.state.tokens.push_back(results[i].token);
      for (StepObserver* observer : options.observers) observer->on_step(summary);

      const bool eos =
          std::find(spec.eos_ids.begin(), spec.eos_ids.end(), results[i].token) != spec.eos_ids.end();
      if (eos && !options.ignore_eos)
        end(chosen[i], "eos");
      else if (s.state.generated() >= s.limit)
        end(chosen[i], "max_tokens");
      else if (static_cast<int>(s.state.tokens.size()) >= spec.context)
        end(chosen[i], "context");
    }
  }

  void prefill(int index) {
    Sequence& s = sequences[index];
    for (StepObserver* observer : options.observers) observer->on_prompt(index, s.state.tokens);
    const int64_t start = begin_step();
    const int n = s.state.n_prompt;
    for (int begin = 0; begin < n; begin += options.prefill_block) {
      if (interrupted()) return end(index, "interrupted");
      prefill_block(index, begin, std::min(options.prefill_block, n - begin));
    }
    for (int layer = 0; layer < spec.n_layers; ++layer)
      show_plan(index, layer, s.layers[layer].site.finish_prompt());
    mark(StepPhase::evict);
    const int last = (n - 1) % options.prefill_block;
    moved += backend.head({&last, 1});
    mark(StepPhase::head);
    const Pos pos{n - 1};
    choose({&index, 1}, {&pos, 1}, start);
    const std::span<const float> logits = backend.logits(0);
    s.prompt_logits.assign(logits.begin(), logits.end());
  }

  void prefill_block(int index, int begin, int n) {
    Sequence& s = sequences[index];
    rows.clear();
    for (int i = 0; i < n; ++i) rows.push_back({s.state.tokens[begin + i], Pos{begin + i}, true});
    moved += backend.embed(rows);
    mark(StepPhase::embed);
    for (int layer = 0; layer < spec.n_layers; ++layer) {
      Layer& l = s.layers[layer];
      moved += backend.project_qkv(layer);
      mark(StepPhase::matmul);
      for (int i = 0; i < n; ++i) {
        // A policy or observer that looks at every prompt token gets its attention one by one.
        l.memory.set_row(prompt_attention ? i : -1);
        const TokenRows token = token_rows(i);
        l.site.append_prompt(rows[i].pos, token, prompt_attention);
        if (prompt_attention) {
          mark(StepPhase::attention);
          if (!options.observers.empty()) show(index, layer, rows[i].pos, host_rows(layer, i), l);
          mark(StepPhase::observe);
        }
      }
      l.memory.set_row(-1);
      if (!prompt_attention) {
        l.memory.attended(l.site.table());
        moved += backend.attend_block(l.memory.kv(), begin);
        mark(StepPhase::attention);
        if (!options.observers.empty())
          for (int i = 0; i < n; ++i) show(index, layer, rows[i].pos, host_rows(layer, i), l);
        mark(StepPhase::observe);
      }
      moved += backend.output_and_ffn(layer);
      mark(StepPhase::matmul);
    }
  }

  bool any_live() const {
    return std::any_of(sequences.begin(), sequences.end(), [](const Sequence& s) { return s.state.live; });
  }

  bool start() {
    started = true;
    backend.prepare(weights, std::max(static_cast<int>(sequences.size()), options.prefill_block),
                    options.kv_dtype);
    backend.keep_rows(!options.observers.empty());
    for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
      if (interrupted())
        end(i, "interrupted");
      else
        prefill(i);
    }
    return any_live();
  }

  bool decode() {
    live.clear();
    for (int i = 0; i < static_cast<int>(sequences.size()); ++i) {
      if (!sequences[i].state.live) continue;
      if (interrupted())
        end(i, "interrupted");
      else
        live.push_back(i);
    }
    if (live.empty()) return false;

    const int64_t start = begin_step();
    rows.clear();
    positions.clear();
    heads.clear();
    for (int i : live) {
      SequenceState& state = sequences[i].state;
      positions.push_back(Pos{static_cast<int32_t>(state.tokens.size()) - 1});
      rows.push_back({state.tokens.back(), positions.back(), false});
      sequences[i].logits_row = static_cast<int>(heads.size());
      heads.push_back(static_cast<int>(heads.size()));
    }
    attend.resize(rows.size());
    moved += backend.embed(rows);
    mark(StepPhase::embed);
    for (int layer = 0; layer < spec.n_layers; ++layer) {
      moved += backend.project_qkv(layer);
      mark(StepPhase::matmul);
      attend_rows(layer);
      moved += backend.output_and_ffn(layer);
      mark(StepPhase::matmul);
    }
    ask(live);
    backend.expect_samples(samples);
    moved += backend.head(heads);
    mark(StepPhase::head);
    if (backend.queues_steps())
      for (int layer = 0; layer < spec.n_layers; ++layer) show_rows(layer);
    evict_rows();
    choose(live, positions, start);
    return any_live();
  }

  Backend& backend;
  const ModelSpec& spec;
  const TransformerWeights& weights;
  SessionOptions options;
  bool prompt_attention = false;  // somebody looks at the attention of prompt tokens
  bool decides = false;           // the policy has something to do after a step
  bool started = false;
  std::deque<Sequence> sequences;
  OpBytes moved;

  // Of the step in progress; kept so that a step allocates nothing.
  std::vector<int> live, heads;
  std::vector<Pos> positions;
  std::vector<BatchRow> rows;
  std::vector<AttendRow> attend;
  std::vector<SampleRow> samples;
  std::vector<SampleResult> results;
  std::vector<const EvictionPlan*> plans;

  Clock::time_point began = Clock::now();
  int64_t last_mark = 0;
  std::array<int64_t, kStepPhases> step_ns{}, totals{};
};

DecodeSession::DecodeSession(Backend& backend, const Model& model, SessionOptions options)
    : impl_(std::make_unique<Impl>(backend, model, std::move(options))) {}

DecodeSession::~DecodeSession() = default;

RequestPlan plan_request(const ModelSpec& spec, const SessionOptions& options,
                         const SequenceRequest& request) {
  const int n_prompt = static_cast<int>(request.prompt.size());
  if (n_prompt < 1) fail("prompt: expected at least 1 token, found 0");
  if (n_prompt >= spec.context)
    fail("prompt: expected at most {} tokens (the context of {} is {}), found {}", spec.context - 1,
         spec.name, spec.context, n_prompt);
  for (const std::vector<int32_t>* ids : {&request.prompt, &request.teacher})
    for (int32_t id : *ids)
      if (id < 0 || id >= spec.n_vocab) fail("token id: expected one of [0, {}), found {}", spec.n_vocab, id);
  RequestPlan plan;
  plan.max_tokens = request.max_tokens > 0 ? request.max_tokens : options.max_tokens;
  if (!request.teacher.empty())
    plan.max_tokens = std::min(plan.max_tokens, static_cast<int>(request.teacher.size()));
  plan.total_tokens = std::min(n_prompt + plan.max_tokens, spec.context);
  if (options.policy->info().evicts) plan.budget_slots = options.budget.slots(plan.total_tokens);
  check_budget(*options.policy, plan.budget_slots, n_prompt);
  return plan;
}

int DecodeSession::add_sequence(SequenceRequest request) {
  const ModelSpec& spec = impl_->spec;
  const SessionOptions& options = impl_->options;
  if (impl_->started) fail("sequence: expected before the first step, found after it");
  const RequestPlan plan = plan_request(spec, options, request);
  const int n_prompt = static_cast<int>(request.prompt.size()), total = plan.total_tokens;
  const int budget = plan.budget_slots;
  const Policy& policy = *options.policy;

  Sequence s;
  s.seed = request.seed;
  s.limit = plan.max_tokens;
  s.state.tokens = std::move(request.prompt);
  s.state.tokens.reserve(total);
  s.state.n_prompt = n_prompt;
  s.state.budget_slots = budget;
  s.teacher = std::move(request.teacher);
  // A scaled rotation is not undone by the base alone.
  const double rope_theta = spec.rope.scaling == RopeSpec::Scaling::none ? spec.rope.theta : 0;
  for (int layer = 0; layer < spec.n_layers; ++layer) {
    const int layer_budget = policy.layer_budget(layer, spec.n_layers, budget);
    const int capacity = CacheSite::capacity(policy, layer_budget, spec.layer.n_kv_heads, n_prompt, total);
    s.layers.emplace_back(impl_->backend, spec.cache_geometry(capacity, options.kv_dtype), layer, policy,
                          budget, n_prompt, total, rope_theta);
  }
  impl_->sequences.push_back(std::move(s));
  return n_sequences() - 1;
}

bool DecodeSession::step() {
  return impl_->started ? impl_->decode() : impl_->start();
}

int DecodeSession::n_sequences() const {
  return static_cast<int>(impl_->sequences.size());
}

const SequenceState& DecodeSession::sequence(int sequence) const {
  return impl_->sequences[sequence].state;
}

const SlotTable& DecodeSession::table(int sequence, int layer) const {
  return impl_->sequences[sequence].layers[layer].site.table();
}

std::span<const float> DecodeSession::logits(int sequence) const {
  const Sequence& s = impl_->sequences[sequence];
  return s.logits_row < 0 ? std::span<const float>(s.prompt_logits) : impl_->backend.logits(s.logits_row);
}

const std::array<int64_t, kStepPhases>& DecodeSession::phase_ns() const {
  return impl_->totals;
}

int64_t DecodeSession::now_ns() const {
  return impl_->now_ns();
}
OpBytes DecodeSession::moved() const {
  return impl_->moved;
}

}  // namespace kvlapse
