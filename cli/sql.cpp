#include "trace/sql.h"

#include <fmt/format.h>

#include "cli/command.h"
#include "cli/csv.h"
#include "cli/table.h"
#include "core/base/error.h"

namespace kvlapse::cli {
namespace {

std::string text_of(const SqlValue& value) {
  struct Visitor {
    std::string operator()(std::monostate) const { return ""; }
    std::string operator()(int64_t v) const { return fmt::format("{}", v); }
    std::string operator()(double v) const { return fmt::format("{:.9g}", v); }
    std::string operator()(const std::string& v) const { return v; }
    std::string operator()(const std::vector<std::byte>& v) const {
      return fmt::format("<{} bytes>", v.size());
    }
  };
  return std::visit(Visitor{}, value);
}

Json json_of(const SqlValue& value) {
  if (std::holds_alternative<std::monostate>(value)) return nullptr;
  if (const auto* v = std::get_if<int64_t>(&value)) return *v;
  if (const auto* v = std::get_if<double>(&value)) return *v;
  return text_of(value);
}

}  // namespace

void add_sql(CLI::App& app, Context& context) {
  CLI::App* command =
      add_command(app, context, "sql", "query a trace or a results file",
                  "  kvlapse sql run.kvl \"SELECT layer, count(*) FROM kv_eviction GROUP BY layer\"\n"
                  "  kvlapse sql run.kvr \"SELECT * FROM sqlite_schema\" --format csv");
  struct Options {
    std::string file, query, format = "table";
  };
  auto o = std::make_shared<Options>();
  command->add_option("file", o->file, "trace or results file")->required();
  command->add_option("query", o->query, "one SELECT statement")->required();
  command->add_option("--format", o->format, "table, csv or json")
      ->capture_default_str()
      ->check(CLI::IsMember({"table", "csv", "json"}));
  command->callback([o, &context] {
    SqlQuery query(o->file, o->query);
    const bool json = context.json || o->format == "json";
    Json rows = Json::array();
    Table table(query.columns());
    std::vector<SqlValue> row;
    auto print_csv = [](const std::vector<std::string>& cells) {
      for (size_t i = 0; i < cells.size(); ++i) fmt::print("{}{}", i ? "," : "", csv_cell(cells[i]));
      fmt::print("\n");
    };
    if (!json && o->format == "csv") print_csv(query.columns());
    while (query.next(row)) {
      if (json) {
        Json object = Json::object();
        for (size_t i = 0; i < row.size(); ++i) object[query.columns()[i]] = json_of(row[i]);
        rows.push_back(std::move(object));
        continue;
      }
      std::vector<std::string> cells;
      for (const SqlValue& value : row) cells.push_back(text_of(value));
      if (o->format == "csv")
        print_csv(cells);
      else
        table.add(std::move(cells));
    }
    if (json)
      print_json({{"rows", rows}});
    else if (o->format == "table")
      fmt::print("{}", table.text());
  });
}

}  // namespace kvlapse::cli
