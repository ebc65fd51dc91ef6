#include "tests/support/trace/synthetic_trace.h"

#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <queue>

#include "core/base/error.h"
#include "core/base/rng.h"
#include "core/cache/slot_table.h"

namespace kvlapse::test {
namespace {

constexpr int kRecent = 8;  // tokens that the made-up rule never evicts

float rounded(float value, DType type) {
  if (type == DType::bf16) return bf16_to_f32(f32_to_bf16(value));
  if (type == DType::f16) return f16_to_f32(f32_to_f16(value));
  return value;
}

// Value of a token to the made-up rule; few are heavy.
float importance(const SyntheticProcess& process, int sequence, int layer, int head, int pos) {
  const float u =
      unit_float(counter_random({process.seed, static_cast<uint64_t>(sequence), static_cast<uint64_t>(layer),
                                 static_cast<uint64_t>(head), static_cast<uint64_t>(pos)}));
  return u * u * u * u;
}

struct Candidate {
  float score;
  int pos;
  bool operator>(const Candidate& other) const {
    return score != other.score ? score > other.score : pos > other.pos;
  }
};

// One victim row: a kv head, or the layer.
struct Row {
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> evictable;
  std::vector<int> slot_of;  // by position; -1: evicted
};

struct Layer {
  SlotTable table;
  std::vector<Row> rows;
};

}  // namespace

TraceHeader SyntheticProcess::header() const {
  TraceHeader header;
  header.geometry = geometry;
  header.tier = tier;
  header.layer_begin = layer_begin;
  header.layer_end = tier == TraceTier::events ? layer_begin : layer_end < 0 ? geometry.n_layers : layer_end;
  header.n_sequences = n_sequences;
  header.rope_theta = 10000;
  header.budget_slots = budget;
  header.budget_text = budget ? std::to_string(budget) : "full";
  header.policy.name = header.policy.spec = "synthetic";
  header.policy.summary = "lowest of a made-up value per token";
  header.policy.score_parts = {"value", "age"};
  header.policy.evicts = budget > 0;
  header.policy.rule.cadence = cadence;
  header.policy.rule.headroom = cadence == 1 ? 1 : 0;
  header.policy.rule.recent = kRecent;
  header.policy.rule.granularity = shared ? Granularity::layer : Granularity::kv_head;
  header.policy.rule.reclaim = cadence == 1 ? Reclaim::fill : Reclaim::compact;
  if (budget > 0) header.policy.layer_budgets.assign(geometry.n_layers, budget);
  header.meta["model"] = "synthetic";
  header.meta["device"] = "none: synthetic";
  return header;
}

std::vector<float> synthetic_row(const SyntheticProcess& process, int sequence, int layer, RowKind kind,
                                 int pos) {
  const CacheGeometry& g = process.geometry;
  const int n = (kind == RowKind::q ? g.n_q_heads : g.n_kv_heads) * g.head_dim;
  std::vector<float> row(n);
  const uint64_t key =
      counter_random({process.seed, static_cast<uint64_t>(sequence), static_cast<uint64_t>(layer),
                      static_cast<uint64_t>(kind), static_cast<uint64_t>(pos)});
  for (int i = 0; i < n; ++i) {
    // Sum of four uniform draws: near enough to a normal distribution to compress like one.
    const uint64_t bits = mix64(key + static_cast<uint64_t>(i));
    float value = -2.0f;
    for (int part = 0; part < 4; ++part)
      value += static_cast<float>((bits >> (16 * part)) & 0xffff) / 65536.0f;
    row[i] = rounded(value + std::sin(0.05f * static_cast<float>(i)), g.dtype);
  }
  return row;
}

int32_t synthetic_token(const SyntheticProcess& process, int sequence, int pos) {
  return static_cast<int32_t>(
      counter_random({process.seed, 77, static_cast<uint64_t>(sequence), static_cast<uint64_t>(pos)}) % 1000);
}

struct SyntheticRun::Impl {
  TraceWriter& writer;
  SyntheticProcess process;
  std::vector<std::vector<Layer>> sequences;
  int pos = 0;
  std::vector<int32_t> held;
  std::vector<SketchRow> sketch;

  Impl(TraceWriter& trace_writer, const SyntheticProcess& made_up) : writer(trace_writer), process(made_up) {
    const CacheGeometry& g = process.geometry;
    held.resize(g.n_kv_heads);
    sketch.resize(g.n_kv_heads);
    sequences.resize(process.n_sequences);
    for (int s = 0; s < process.n_sequences; ++s) {
      std::vector<int32_t> prompt(process.n_prompt);
      for (int p = 0; p < process.n_prompt; ++p) prompt[p] = synthetic_token(process, s, p);
      writer.begin_sequence(s, process.seed + s, process.budget, prompt);
      for (int l = 0; l < g.n_layers; ++l)
        sequences[s].push_back(
            {SlotTable(g.n_kv_heads, process.n_steps), std::vector<Row>(process.shared ? 1 : g.n_kv_heads)});
    }
  }

  void append(int s, int l) {
    const CacheGeometry& g = process.geometry;
    Layer& layer = sequences[s][l];
    for (size_t r = 0; r < layer.rows.size(); ++r) {
      layer.rows[r].slot_of.push_back(raw(layer.table.next_slot(static_cast<int>(r))));
      // A token may go once it is no longer recent.
      if (pos >= kRecent)
        layer.rows[r].evictable.push(
            {importance(process, s, l, static_cast<int>(r), pos - kRecent), pos - kRecent});
    }
    layer.table.append(Pos{pos});
    for (int h = 0; h < g.n_kv_heads; ++h) held[h] = layer.table.count(h);
    LayerRecord record;
    record.held = held;
    std::vector<float> q, k, v;
    TokenRows rows;
    if (writer.header().has_rows(l)) {
      q = synthetic_row(process, s, l, RowKind::q, pos);
      k = synthetic_row(process, s, l, RowKind::k, pos);
      v = synthetic_row(process, s, l, RowKind::v, pos);
      rows = {q.data(), k.data(), v.data()};
      record.rows = &rows;
    }
    if (writer.header().has_sketch(l) && pos >= process.n_prompt) {
      for (int h = 0; h < g.n_kv_heads; ++h) make_sketch(layer, h);
      record.sketch = sketch;
    }
    writer.append(s, l, Pos{pos}, record);
  }

  void make_sketch(const Layer& layer, int h) {
    SketchRow& row = sketch[h];
    row.pos.fill(-1);
    row.weight.fill(0);
    const std::span<const Pos> positions = layer.table.positions(h);
    const int n = std::min<int>(kSketchTop, static_cast<int>(positions.size()));
    for (int i = 0; i < n; ++i) {
      row.pos[i] = raw(positions[positions.size() - 1 - i]);
      row.weight[i] = std::ldexp(0.5f, -i);
    }
    row.recall = process.budget > 0 && pos >= process.budget ? std::numeric_limits<float>::quiet_NaN() : 1.0f;
    row.entropy = 1.386f;
  }

  void evict(int s, int l, EvictionReason reason) {
    const CacheGeometry& g = process.geometry;
    Layer& layer = sequences[s][l];
    const int target = process.budget - (process.cadence == 1 ? 1 : 0);
    if (process.budget == 0 || layer.table.max_count() <= target) return;
    if (reason == EvictionReason::over_budget && (pos + 1) % process.cadence != 0) return;
    const bool fill = process.cadence == 1 && reason == EvictionReason::over_budget;
    EvictionPlan plan;
    plan.step = Pos{pos};
    plan.reason = reason;
    plan.reclaim = fill ? Reclaim::fill : Reclaim::compact;
    if (!fill) plan.keep.resize(g.n_kv_heads);
    for (size_t r = 0; r < layer.rows.size(); ++r) {
      Row& row = layer.rows[r];
      std::vector<char> gone(layer.table.count(static_cast<int>(r)), 0);
      for (int excess = static_cast<int>(gone.size()) - target; excess > 0; --excess) {
        const Candidate victim = row.evictable.top();
        row.evictable.pop();
        Drop drop{process.shared ? kWholeLayer : static_cast<int>(r),
                  Slot{row.slot_of[victim.pos]},
                  Pos{victim.pos},
                  victim.score,
                  {victim.score, static_cast<float>(pos - victim.pos)}};
        row.slot_of[victim.pos] = -1;
        gone[raw(drop.slot)] = 1;
        plan.drops.push_back(drop);
      }
      plan.threshold.push_back(row.evictable.empty() ? std::numeric_limits<float>::infinity()
                                                     : row.evictable.top().score);
      if (fill) continue;
      std::vector<Slot> keep;
      for (size_t slot = 0; slot < gone.size(); ++slot)
        if (!gone[slot]) keep.push_back(Slot{static_cast<int>(slot)});
      const std::span<const Pos> positions = layer.table.positions(static_cast<int>(r));
      for (size_t i = 0; i < keep.size(); ++i)
        row.slot_of[raw(positions[raw(keep[i])])] = static_cast<int>(i);
      for (int h = process.shared ? 0 : static_cast<int>(r);
           h < (process.shared ? g.n_kv_heads : static_cast<int>(r) + 1); ++h)
        plan.keep[h] = keep;
    }
    std::sort(plan.drops.begin(), plan.drops.end(), [](const Drop& a, const Drop& b) {
      return a.kv_head != b.kv_head ? a.kv_head < b.kv_head : a.slot < b.slot;
    });
    writer.evict(s, l, plan);
    if (fill) {
      for (const Drop& drop : plan.drops)
        for (int h = 0; h < g.n_kv_heads; ++h)
          if (drop.kv_head == kWholeLayer || drop.kv_head == h) layer.table.vacate(h, drop.slot);
    } else {
      for (int h = 0; h < g.n_kv_heads; ++h) layer.table.compact(h, plan.keep[h]);
    }
  }
};

SyntheticRun::SyntheticRun(TraceWriter& writer, const SyntheticProcess& process)
    : impl_(std::make_unique<Impl>(writer, process)) {}
SyntheticRun::~SyntheticRun() = default;
int SyntheticRun::position() const {
  return impl_->pos;
}

bool SyntheticRun::step() {
  const SyntheticProcess& process = impl_->process;
  const int pos = impl_->pos;
  if (pos >= process.n_steps) return false;
  for (int s = 0; s < process.n_sequences; ++s) {
    for (int l = 0; l < process.geometry.n_layers; ++l) {
      impl_->append(s, l);
      if (pos >= process.n_prompt - 1)
        impl_->evict(
            s, l, pos < process.n_prompt ? EvictionReason::prompt_over_budget : EvictionReason::over_budget);
    }
    if (pos < process.n_prompt - 1) continue;
    StepSummary summary;
    summary.sequence = s;
    summary.pos = Pos{pos};
    summary.token = synthetic_token(process, s, pos);
    summary.next_token = synthetic_token(process, s, pos + 1);
    summary.logprob = -0.25f;
    summary.margin = 2.5f;
    summary.start_ns = int64_t{1'000'000} * pos;
    summary.total_ns = 900'000;
    for (int p = 0; p < kStepPhases; ++p) summary.phase_ns[p] = 1000 * (p + 1);
    if (process.on_step) process.on_step(impl_->writer, process, summary, impl_->held[0]);
    impl_->writer.step(summary);
  }
  ++impl_->pos;
  return true;
}

void SyntheticRun::end(std::string_view reason) {
  for (int s = 0; s < impl_->process.n_sequences; ++s) {
    TraceSequence facts;
    facts.sequence = s;
    facts.task = "synthetic";
    facts.prompt = "a prompt";
    facts.text = "a text";
    facts.answer = "42";
    facts.answer_right = s % 2 == 0;
    facts.think_begin = impl_->process.n_prompt;
    facts.think_end = impl_->pos - 2;
    impl_->writer.describe_sequence(facts);
    impl_->writer.end_sequence(s, reason);
  }
}

void write_synthetic_trace(const std::filesystem::path& file, const SyntheticProcess& process,
                           TraceWriterOptions options) {
  TraceWriter writer(file, process.header(), options);
  SyntheticRun run(writer, process);
  while (run.step()) {
  }
  run.end("max_tokens");
  writer.finish(/*interrupted=*/false);
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "kvlapse-test-XXXXXX").string();
  if (!mkdtemp(name.data())) fail("{}: cannot make a folder", name);
  path_ = name;
}
TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

}  // namespace kvlapse::test
