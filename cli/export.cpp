#include <fmt/format.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <filesystem>

#include "cli/command.h"
#include "cli/csv.h"
#include "cli/data_path.h"
#include "core/base/error.h"
#include "trace/export/perfetto.h"
#include "trace/export/tensor_export.h"

namespace kvlapse::cli {
namespace {

namespace fs = std::filesystem;

struct Options {
  std::string file, format, output, query, layers;
  int sequence = 0;
};

constexpr const char* kResultRows =
    "SELECT t.name AS trace, c.cell, c.policy, c.budget, c.budget_slots, c.budget_share, c.match, "
    "v.sequence, v.metric, "
    "v.value FROM KV_CELL c JOIN KV_TRACE t USING(trace) JOIN KV_VALUE v USING(cell) "
    "ORDER BY t.name, c.policy, c.budget_slots, c.cell, v.sequence, v.metric";
constexpr const char* kTraceRows = "SELECT * FROM kv_eviction";

std::string query_of(const Options& o) {
  if (!o.query.empty()) return o.query;
  SqlQuery tables(o.file, "SELECT count(*) FROM sqlite_schema WHERE name = 'KV_CELL'");
  std::vector<SqlValue> row;
  return tables.next(row) && std::get<int64_t>(row.at(0)) > 0 ? kResultRows : kTraceRows;
}

void export_csv(const Options& o) {
  SqlQuery query(o.file, query_of(o));
  if (o.output == "-") return write_csv(query, stdout);
  const std::unique_ptr<std::FILE, int (*)(std::FILE*)> out(std::fopen(o.output.c_str(), "wb"), &std::fclose);
  if (!out) fail("export: {}: cannot be written", o.output);
  write_csv(query, out.get());
  if (std::fflush(out.get()) != 0 || std::ferror(out.get()) != 0)
    fail("export: {}: cannot be written: is the disk full?", o.output);
}

std::string shell_word(const std::string& word) {
  std::string out = "'";
  for (char c : word) out += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return out + "'";
}

// Arrow has no C++ packages in Debian; its Python package is the maintained way to the format.
void export_parquet(const Options& o) {
  fs::path script;
  for (const fs::path& path : data_paths("python/csv_to_parquet.py", "python/csv_to_parquet.py"))
    if (script.empty() && fs::exists(path)) script = path;
  if (script.empty()) fail("export: parquet: csv_to_parquet.py is not beside this program's other files");
  SqlQuery query(o.file, query_of(o));
  const char* set = std::getenv("KVLAPSE_PYTHON");
  const std::string python = set ? set : "python3";
  const std::string command =
      shell_word(python) + " " + shell_word(script.string()) + " " + shell_word(o.output);
  // A python that ends early is reported below.
  std::signal(SIGPIPE, SIG_IGN);
  std::FILE* pipe = popen(command.c_str(), "w");
  if (pipe == nullptr) fail("export: parquet: {} cannot be started", python);
  write_csv(query, pipe);
  if (pclose(pipe) != 0)
    fail(
        "export: {}: parquet is written by {} with pyarrow, which failed (KVLAPSE_PYTHON names another "
        "python)",
        o.output, python);
}

TensorExport tensors(const Options& o) {
  TensorExport what;
  what.sequence = o.sequence;
  if (!o.layers.empty() && std::sscanf(o.layers.c_str(), "%d:%d", &what.layer_begin, &what.layer_end) != 2)
    fail_usage("--layers: expected A:B, found '{}'", o.layers);
  return what;
}

}  // namespace

void add_export(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "export", "to other tools: csv, parquet, perfetto, safetensors, npz",
                  "  kvlapse export run.kvr --format csv -o run.csv\n"
                  "  kvlapse export run.kvl --format safetensors --layers 0:2 -o run.safetensors",
                  /*has_json=*/false);
  auto o = std::make_shared<Options>();
  command->add_option("file", o->file, "trace (*.kvl) or results (*.kvr)")->required();
  command
      ->add_option("--format", o->format,
                   "csv, parquet (rows of both kinds of file), perfetto, safetensors, npz (of traces)")
      ->required()
      ->check(CLI::IsMember({"csv", "parquet", "perfetto", "safetensors", "npz"}));
  command->add_option("-o,--output", o->output, "file; - for csv on stdout")->required();
  command->add_option(
      "--query", o->query,
      "csv, parquet: rows of this SELECT (default: every metric of results, evictions of a trace)");
  command->add_option("--layers", o->layers, "safetensors, npz: only layers A:B (B exclusive)");
  command->add_option("--sequence", o->sequence, "safetensors, npz: which sequence")->capture_default_str();
  command->callback([o] {
    if (o->format == "csv") return export_csv(*o);
    if (o->format == "parquet") return export_parquet(*o);
    const TraceReader trace(o->file);
    if (o->format == "perfetto") return export_chrome_trace(trace, o->output);
    if (o->format == "npz") return export_npz(trace, tensors(*o), o->output);
    export_safetensors(trace, tensors(*o), o->output);
  });
}

}  // namespace kvlapse::cli
