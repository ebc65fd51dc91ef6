#include "trace/sql.h"

#include <sqlite3.h>

#include <algorithm>
#include <cctype>

#include "core/base/error.h"
#include "trace/trace_file.h"
#include "trace/virtual_tables.h"

namespace kvlapse {

struct SqlQuery::Impl {
  Database database;
  std::unique_ptr<Statement> statement;
  std::vector<std::string> columns;
};

SqlQuery::SqlQuery(const std::filesystem::path& file, std::string_view sql)
    : impl_(std::make_unique<Impl>(Impl{Database::open_for_reading(file), nullptr, {}})) {
  Database& database = impl_->database;
  if (database.application_id() == trace_file_kind().application_id)
    register_trace_tables(database, [file] { return std::make_unique<TraceReader>(file); });

  sqlite3_stmt* parsed = nullptr;
  const char* tail = nullptr;
  const int code =
      sqlite3_prepare_v2(database.handle(), sql.data(), static_cast<int>(sql.size()), &parsed, &tail);
  const std::string message = code == SQLITE_OK ? "" : sqlite3_errmsg(database.handle());
  sqlite3_finalize(parsed);
  if (code == SQLITE_NOTADB || code == SQLITE_CORRUPT) fail("{}: {}", database.file(), message);
  if (code != SQLITE_OK) fail_usage("sql: {}", message);
  if (!parsed) fail_usage("sql: expected a statement, found none");
  const std::string_view rest(tail, static_cast<size_t>(sql.data() + sql.size() - tail));
  if (!std::all_of(rest.begin(), rest.end(), [](unsigned char c) { return std::isspace(c) || c == ';'; }))
    fail_usage("sql: expected one statement, found more behind it: '{}'", rest.substr(0, 40));

  impl_->statement = std::make_unique<Statement>(database, sql);
  if (!impl_->statement->read_only())
    fail_usage("sql: expected a statement that reads, found one that writes");
  for (int c = 0; c < impl_->statement->columns(); ++c)
    impl_->columns.emplace_back(impl_->statement->name(c));
}
SqlQuery::~SqlQuery() = default;

const std::vector<std::string>& SqlQuery::columns() const {
  return impl_->columns;
}

bool SqlQuery::next(std::vector<SqlValue>& row) {
  Statement& statement = *impl_->statement;
  if (!statement.step()) return false;
  row.resize(impl_->columns.size());
  for (int c = 0; c < static_cast<int>(row.size()); ++c) {
    switch (statement.type(c)) {
      case Statement::Type::null: row[c] = std::monostate(); break;
      case Statement::Type::integer: row[c] = statement.integer(c); break;
      case Statement::Type::real: row[c] = statement.real(c); break;
      case Statement::Type::text: row[c] = std::string(statement.text(c)); break;
      case Statement::Type::blob: {
        const std::span<const std::byte> blob = statement.blob(c);
        row[c] = std::vector<std::byte>(blob.begin(), blob.end());
        break;
      }
    }
  }
  return true;
}

}  // namespace kvlapse
