#include "trace/verify.h"

#include <algorithm>
#include <cmath>

#include "core/base/error.h"
#include "trace/trace_file.h"
#include "trace/trace_reader.h"

namespace kvlapse {
namespace {

struct Enough {};  // thrown when the report is full

// The reader's own messages begin with the file.
std::string without_file(std::string line, const std::string& file) {
  return line.starts_with(file + ": ") ? line.substr(file.size() + 2) : line;
}

class Verifier {
 public:
  Verifier(const std::filesystem::path& file, int most, const std::function<void(int64_t, int64_t)>& progress,
           VerifyReport& report)
      : most_(most),
        progress_(progress),
        report_(report),
        reader_(file),
        database_(open_file_for_reading(file, trace_file_kind())),
        header_(reader_.header()),
        name_(file.string()) {}

  void run() {
    report_.complete = reader_.complete();
    check_chunks();
    check_structure();
    check_meta();
    if (reader_.format_version() >= 3) check_gpu();
    for (int s = 0; s < reader_.n_sequences(); ++s) {
      try {
        check_sequence(s);
      } catch (const Error& error) {
        add("{}", error.what());
      }
    }
  }

 private:
  template <typename... Args>
  void add(fmt::format_string<Args...> format, Args&&... args) {
    report_.violations.push_back(without_file(fmt::format(format, std::forward<Args>(args)...), name_));
    if (static_cast<int>(report_.violations.size()) >= most_) throw Enough();
  }

  void check_chunks() {
    for (const ChunkDamage& chunk : reader_.damaged_chunks(progress_)) {
      if (chunk.kind.empty())
        add("{}", chunk.what);
      else
        add("chunk {} ({} of sequence {}, layer {}, steps {} to {}): {}", chunk.id, chunk.kind,
            chunk.sequence, chunk.layer, chunk.step_begin, chunk.step_end, chunk.what);
    }
    report_.chunks = database_.query_integer("SELECT count(*) FROM KV_CHUNK");
  }

  void check_structure() {
    try {
      Statement check(database_, "PRAGMA quick_check(5)");
      while (check.step())
        if (check.text(0) != "ok") add("SQLite structure: {}", one_line(check.text(0)));
    } catch (const Error& error) {
      add("{}", error.what());
    }
  }

  static std::string one_line(std::string_view text) {
    std::string line(text);
    std::replace(line.begin(), line.end(), '\n', ' ');
    return line;
  }

  void check_meta() {
    const MetaMap meta = reader_.meta();
    if (reader_.complete() && reader_.interrupted()) add("KV_META: complete and interrupted are both 1");
    if (auto dropped = meta.find("dropped_records"); dropped != meta.end() && dropped->second != "0")
      add("KV_META: dropped_records: expected 0, found {}", dropped->second);
    if (auto hash = meta.find("content_hash"); hash != meta.end()) {
      if (const std::string found = compute_content_hash(database_, header_); found != hash->second)
        add("KV_META: content_hash: expected {}, found {}", found, hash->second);
    } else if (reader_.complete()) {
      add("KV_META: complete is 1, expected the key content_hash, found none");
    }
    if (reader_.complete() && reader_.n_sequences() != header_.n_sequences)
      add("KV_SEQUENCE: expected {} sequences, found {}", header_.n_sequences, reader_.n_sequences());
    const int64_t strange =
        database_.query_integer(fmt::format("SELECT count(*) FROM KV_CHUNK WHERE sequence NOT BETWEEN 0 AND "
                                            "{} OR layer NOT BETWEEN -1 AND {} OR kind NOT IN"
                                            " ('tokens', 'occupancy', 'evictions', 'sketch', 'q', 'k', 'v')",
                                            reader_.n_sequences() - 1, header_.geometry.n_layers - 1));
    if (strange != 0)
      add("KV_CHUNK: expected known kinds, sequences and layers, found {} other chunks", strange);
  }

  void check_gpu() {
    auto expect_none = [&](std::string_view table, std::string_view what, std::string_view where) {
      const int64_t found =
          database_.query_integer(fmt::format("SELECT count(*) FROM {} t WHERE {}", table, where));
      if (found != 0) add("{}: expected {}, found {} other rows", table, what, found);
    };
    expect_none(
        "CUPTI_ACTIVITY_KIND_KERNEL", "times in order and names in StringIds",
        "t.\"end\" < t.start OR NOT EXISTS (SELECT 1 FROM StringIds s WHERE s.id = t.demangledName) OR "
        "NOT EXISTS (SELECT 1 FROM StringIds s WHERE s.id = t.shortName)");
    expect_none("CUPTI_ACTIVITY_KIND_MEMCPY", "times in order", "t.\"end\" < t.start");
    expect_none("CUPTI_ACTIVITY_KIND_MEMSET", "times in order", "t.\"end\" < t.start");
    expect_none("NVTX_EVENTS", "times in order", "t.\"end\" < t.start");
    expect_none("KV_DRAM_SAMPLE", "times in order and bytes",
                "t.end_ns <= t.start_ns OR t.read_bytes < 0 OR t.write_bytes < 0");
    expect_none("KV_LAUNCH", "kernels that are there",
                "NOT EXISTS (SELECT 1 FROM CUPTI_ACTIVITY_KIND_KERNEL k WHERE k.rowid = t.kernel)");
    expect_none(
        "KV_SOURCE", "a known state",
        "t.state NOT IN ('recorded', 'partial', 'missing') OR (t.state <> 'recorded' AND t.reason = '')");
  }

  void check_sequence(int s) {
    const TraceSequence sequence = reader_.sequence(s);
    const int n = sequence.n_steps;
    report_.steps += n;
    if (reader_.complete() && sequence.end_reason.empty())
      add("sequence {}: the trace is complete, expected an end reason", s);
    check_coverage(s, chunk_kind::kTokens, -1, 0, n);
    check_steps(sequence);
    held_.assign(n, 0);
    evicted_.assign(n, 0);
    for (int l = 0; l < header_.geometry.n_layers; ++l) {
      check_coverage(s, chunk_kind::kOccupancy, l, 0, n);
      check_coverage(s, chunk_kind::kEvictions, l, 0, -1);
      check_evictions(sequence, l);
      for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
        check_coverage(s, row_kind_name(kind), l, 0, header_.has_rows(l) ? n : 0);
        if (header_.has_rows(l)) check_finite(s, l, kind, n);
      }
      check_coverage(s, chunk_kind::kSketch, l, sequence.n_prompt, header_.has_sketch(l) ? n : 0);
      if (header_.has_sketch(l)) check_sketches(sequence, l);
    }
    check_sums(sequence);
  }

  // Chunks are disjoint, each within its 64 steps, and leave no gap in [begin, end). end -1: any subset.
  void check_coverage(int s, std::string_view kind, int layer, int begin, int end) {
    Statement select(database_,
                     "SELECT step_begin, step_end FROM KV_CHUNK WHERE kind = ? AND sequence = ? AND layer = ?"
                     " ORDER BY step_begin, step_end");
    select.bind(1, kind).bind(2, s).bind(3, layer);
    const auto where = [&] {
      return layer < 0 ? fmt::format("{} of sequence {}", kind, s)
                       : fmt::format("{} of sequence {}, layer {}", kind, s, layer);
    };
    int64_t expected = begin;
    while (select.step()) {
      const int64_t from = select.integer(0), to = select.integer(1);
      if (from < 0 || to <= from || from / kChunkSteps != (to - 1) / kChunkSteps)
        return add("{}: expected chunks within {} steps, found {} to {}", where(), kChunkSteps, from, to);
      if (from < expected)
        return add("{}: expected a chunk from step {}, found {} to {}", where(), expected, from, to);
      if (end >= 0 && from != expected)
        return add("{}: expected a chunk from step {}, found one from {}", where(), expected, from);
      expected = to;
    }
    if (end < 0) return;
    // A trace that was cut off may hold rows of a step that was not finished.
    if (expected < end || (expected > end && end > 0 && reader_.complete()))
      add("{}: expected chunks up to step {}, found them up to {}", where(), end, expected);
    if (end == 0 && expected > begin)
      add("{}: expected none at tier {}, found chunks", where(), tier_name(header_.tier));
  }

  void check_steps(const TraceSequence& sequence) {
    const std::vector<TraceStep> steps = reader_.steps(sequence.sequence, 0, sequence.n_steps);
    const int s = sequence.sequence;
    const int64_t rows =
        database_.query_integer(fmt::format("SELECT count(*) FROM KV_STEP WHERE sequence = {}", s));
    if (rows != static_cast<int64_t>(steps.size()))
      add("KV_STEP of sequence {}: expected {} rows before step {}, found {}", s, steps.size(),
          sequence.n_steps, rows);
    if (steps.empty()) {
      // Rows from elsewhere come without choices and times.
      if (sequence.n_steps > sequence.n_prompt && !header_.meta.contains("imported_format"))
        add("KV_STEP of sequence {}: expected rows up to step {}, found none", s, sequence.n_steps - 1);
      return;
    }
    int expected = raw(steps.front().summary.pos);
    if (expected != sequence.n_prompt - 1 && expected != sequence.n_prompt)
      add("KV_STEP of sequence {}: expected step {} or {} first, found {}", s, sequence.n_prompt - 1,
          sequence.n_prompt, expected);
    for (size_t i = 0; i < steps.size(); ++i, ++expected) {
      const StepSummary& step = steps[i].summary;
      if (raw(step.pos) != expected)
        return add("KV_STEP of sequence {}: expected step {}, found {}", s, expected, raw(step.pos));
      if (step.token != sequence.tokens[expected])
        return add("KV_STEP of sequence {}, step {}: token: expected {}, found {}", s, expected,
                   sequence.tokens[expected], step.token);
      if (i + 1 < steps.size() && step.next_token != sequence.tokens[expected + 1])
        return add("KV_STEP of sequence {}, step {}: next_token: expected {}, found {}", s, expected,
                   sequence.tokens[expected + 1], step.next_token);
      if (step.total_ns < 0 || step.start_ns < 0)
        return add("KV_STEP of sequence {}, step {}: expected times from 0, found {} and {}", s, expected,
                   step.start_ns, step.total_ns);
    }
    // The last position may have chosen no token.
    if (expected != sequence.n_steps && expected != sequence.n_steps - 1)
      add("KV_STEP of sequence {}: expected steps up to {}, found them up to {}", s, sequence.n_steps - 1,
          expected - 1);
  }

  int layer_budget(const TraceSequence& sequence, int layer) const {
    const TracePolicy& policy = header_.policy;
    if (policy.layer_budgets.empty()) return 0;
    const int budget = policy.layer_budgets[layer];
    // Budgets that are shares of the length differ by sequence; layers that differ keep their proportion.
    if (sequence.budget_slots == 0 || header_.budget_slots == 0 ||
        sequence.budget_slots == header_.budget_slots)
      return budget;
    if (budget == header_.budget_slots) return sequence.budget_slots;
    return static_cast<int>(
               std::ceil(static_cast<double>(budget) * sequence.budget_slots / header_.budget_slots)) +
           1;
  }

  // Replays the layer's evictions against the occupancy: nothing goes twice, nothing protected goes, the
  // budget holds.
  void check_evictions(const TraceSequence& sequence, int layer) {
    const TracePolicy& policy = header_.policy;
    const EvictionRule& rule = policy.rule;
    const int s = sequence.sequence, n = sequence.n_steps, n_heads = header_.geometry.n_kv_heads;
    const int budget = layer_budget(sequence, layer),
              recent = std::min(rule.recent_slots(budget), budget - rule.headroom);
    const int most_held = budget + rule.cadence - 1;
    gone_at_.assign(static_cast<size_t>(n_heads) * n, -1);
    std::vector<int64_t> held(n_heads, 0);
    std::vector<int32_t> occupancy(static_cast<size_t>(kChunkSteps) * n_heads);
    const auto where = [&](int step) {
      return fmt::format("sequence {}, layer {}, step {}", s, layer, step);
    };
    for (int begin = 0; begin < n; begin += kChunkSteps) {
      const int end = std::min(n, begin + kChunkSteps);
      const std::vector<TraceEviction> evictions = reader_.evictions(s, layer, begin, end);
      report_.evictions += static_cast<int64_t>(evictions.size());
      reader_.read_occupancy(s, layer, begin, end, occupancy.data());
      size_t next = 0;
      for (int step = begin; step < end; ++step) {
        for (int64_t& count : held) ++count;
        const size_t first = next;
        for (; next < evictions.size() && evictions[next].step == step; ++next) {
          const TraceEviction& e = evictions[next];
          if (!policy.evicts)
            return add("{}: the policy {} keeps everything, found an eviction", where(step), policy.spec);
          if (e.kv_head < kWholeLayer || e.kv_head >= n_heads)
            return add("{}: evicted kv head: expected -1 to {}, found {}", where(step), n_heads - 1,
                       e.kv_head);
          const bool whole = e.kv_head == kWholeLayer;
          if (whole != (rule.granularity == Granularity::layer))
            return add("{}: expected victims {}, found kv head {}", where(step),
                       whole ? "per kv head" : "shared by the layer", e.kv_head);
          if (e.pos < 0 || e.pos > step)
            return add("{}: evicted position: expected 0 to {}, found {}", where(step), step, e.pos);
          const bool prompt_cut = e.reason == EvictionReason::prompt_over_budget;
          if (prompt_cut != (step == sequence.n_prompt - 1))
            return add("{}: expected the prompt's cut at step {} alone, found reason {}", where(step),
                       sequence.n_prompt - 1, static_cast<int>(e.reason));
          if (!prompt_cut && (step + 1) % rule.cadence != 0)
            return add("{}: expected evictions when (step + 1) % {} == 0 alone", where(step), rule.cadence);
          if (e.pos < rule.sinks || (rule.pin_prompt && e.pos < sequence.n_prompt) || e.pos > step - recent)
            return add("{}: position {} is protected by the policy, found it evicted", where(step), e.pos);
          if (std::isnan(e.score)) return add("{}: score of position {} is NaN", where(step), e.pos);
          for (size_t other = first; other < next; ++other)
            if (evictions[other].kv_head == e.kv_head && evictions[other].slot == e.slot)
              return add("{}: slot {} of kv head {} evicted twice", where(step), e.slot, e.kv_head);
          for (int h = whole ? 0 : e.kv_head; h < (whole ? n_heads : e.kv_head + 1); ++h) {
            int32_t& gone = gone_at_[static_cast<size_t>(h) * n + e.pos];
            if (gone >= 0)
              return add("{}: kv head {}: position {} was evicted at step {} already", where(step), h, e.pos,
                         gone);
            gone = step;
            --held[h];
            ++evicted_[step];
          }
        }
        for (int h = 0; h < n_heads; ++h) {
          const int32_t found = occupancy[static_cast<size_t>(step - begin) * n_heads + h];
          if (found != held[h])
            return add("{}: kv head {}: occupancy: expected {}, found {}", where(step), h, held[h], found);
          held_[step] += found;
          if (policy.evicts && !rule.ragged && step >= sequence.n_prompt - 1 && found > most_held)
            return add("{}: kv head {}: expected at most {} held tokens (budget {}, cadence {}), found {}",
                       where(step), h, most_held, budget, rule.cadence, found);
        }
        if (policy.evicts && rule.ragged && step >= sequence.n_prompt - 1) {
          int64_t total = 0;
          for (int64_t count : held) total += count;
          if (total > int64_t{most_held} * n_heads)
            return add("{}: expected at most {} held tokens in the layer, found {}", where(step),
                       int64_t{most_held} * n_heads, total);
        }
      }
      if (next != evictions.size())
        return add("{}: evictions are not in order of their steps", where(evictions[next].step));
    }
  }

  void check_finite(int s, int layer, RowKind kind, int n) {
    const CacheGeometry& g = header_.geometry;
    const size_t width = static_cast<size_t>(kind == RowKind::q ? g.n_q_heads : g.n_kv_heads) * g.head_dim;
    std::vector<float> rows(kChunkSteps * width);
    for (int begin = 0; begin < n; begin += kChunkSteps) {
      const int count = std::min(kChunkSteps, n - begin);
      reader_.read_rows(s, layer, kind, begin, count, rows.data());
      for (size_t i = 0; i < count * width; ++i)
        if (!std::isfinite(rows[i]))
          return add("sequence {}, layer {}, step {}: {} holds a value that is not finite", s, layer,
                     begin + i / width, row_kind_name(kind));
    }
  }

  void check_sketches(const TraceSequence& sequence, int layer) {
    const int s = sequence.sequence, n = sequence.n_steps, n_heads = header_.geometry.n_kv_heads;
    for (int begin = sequence.n_prompt; begin < n; begin += kChunkSteps) {
      int first = 0;
      const std::vector<SketchRow> rows =
          reader_.sketches(s, layer, begin, std::min(n, begin + kChunkSteps), &first);
      for (size_t i = 0; i < rows.size(); ++i) {
        const int step = first + static_cast<int>(i) / n_heads, h = static_cast<int>(i) % n_heads;
        const SketchRow& row = rows[i];
        const auto bad = [&](std::string_view what) {
          add("sketch of sequence {}, layer {}, step {}, kv head {}: {}", s, layer, step, h, what);
        };
        double total = 0;
        for (int t = 0; t < kSketchTop; ++t) {
          const int32_t pos = row.pos[t];
          if (pos == -1) break;
          if (pos < 0 || pos > step)
            return bad(fmt::format("position: expected 0 to {}, found {}", step, pos));
          const int32_t gone = gone_at_[static_cast<size_t>(h) * n + pos];
          if (gone >= 0 && gone < step)
            return bad(fmt::format("position {} was evicted at step {}", pos, gone));
          if (!(row.weight[t] >= 0) || (t > 0 && row.weight[t] > row.weight[t - 1]))
            return bad("weights: expected descending from at most 1");
          total += row.weight[t];
        }
        if (total > 1.001) return bad(fmt::format("sum of weights: expected at most 1, found {:.4f}", total));
        if (!(row.recall >= 0 && row.recall <= 1.001f) && !std::isnan(row.recall))
          return bad(fmt::format("recall: expected 0 to 1, found {}", row.recall));
        if (!(row.entropy >= -1e-3f && row.entropy <= 25.0f))
          return bad(fmt::format("entropy: expected 0 to 25 nats, found {}", row.entropy));
      }
    }
  }

  void check_sums(const TraceSequence& sequence) {
    for (const TraceStep& step : reader_.steps(sequence.sequence, 0, sequence.n_steps)) {
      const int pos = raw(step.summary.pos);
      if (step.held_tokens != held_[pos] || step.evicted_tokens != evicted_[pos])
        return add(
            "KV_STEP of sequence {}, step {}: expected {} held and {} evicted tokens as the layers have, "
            "found {} and {}",
            sequence.sequence, pos, held_[pos], evicted_[pos], step.held_tokens, step.evicted_tokens);
    }
  }

  const int most_;
  const std::function<void(int64_t, int64_t)>& progress_;
  VerifyReport& report_;
  TraceReader reader_;
  Database database_;
  const TraceHeader& header_;
  const std::string name_;
  std::vector<int64_t> held_, evicted_;  // [step] of the running sequence, summed over its layers and heads
  std::vector<int32_t> gone_at_;  // [H][step] of the running layer: step of the position's eviction, -1: held
};

}  // namespace

VerifyReport verify_trace(const std::filesystem::path& file, int most,
                          const std::function<void(int64_t, int64_t)>& progress) {
  if (!std::filesystem::exists(file)) fail("{}: no such file", file.string());
  VerifyReport report;
  try {
    Verifier(file, most, progress, report).run();
  } catch (const Enough&) {
  } catch (const Error& error) {
    report.violations.push_back(without_file(error.what(), file.string()));
  }
  return report;
}

}  // namespace kvlapse
