#include "trace/virtual_tables.h"

#include <sqlite3.h>

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/base/error.h"

namespace kvlapse {
namespace {

// Rows of one kind of chunk. Columns sequence, layer and step stand at the same places in all tables.
enum Column { kSequence = 0, kLayer = 1, kStep = 2, kFirstOwn = 3 };

class BlockRows {
 public:
  virtual ~BlockRows() = default;
  // Rows of steps [begin, end) of one sequence and layer; `end` lies within n_steps and the block within one
  // chunk.
  virtual int64_t load(const TraceReader& reader, int sequence, int layer, int begin, int end) = 0;
  virtual int step(int64_t row) const = 0;
  virtual void column(sqlite3_context* context, int64_t row, int column) const = 0;  // from kFirstOwn on
};

void result_real(sqlite3_context* context, float value) {
  if (std::isfinite(value))
    sqlite3_result_double(context, static_cast<double>(value));
  else
    sqlite3_result_null(context);
}

class TokenRowsTable final : public BlockRows {
 public:
  int64_t load(const TraceReader& reader, int sequence, int, int begin, int end) override {
    if (sequence != loaded_) tokens_ = reader.sequence(sequence).tokens;
    loaded_ = sequence;
    begin_ = begin;
    return std::max<int64_t>(0, std::min<int64_t>(end, static_cast<int64_t>(tokens_.size())) - begin);
  }
  int step(int64_t row) const override { return begin_ + static_cast<int>(row); }
  void column(sqlite3_context* context, int64_t row, int) const override {
    sqlite3_result_int64(context, tokens_[begin_ + row]);
  }

 private:
  std::vector<int32_t> tokens_;
  int loaded_ = -1, begin_ = 0;
};

class EvictionRows final : public BlockRows {
 public:
  int64_t load(const TraceReader& reader, int sequence, int layer, int begin, int end) override {
    evictions_ = reader.evictions(sequence, layer, begin, end);
    return static_cast<int64_t>(evictions_.size());
  }
  int step(int64_t row) const override { return evictions_[row].step; }
  void column(sqlite3_context* context, int64_t row, int column) const override {
    const TraceEviction& e = evictions_[row];
    switch (column - kFirstOwn) {
      case 0: return sqlite3_result_int(context, e.kv_head);
      case 1: return sqlite3_result_int(context, e.pos);
      case 2: return sqlite3_result_int(context, e.slot);
      case 3: return result_real(context, e.score);
      case 4: return result_real(context, e.threshold);
      case 5: return result_real(context, e.parts[0]);
      case 6: return result_real(context, e.parts[1]);
      default:
        return sqlite3_result_text(
            context, e.reason == EvictionReason::over_budget ? "over_budget" : "prompt_over_budget", -1,
            SQLITE_STATIC);
    }
  }

 private:
  std::vector<TraceEviction> evictions_;
};

class OccupancyRows final : public BlockRows {
 public:
  int64_t load(const TraceReader& reader, int sequence, int layer, int begin, int end) override {
    n_heads_ = reader.header().geometry.n_kv_heads;
    begin_ = begin;
    held_.resize(static_cast<size_t>(end - begin) * n_heads_);
    return int64_t{reader.read_occupancy(sequence, layer, begin, end, held_.data())} * n_heads_;
  }
  int step(int64_t row) const override { return begin_ + static_cast<int>(row / n_heads_); }
  void column(sqlite3_context* context, int64_t row, int column) const override {
    sqlite3_result_int64(context, column == kFirstOwn ? row % n_heads_ : held_[row]);
  }

 private:
  int n_heads_ = 1, begin_ = 0;
  std::vector<int32_t> held_;
};

class SketchRows final : public BlockRows {
 public:
  int64_t load(const TraceReader& reader, int sequence, int layer, int begin, int end) override {
    n_heads_ = reader.header().geometry.n_kv_heads;
    rows_ = reader.sketches(sequence, layer, begin, end, &first_);
    return static_cast<int64_t>(rows_.size()) * kSketchTop;
  }
  int step(int64_t row) const override { return first_ + static_cast<int>(row / kSketchTop / n_heads_); }
  void column(sqlite3_context* context, int64_t row, int column) const override {
    const SketchRow& sketch = rows_[row / kSketchTop];
    const auto rank = static_cast<int>(row % kSketchTop);
    switch (column - kFirstOwn) {
      case 0: return sqlite3_result_int64(context, row / kSketchTop % n_heads_);
      case 1: return sqlite3_result_int(context, rank);
      case 2:
        return sketch.pos[rank] < 0 ? sqlite3_result_null(context)
                                    : sqlite3_result_int(context, sketch.pos[rank]);
      case 3: return result_real(context, sketch.weight[rank]);
      case 4: return result_real(context, sketch.entropy);
      default: return result_real(context, sketch.recall);
    }
  }

 private:
  int n_heads_ = 1, first_ = 0;
  std::vector<SketchRow> rows_;
};

class ValueRows final : public BlockRows {
 public:
  int64_t load(const TraceReader& reader, int sequence, int layer, int begin, int end) override {
    const CacheGeometry& g = reader.header().geometry;
    begin_ = begin;
    dim_ = g.head_dim;
    n_steps_ = end - begin;
    if (!reader.header().has_rows(layer)) return 0;
    int64_t total = 0;
    for (RowKind kind : {RowKind::q, RowKind::k, RowKind::v}) {
      const auto i = static_cast<size_t>(kind);
      width_[i] = (kind == RowKind::q ? g.n_q_heads : g.n_kv_heads) * g.head_dim;
      rows_[i].resize(static_cast<size_t>(n_steps_) * width_[i]);
      reader.read_rows(sequence, layer, kind, begin, n_steps_, rows_[i].data());
      total += static_cast<int64_t>(rows_[i].size());
    }
    return total;
  }
  int step(int64_t row) const override {
    const auto [kind, index] = split(row);
    return begin_ + static_cast<int>(index / width_[kind]);
  }
  void column(sqlite3_context* context, int64_t row, int column) const override {
    const auto [kind, index] = split(row);
    switch (column - kFirstOwn) {
      case 0:
        return sqlite3_result_text(context, row_kind_name(static_cast<RowKind>(kind)).data(), 1,
                                   SQLITE_STATIC);
      case 1: return sqlite3_result_int64(context, index % width_[kind] / dim_);
      case 2: return sqlite3_result_int64(context, index % dim_);
      default: return result_real(context, rows_[kind][index]);
    }
  }

 private:
  std::pair<size_t, int64_t> split(int64_t row) const {
    size_t kind = 0;
    while (row >= static_cast<int64_t>(rows_[kind].size())) row -= static_cast<int64_t>(rows_[kind++].size());
    return {kind, row};
  }
  int begin_ = 0, n_steps_ = 0, dim_ = 1;
  int width_[3] = {};
  std::vector<float> rows_[3];
};

template <typename Rows>
std::unique_ptr<BlockRows> make_rows() {
  return std::make_unique<Rows>();
}

struct TableInfo {
  const char* name;
  const char* declaration;
  bool by_layer;
  std::unique_ptr<BlockRows> (*make)();
};
constexpr TableInfo kTables[] = {
    {"kv_token", "CREATE TABLE x(sequence INTEGER, layer INTEGER HIDDEN, step INTEGER, token INTEGER)", false,
     make_rows<TokenRowsTable>},
    {"kv_eviction",
     "CREATE TABLE x(sequence INTEGER, layer INTEGER, step INTEGER, kv_head INTEGER, position INTEGER, slot "
     "INTEGER,"
     " score REAL, threshold REAL, part0 REAL, part1 REAL, reason TEXT)",
     true, make_rows<EvictionRows>},
    {"kv_occupancy",
     "CREATE TABLE x(sequence INTEGER, layer INTEGER, step INTEGER, kv_head INTEGER, held INTEGER)", true,
     make_rows<OccupancyRows>},
    {"kv_sketch",
     "CREATE TABLE x(sequence INTEGER, layer INTEGER, step INTEGER, kv_head INTEGER, rank INTEGER, position "
     "INTEGER,"
     " weight REAL, entropy REAL, recall REAL)",
     true, make_rows<SketchRows>},
    {"kv_value",
     "CREATE TABLE x(sequence INTEGER, layer INTEGER, step INTEGER, kind TEXT, head INTEGER, dim INTEGER, "
     "value REAL)",
     true, make_rows<ValueRows>},
};

// Shared by the tables of one connection.
struct Source {
  std::function<std::unique_ptr<TraceReader>()> open;
  std::unique_ptr<TraceReader> reader;
};
struct ModuleData {
  std::shared_ptr<Source> source;
  const TableInfo* info;
};

struct Table : sqlite3_vtab {
  const TableInfo* info = nullptr;
  TraceReader* reader = nullptr;
};

struct Range {
  int64_t begin = 0, end = 0;
};

struct Cursor : sqlite3_vtab_cursor {
  std::unique_ptr<BlockRows> rows;
  Range sequences, layers, steps;
  int64_t sequence = 0, layer = 0, block = 0;  // block: first step of what is loaded next
  int64_t row = 0, n_rows = 0, rowid = 0;
  bool done = true;
};

// Which constraints xFilter gets, in this order.
enum Constraint { kSequenceIs, kLayerIs, kStepIs, kStepFrom, kStepTo, kConstraints };

int fail_with(sqlite3_vtab* table, const std::exception& error) {
  sqlite3_free(table->zErrMsg);
  table->zErrMsg = sqlite3_mprintf("%s", error.what());
  return SQLITE_ERROR;
}

int connect(sqlite3* database, void* data, int, const char* const*, sqlite3_vtab** out, char** message) {
  const auto* module = static_cast<const ModuleData*>(data);
  try {
    Source& source = *module->source;
    if (!source.reader) source.reader = source.open();
    if (const int code = sqlite3_declare_vtab(database, module->info->declaration); code != SQLITE_OK)
      return code;
    auto* table = new Table();
    table->info = module->info;
    table->reader = source.reader.get();
    *out = table;
    return SQLITE_OK;
  } catch (const std::exception& error) {
    *message = sqlite3_mprintf("%s", error.what());
    return SQLITE_ERROR;
  }
}
int disconnect(sqlite3_vtab* table) {
  delete static_cast<Table*>(table);
  return SQLITE_OK;
}

int best_index(sqlite3_vtab*, sqlite3_index_info* info) {
  int chosen[kConstraints];
  std::fill(std::begin(chosen), std::end(chosen), -1);
  for (int i = 0; i < info->nConstraint; ++i) {
    const auto& constraint = info->aConstraint[i];
    if (!constraint.usable) continue;
    const bool equal = constraint.op == SQLITE_INDEX_CONSTRAINT_EQ;
    if (constraint.iColumn == kSequence && equal) chosen[kSequenceIs] = i;
    if (constraint.iColumn == kLayer && equal) chosen[kLayerIs] = i;
    if (constraint.iColumn != kStep) continue;
    if (equal) chosen[kStepIs] = i;
    if (constraint.op == SQLITE_INDEX_CONSTRAINT_GE || constraint.op == SQLITE_INDEX_CONSTRAINT_GT)
      chosen[kStepFrom] = i;
    if (constraint.op == SQLITE_INDEX_CONSTRAINT_LE || constraint.op == SQLITE_INDEX_CONSTRAINT_LT)
      chosen[kStepTo] = i;
  }
  double rows = 1e8;
  int arguments = 0;
  info->idxNum = 0;
  constexpr double kShare[kConstraints] = {0.5, 0.05, 1e-4, 0.3, 0.3};
  for (int c = 0; c < kConstraints; ++c) {
    if (chosen[c] < 0) continue;
    info->aConstraintUsage[chosen[c]].argvIndex = ++arguments;
    info->idxNum |= 1 << c;
    rows *= kShare[c];
  }
  info->estimatedCost = rows;
  info->estimatedRows = static_cast<sqlite3_int64>(rows);
  return SQLITE_OK;
}

int open_cursor(sqlite3_vtab* table, sqlite3_vtab_cursor** out) {
  auto* cursor = new Cursor();
  cursor->rows = static_cast<Table*>(table)->info->make();
  *out = cursor;
  return SQLITE_OK;
}
int close_cursor(sqlite3_vtab_cursor* cursor) {
  delete static_cast<Cursor*>(cursor);
  return SQLITE_OK;
}

// Loads blocks until one has rows.
void load_next(Cursor& cursor, const Table& table) {
  cursor.row = cursor.n_rows = 0;
  while (cursor.n_rows == 0) {
    if (cursor.sequence >= cursor.sequences.end) {
      cursor.done = true;
      return;
    }
    const auto sequence = static_cast<int>(cursor.sequence);
    const int64_t end = std::min<int64_t>(cursor.steps.end, table.reader->n_steps(sequence));
    if (cursor.block >= end) {
      cursor.block = cursor.steps.begin;
      if (++cursor.layer >= cursor.layers.end) {
        cursor.layer = cursor.layers.begin;
        ++cursor.sequence;
      }
      continue;
    }
    const int64_t block_end = std::min(end, (cursor.block / kChunkSteps + 1) * kChunkSteps);
    cursor.n_rows = cursor.rows->load(*table.reader, sequence, static_cast<int>(cursor.layer),
                                      static_cast<int>(cursor.block), static_cast<int>(block_end));
    cursor.block = block_end;
    // The rows belong to this layer although the next block may not.
    if (cursor.n_rows > 0) return;
  }
}

// The range that may hold what the constraint admits; SQLite checks the rows again.
void narrow(Range& range, std::optional<double> from, std::optional<double> to) {
  if (from)
    range.begin = std::max(range.begin, static_cast<int64_t>(std::floor(std::clamp(*from, -1.0, 1e9))));
  if (to) range.end = std::min(range.end, static_cast<int64_t>(std::ceil(std::clamp(*to, -2.0, 1e9))) + 1);
  range.end = std::max(range.begin, range.end);
}

int filter(sqlite3_vtab_cursor* base, int index, const char*, int, sqlite3_value** values) {
  auto& cursor = *static_cast<Cursor*>(base);
  const auto& table = *static_cast<Table*>(base->pVtab);
  try {
    cursor.sequences = {0, table.reader->n_sequences()};
    cursor.layers = {0, table.info->by_layer ? table.reader->header().geometry.n_layers : 1};
    cursor.steps = {0, int64_t{1} << 31};
    bool impossible = false;
    for (int c = 0; c < kConstraints; ++c) {
      if (!(index & (1 << c))) continue;
      sqlite3_value* value = *values++;
      const int type = sqlite3_value_numeric_type(value);
      // NULL compares to nothing; text is above every number.
      if (type == SQLITE_NULL) impossible = true;
      if (type != SQLITE_INTEGER && type != SQLITE_FLOAT) continue;
      const double number = sqlite3_value_double(value);
      if (c == kSequenceIs) narrow(cursor.sequences, number, number);
      if (c == kLayerIs && table.info->by_layer) narrow(cursor.layers, number, number);
      if (c == kStepIs) narrow(cursor.steps, number, number);
      if (c == kStepFrom) narrow(cursor.steps, number, std::nullopt);
      if (c == kStepTo) narrow(cursor.steps, std::nullopt, number);
    }
    cursor.sequence = cursor.sequences.begin;
    cursor.layer = cursor.layers.begin;
    cursor.block = cursor.steps.begin;
    cursor.rowid = 0;
    cursor.done = impossible || cursor.layers.begin >= cursor.layers.end;
    if (!cursor.done) load_next(cursor, table);
    return SQLITE_OK;
  } catch (const std::exception& error) {
    return fail_with(base->pVtab, error);
  }
}

int next(sqlite3_vtab_cursor* base) {
  auto& cursor = *static_cast<Cursor*>(base);
  ++cursor.rowid;
  if (++cursor.row < cursor.n_rows) return SQLITE_OK;
  try {
    load_next(cursor, *static_cast<Table*>(base->pVtab));
    return SQLITE_OK;
  } catch (const std::exception& error) {
    return fail_with(base->pVtab, error);
  }
}

int eof(sqlite3_vtab_cursor* base) {
  return static_cast<Cursor*>(base)->done;
}

int column(sqlite3_vtab_cursor* base, sqlite3_context* context, int column) {
  const auto& cursor = *static_cast<Cursor*>(base);
  switch (column) {
    case kSequence: sqlite3_result_int64(context, cursor.sequence); break;
    case kLayer:
      if (static_cast<Table*>(base->pVtab)->info->by_layer)
        sqlite3_result_int64(context, cursor.layer);
      else
        sqlite3_result_null(context);
      break;
    case kStep: sqlite3_result_int(context, cursor.rows->step(cursor.row)); break;
    default: cursor.rows->column(context, cursor.row, column);
  }
  return SQLITE_OK;
}

int rowid(sqlite3_vtab_cursor* base, sqlite3_int64* out) {
  *out = static_cast<Cursor*>(base)->rowid;
  return SQLITE_OK;
}

const sqlite3_module kModule = [] {
  sqlite3_module module{};
  module.xConnect = connect;  // no xCreate: the tables exist by name in every connection, in no file
  module.xBestIndex = best_index;
  module.xDisconnect = disconnect;
  module.xOpen = open_cursor;
  module.xClose = close_cursor;
  module.xFilter = filter;
  module.xNext = next;
  module.xEof = eof;
  module.xColumn = column;
  module.xRowid = rowid;
  return module;
}();

}  // namespace

void register_trace_tables(Database& database, std::function<std::unique_ptr<TraceReader>()> reader) {
  auto source = std::make_shared<Source>(Source{std::move(reader), nullptr});
  for (const TableInfo& info : kTables) {
    auto* data = new ModuleData{source, &info};
    const auto destroy = [](void* pointer) { delete static_cast<ModuleData*>(pointer); };
    if (sqlite3_create_module_v2(database.handle(), info.name, &kModule, data, destroy) != SQLITE_OK)
      fail("{}: cannot register {}: {}", database.file(), info.name, sqlite3_errmsg(database.handle()));
  }
}

}  // namespace kvlapse
