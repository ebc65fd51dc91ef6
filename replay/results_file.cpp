#include "replay/results_file.h"

#include <algorithm>
#include <map>
#include <tuple>

#include "core/base/error.h"
#include "trace/sqlite.h"

namespace kvlapse {

std::span<const Migration> results_schema();  // generated from replay/schema

namespace {

namespace fs = std::filesystem;

constexpr int32_t kApplicationId = 0x4b564c52;  // "KVLR"

const FileKind& results_file_kind() {
  static const FileKind kKind{"a kvlapse results file", kApplicationId, results_schema()};
  return kKind;
}

std::span<const std::byte> bytes_of(const std::vector<float>& values) {
  return std::as_bytes(std::span(values));
}

// Statements that put rows in, prepared once.
class Inserter {
 public:
  explicit Inserter(Database& db)
      : trace_(db.prepare("INSERT OR IGNORE INTO KV_TRACE VALUES(?,?,?,?,?,?,?,?,?,?,?)")),
        cell_(db.prepare("INSERT INTO KV_CELL VALUES(?,?,?,?,?,?,?,?,?,?,?)")),
        value_(db.prepare("INSERT INTO KV_VALUE VALUES(?,?,?,?)")),
        head_(db.prepare("INSERT INTO KV_HEAD VALUES(?,?,?,?,?,?,?,?)")),
        sketch_(db.prepare("INSERT INTO KV_SKETCH VALUES(?,?,?)")),
        series_(db.prepare("INSERT INTO KV_SERIES VALUES(?,?,?,?,?)")),
        eval_(db.prepare("INSERT INTO KV_EVAL VALUES(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)")) {}

  void add(const ResultTrace& t) {
    trace_.run(std::string_view(t.hash), std::string_view(t.name), std::string_view(t.model),
               std::string_view(t.policy), std::string_view(t.kv_dtype), t.n_layers, t.n_q_heads,
               t.n_kv_heads, t.head_dim, t.n_sequences, t.n_tokens);
  }
  void add(const ResultCell& c) {
    const std::string_view id = c.id;
    cell_.run(id, std::string_view(c.trace), std::string_view(c.policy), std::string_view(c.budget),
              c.budget_slots, c.budget_share, std::string_view(c.match), c.layer_begin, c.layer_end,
              c.open_loop ? 1 : 0, std::string_view(c.selection));
    add_values(id, -1, c.total);
    for (size_t s = 0; s < c.sequences.size(); ++s) add_values(id, static_cast<int>(s), c.sequences[s]);
    for (const HeadSummary& h : c.heads)
      head_.run(id, h.layer, h.q_head, std::string_view(h.metric), h.mean, h.p10, h.p50, h.p90);
    for (const NamedSketch& s : c.sketches) {
      const std::vector<std::byte> data = s.sketch.bytes();
      sketch_.run(id, std::string_view(s.metric), std::span<const std::byte>(data));
    }
    std::vector<const LayerSeries*> ordered;
    for (const LayerSeries& s : c.series) ordered.push_back(&s);
    std::sort(ordered.begin(), ordered.end(), [](const LayerSeries* a, const LayerSeries* b) {
      return std::tie(a->metric, a->layer) < std::tie(b->metric, b->layer);
    });
    for (const LayerSeries* s : ordered)
      series_.run(id, std::string_view(s->metric), s->layer, kSeriesBins, bytes_of(s->data));
  }
  void add(const EvalRow& r) {
    int i = 0;
    for (const std::string* text : {&r.model, &r.task, &r.policy, &r.budget})
      eval_.bind(++i, std::string_view(*text));
    for (int64_t value : {int64_t{r.budget_slots}, r.seed, int64_t{r.n}, int64_t{r.correct}})
      eval_.bind(++i, value);
    for (double value : {r.accuracy, r.ci95_low, r.ci95_high, r.tokens_mean}) eval_.bind(++i, value);
    for (const std::optional<double>& value : {r.length_ratio, r.first_divergence_median}) {
      ++i;
      if (value)
        eval_.bind(i, *value);
      else
        eval_.bind_null(i);
    }
    eval_.bind(++i, 0);
    while (eval_.step()) {
    }
    eval_.reset();
  }

 private:
  void add_values(std::string_view cell, int sequence, std::vector<NamedValue> values) {
    std::sort(values.begin(), values.end(),
              [](const NamedValue& a, const NamedValue& b) { return a.name < b.name; });
    for (const NamedValue& v : values) value_.run(cell, sequence, std::string_view(v.name), v.value);
  }
  Statement trace_, cell_, value_, head_, sketch_, series_, eval_;
};

void set_complete(Database& db, bool complete) {
  db.prepare("INSERT OR REPLACE INTO KV_META VALUES('complete', ?)")
      .run(std::string_view(complete ? "1" : "0"));
}

auto eval_key(const EvalRow& r) {
  return std::tie(r.model, r.task, r.policy, r.budget, r.seed, r.n);
}

std::string selection_name(const std::string& selection) {
  return selection.empty() ? "everything" : selection;
}

// Sorted and without repetitions; two different results for one cell are an error.
void put_in_order(Results& results, const fs::path& file) {
  std::sort(results.traces.begin(), results.traces.end(), [](const ResultTrace& a, const ResultTrace& b) {
    return std::tie(a.hash, a.name) < std::tie(b.hash, b.name);
  });
  auto same_trace = [](const ResultTrace& a, const ResultTrace& b) { return a.hash == b.hash; };
  results.traces.erase(std::unique(results.traces.begin(), results.traces.end(), same_trace),
                       results.traces.end());
  for (const ResultCell& cell : results.cells)
    if (const std::string& first = results.cells[0].selection; cell.selection != first)
      fail("{}: expected results of one selection, found cells of {} and of {}", file.string(),
           selection_name(first), selection_name(cell.selection));
  std::stable_sort(results.cells.begin(), results.cells.end(),
                   [](const ResultCell& a, const ResultCell& b) { return a.id < b.id; });
  for (size_t i = 1; i < results.cells.size(); ++i) {
    const ResultCell &a = results.cells[i - 1], &b = results.cells[i];
    if (a.id != b.id) continue;
    for (const NamedValue& v : a.total)
      if (value_of(b.total, v.name) != v.value)
        fail("{}: cell {} ({}, {}): expected one result, found {} {} and {}", file.string(), a.id, a.policy,
             a.budget, v.name, v.value, value_of(b.total, v.name));
  }
  auto same_cell = [](const ResultCell& a, const ResultCell& b) { return a.id == b.id; };
  results.cells.erase(std::unique(results.cells.begin(), results.cells.end(), same_cell),
                      results.cells.end());
  std::sort(results.evals.begin(), results.evals.end(),
            [](const EvalRow& a, const EvalRow& b) { return eval_key(a) < eval_key(b); });
  auto same_eval = [](const EvalRow& a, const EvalRow& b) { return eval_key(a) == eval_key(b); };
  results.evals.erase(std::unique(results.evals.begin(), results.evals.end(), same_eval),
                      results.evals.end());
}

void write_canonical(const fs::path& file, Results results, bool force) {
  put_in_order(results, file);
  create_file(file, results_file_kind(), force, [&](Database& db) {
    set_complete(db, true);
    Inserter insert(db);
    for (const ResultTrace& trace : results.traces) insert.add(trace);
    for (const ResultCell& cell : results.cells) insert.add(cell);
    for (const EvalRow& row : results.evals) insert.add(row);
  });
}

}  // namespace

struct ResultsFile::Impl {
  fs::path file;
  std::optional<Database> db;
  std::set<std::string> cells;
  std::optional<std::string> selection;  // of the cells, once there is one
  std::vector<EvalRow> evals;
};

ResultsFile::ResultsFile(const fs::path& file, Open how) : impl_(std::make_unique<Impl>()) {
  impl_->file = file;
  std::error_code error;
  if (how == Open::resume && fs::exists(file, error)) {
    Results held = read_results(file);
    for (const ResultCell& cell : held.cells) {
      impl_->cells.insert(cell.id);
      impl_->selection = cell.selection;
    }
    impl_->evals = std::move(held.evals);
  } else {
    create_file(file, results_file_kind(), how == Open::replace,
                [](Database& db) { set_complete(db, false); });
  }
  impl_->db = open_file_for_appending(file, results_file_kind());
  set_complete(*impl_->db, false);
}

ResultsFile::~ResultsFile() {
  if (!impl_->db) return;
  try {
    fold_wal(*impl_->db);
  } catch (const Error&) {  // SQLite recovers the WAL on the next open
  }
}

bool ResultsFile::has(const std::string& cell) const {
  return impl_->cells.contains(cell);
}

bool ResultsFile::has_eval(const EvalRow& row) const {
  return std::any_of(impl_->evals.begin(), impl_->evals.end(),
                     [&](const EvalRow& r) { return eval_key(r) == eval_key(row); });
}

void ResultsFile::add(const ResultTrace& trace, const std::vector<ResultCell>& cells) {
  Transaction transaction(*impl_->db);
  Inserter insert(*impl_->db);
  insert.add(trace);
  for (const ResultCell& cell : cells) {
    if (!impl_->selection) impl_->selection = cell.selection;
    if (cell.selection != *impl_->selection)
      fail("{}: expected results of its selection, {}, found cells of {}", impl_->file.string(),
           selection_name(*impl_->selection), selection_name(cell.selection));
    if (!impl_->cells.insert(cell.id).second) continue;
    insert.add(cell);
  }
  transaction.commit();
}

void ResultsFile::add(const EvalRow& row) {
  if (has_eval(row)) return;
  Transaction transaction(*impl_->db);
  Inserter(*impl_->db).add(row);
  transaction.commit();
  impl_->evals.push_back(row);
}

void ResultsFile::finish() {
  fold_wal(*impl_->db);
  impl_->db.reset();
  write_canonical(impl_->file, read_results(impl_->file, /*details=*/true), /*force=*/true);
}

Results read_results(const fs::path& file, bool details) {
  Database db = open_file_for_reading(file, results_file_kind());
  Results results;
  {
    Statement meta = db.prepare("SELECT value FROM KV_META WHERE key = 'complete'");
    results.complete = meta.step() && meta.text(0) == "1";
  }
  Statement traces = db.prepare("SELECT * FROM KV_TRACE ORDER BY trace");
  while (traces.step()) {
    auto text = [&](int i) { return std::string(traces.text(i)); };
    auto number = [&](int i) { return static_cast<int>(traces.integer(i)); };
    results.traces.push_back({text(0), text(1), text(2), text(3), text(4), number(5), number(6), number(7),
                              number(8), number(9), traces.integer(10)});
  }
  const bool says_selection = db.user_version() >= 2;  // an older file holds whole layers
  Statement cells = db.prepare("SELECT * FROM KV_CELL ORDER BY cell");
  std::map<std::string, size_t, std::less<>> by_id;
  while (cells.step()) {
    ResultCell c;
    c.id = cells.text(0);
    c.trace = cells.text(1);
    c.policy = cells.text(2);
    c.budget = cells.text(3);
    c.budget_slots = static_cast<int>(cells.integer(4));
    c.budget_share = cells.real(5);
    c.match = cells.text(6);
    c.layer_begin = static_cast<int>(cells.integer(7));
    c.layer_end = static_cast<int>(cells.integer(8));
    c.open_loop = cells.integer(9) != 0;
    if (says_selection) c.selection = cells.text(10);
    by_id[c.id] = results.cells.size();
    results.cells.push_back(std::move(c));
  }
  auto cell_of = [&](std::string_view id) -> ResultCell& {
    auto found = by_id.find(id);
    if (found == by_id.end())
      fail("{}: KV_VALUE: cell {}: expected a row in KV_CELL, found none", file.string(), id);
    return results.cells[found->second];
  };
  Statement values = db.prepare("SELECT * FROM KV_VALUE ORDER BY cell, sequence, metric");
  while (values.step()) {
    ResultCell& c = cell_of(values.text(0));
    const auto sequence = values.integer(1);
    if (sequence < -1 || sequence >= 1 << 20)
      fail("{}: KV_VALUE: sequence: expected -1 to 2^20, found {}", file.string(), sequence);
    if (sequence >= static_cast<int64_t>(c.sequences.size()))
      c.sequences.resize(static_cast<size_t>(sequence) + 1);
    (sequence < 0 ? c.total : c.sequences[static_cast<size_t>(sequence)])
        .push_back({std::string(values.text(2)), values.real(3)});
  }
  if (details) {
    Statement heads = db.prepare("SELECT * FROM KV_HEAD ORDER BY cell, layer, q_head, metric");
    while (heads.step())
      cell_of(heads.text(0))
          .heads.push_back({static_cast<int>(heads.integer(1)), static_cast<int>(heads.integer(2)),
                            std::string(heads.text(3)), heads.real(4), heads.real(5), heads.real(6),
                            heads.real(7)});
    Statement sketches = db.prepare("SELECT * FROM KV_SKETCH ORDER BY cell, metric");
    while (sketches.step())
      cell_of(sketches.text(0))
          .sketches.push_back({std::string(sketches.text(1)), Sketch::from_bytes(sketches.blob(2))});
    Statement series = db.prepare("SELECT * FROM KV_SERIES ORDER BY cell, metric, layer");
    while (series.step()) {
      const std::span<const std::byte> blob = series.blob(4);
      std::vector<float> data(blob.size() / sizeof(float));
      std::copy_n(blob.begin(), data.size() * sizeof(float), std::as_writable_bytes(std::span(data)).begin());
      cell_of(series.text(0))
          .series.push_back(
              {std::string(series.text(1)), static_cast<int>(series.integer(2)), std::move(data)});
    }
  }
  Statement evals = db.prepare("SELECT * FROM KV_EVAL ORDER BY model, task, policy, budget, seed, n");
  while (evals.step()) {
    EvalRow r;
    r.model = evals.text(0);
    r.task = evals.text(1);
    r.policy = evals.text(2);
    r.budget = evals.text(3);
    r.budget_slots = static_cast<int>(evals.integer(4));
    r.seed = evals.integer(5);
    r.n = static_cast<int>(evals.integer(6));
    r.correct = static_cast<int>(evals.integer(7));
    r.accuracy = evals.real(8);
    r.ci95_low = evals.real(9);
    r.ci95_high = evals.real(10);
    r.tokens_mean = evals.real(11);
    if (!evals.is_null(12)) r.length_ratio = evals.real(12);
    if (!evals.is_null(13)) r.first_divergence_median = evals.real(13);
    results.evals.push_back(std::move(r));
  }
  return results;
}

bool is_results_file(const fs::path& file) {
  try {
    return Database::open_for_reading(file).application_id() == kApplicationId;
  } catch (const Error&) {  // whoever needs the file reports why it cannot be opened
    return false;
  }
}

ResultsReport verify_results(const fs::path& file) {
  ResultsReport report;
  auto violation = [&](std::string text) { report.violations.push_back(std::move(text)); };
  try {
    Database db = open_file_for_reading(file, results_file_kind());
    Statement integrity = db.prepare("PRAGMA integrity_check");
    while (integrity.step())
      if (integrity.text(0) != "ok") violation(fmt::format("SQLite: {}", integrity.text(0)));
    for (const char* table : {"KV_VALUE", "KV_HEAD", "KV_SKETCH", "KV_SERIES"}) {
      Statement orphans = db.prepare(
          fmt::format("SELECT DISTINCT cell FROM {} WHERE cell NOT IN (SELECT cell FROM KV_CELL)", table));
      while (orphans.step())
        violation(fmt::format("{}: cell {}: expected a row in KV_CELL, found none", table, orphans.text(0)));
    }
    if (!report.violations.empty()) return report;

    const Results results = read_results(file, /*details=*/true);
    report.complete = results.complete;
    report.cells = static_cast<int64_t>(results.cells.size());
    report.evals = static_cast<int64_t>(results.evals.size());
    std::map<std::string, const ResultTrace*> traces;
    for (const ResultTrace& trace : results.traces) traces[trace.hash] = &trace;
    for (const ResultCell& cell : results.cells) {
      const std::string name = fmt::format("cell {} ({}, {})", cell.id, cell.policy, cell.budget);
      const auto trace = traces.find(cell.trace);
      if (trace == traces.end()) {
        violation(fmt::format("{}: expected its trace {} in KV_TRACE, found none", name, cell.trace));
        continue;
      }
      for (const NamedValue& v : cell.total)
        if ((v.name.starts_with("recall") || v.name.starts_with("topk")) && !(v.value >= 0 && v.value <= 1))
          violation(fmt::format("{}: {}: expected 0 to 1, found {}", name, v.name, v.value));
      if (static_cast<int>(cell.sequences.size()) != trace->second->n_sequences)
        violation(fmt::format("{}: expected {} sequences, found {}", name, trace->second->n_sequences,
                              cell.sequences.size()));
      const size_t n_series = static_cast<size_t>(trace->second->n_q_heads) * kSeriesBins;
      for (const LayerSeries& series : cell.series)
        if (series.data.size() != n_series)
          violation(fmt::format("{}: series {} of layer {}: expected {} numbers, found {}", name,
                                series.metric, series.layer, n_series, series.data.size()));
    }
    for (const EvalRow& row : results.evals)
      if (row.correct < 0 || row.correct > row.n)
        violation(fmt::format("KV_EVAL: {} {} {}: expected 0 to {} right, found {}", row.task, row.policy,
                              row.budget, row.n, row.correct));
  } catch (const Error& error) {
    violation(error.what());
  }
  return report;
}

void merge_results(const std::vector<fs::path>& inputs, const fs::path& output, bool force) {
  Results all;
  for (const fs::path& input : inputs) {
    Results part = read_results(input, /*details=*/true);
    if (!part.complete)
      fail("{}: expected a finished results file, found an unfinished one (run it again with --resume)",
           input.string());
    std::move(part.traces.begin(), part.traces.end(), std::back_inserter(all.traces));
    std::move(part.cells.begin(), part.cells.end(), std::back_inserter(all.cells));
    std::move(part.evals.begin(), part.evals.end(), std::back_inserter(all.evals));
  }
  write_canonical(output, std::move(all), force);
}

}  // namespace kvlapse
