#include "trace/sqlite.h"

#include <fcntl.h>
#include <sqlite3.h>
#include <unistd.h>
#include <xxhash.h>

#include <system_error>

#include "core/base/error.h"

namespace kvlapse {
namespace fs = std::filesystem;

struct Database::Connection {
  sqlite3* handle = nullptr;
  std::string file;
  ~Connection() { sqlite3_close_v2(handle); }

  // errno behind the last failed call; SQLite keeps it with the file that it happened on.
  int system_error() const {
    if (const int error = sqlite3_system_errno(handle); error != 0) return error;
    int error = 0;
    sqlite3_file_control(handle, "main", SQLITE_FCNTL_LAST_ERRNO, &error);
    sqlite3_file* journal = nullptr;  // or the WAL
    if (error == 0 &&
        sqlite3_file_control(handle, "main", SQLITE_FCNTL_JOURNAL_POINTER, &journal) == SQLITE_OK &&
        journal && journal->pMethods)
      journal->pMethods->xFileControl(journal, SQLITE_FCNTL_LAST_ERRNO, &error);
    return error;
  }

  [[noreturn]] void raise(const char* doing) const {
    const int code = sqlite3_extended_errcode(handle);
    const bool io = (code & 0xff) == SQLITE_IOERR;
    const int system = io ? system_error() : 0;
    if ((code & 0xff) == SQLITE_FULL || (io && (system == ENOSPC || system == EFBIG || system == EDQUOT)))
      fail("{}: {}: the disk is full, or the file reached its size limit", file, doing);
    if ((code & 0xff) == SQLITE_NOTADB)
      fail("{}: {}: expected an SQLite file, found something else", file, doing);
    if ((code & 0xff) == SQLITE_CORRUPT)
      fail("{}: {}: the file is damaged: {}", file, doing, sqlite3_errmsg(handle));
    if (io && system != 0)
      fail("{}: {}: {}: {} (SQLite code {})", file, doing, sqlite3_errmsg(handle),
           std::generic_category().message(system), code);
    fail("{}: {}: {} (SQLite code {})", file, doing, sqlite3_errmsg(handle), code);
  }
};

namespace {

constexpr int kBusyTimeout_ms = 10'000;

std::string uri_of(const fs::path& file, std::string_view query) {
  std::string uri = "file:";
  for (char c : fs::absolute(file).string()) {
    if (c == '?' || c == '#' || c == '%')
      uri += fmt::format("%{:02x}", static_cast<unsigned char>(c));
    else
      uri += c;
  }
  return uri.append(query);
}

void require_file(const fs::path& file) {
  std::error_code error;
  fs::file_status status = fs::status(file, error);
  if (!fs::exists(status)) fail("{}: no such file", file.string());
  if (fs::is_directory(status)) fail("{}: expected a file, found a folder", file.string());
}

void remove_side_files(const fs::path& file) {
  std::error_code ignored;
  for (const char* suffix : {"-wal", "-shm", "-journal"}) fs::remove(file.string() + suffix, ignored);
}

// The rename must reach the disk after what it names.
void sync_path(const fs::path& path, int flags) {
  int descriptor = ::open(path.c_str(), flags | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

}  // namespace

Database Database::open(const fs::path& file, int flags, const std::string& uri) {
  auto connection = std::make_shared<Connection>();
  connection->file = file.string();
  if (sqlite3_open_v2(uri.c_str(), &connection->handle, flags | SQLITE_OPEN_URI | SQLITE_OPEN_NOMUTEX,
                      nullptr) != SQLITE_OK)
    connection->raise("cannot open");
  sqlite3_extended_result_codes(connection->handle, 1);
  sqlite3_busy_timeout(connection->handle, kBusyTimeout_ms);
  return Database(std::move(connection));
}

Database Database::open_for_reading(const fs::path& file) {
  require_file(file);
  // A connection that may write, told not to: only such a one removes the side files of a trace whose writer
  // was killed or finished first. Without that right, read-only; on read-only media WAL needs `immutable`.
  if (::access(file.c_str(), R_OK) != 0) fail("{}: cannot open: permission denied", file.string());
  fs::path folder = fs::absolute(file).parent_path();
  const bool writable = ::access(file.c_str(), W_OK) == 0 && ::access(folder.c_str(), W_OK) == 0;
  Database database = writable ? open(file, SQLITE_OPEN_READWRITE, uri_of(file, ""))
                      : fs::exists(file.string() + "-wal")
                          ? open(file, SQLITE_OPEN_READONLY, uri_of(file, ""))
                          : open(file, SQLITE_OPEN_READONLY, uri_of(file, "?immutable=1"));
  database.execute("PRAGMA query_only = 1; PRAGMA trusted_schema = 0; PRAGMA cell_size_check = 1");
  return database;
}

Database Database::open_for_writing(const fs::path& file) {
  require_file(file);
  return open(file, SQLITE_OPEN_READWRITE, uri_of(file, ""));
}

const std::string& Database::file() const {
  return connection_->file;
}
sqlite3* Database::handle() const {
  return connection_->handle;
}
Statement Database::prepare(std::string_view sql) {
  return Statement(*this, sql);
}

void Database::execute(const std::string& sql) {
  if (sqlite3_exec(handle(), sql.c_str(), nullptr, nullptr, nullptr) != SQLITE_OK)
    connection_->raise("cannot run SQL");
}

int64_t Database::query_integer(std::string_view sql) {
  Statement statement(*this, sql);
  return statement.step() ? statement.integer(0) : 0;
}

int Database::application_id() {
  return static_cast<int>(query_integer("PRAGMA application_id"));
}
int Database::user_version() {
  return static_cast<int>(query_integer("PRAGMA user_version"));
}

Statement::Statement(Database& database, std::string_view sql) : connection_(database.connection_) {
  if (sqlite3_prepare_v3(connection_->handle, sql.data(), static_cast<int>(sql.size()),
                         SQLITE_PREPARE_PERSISTENT, &statement_, nullptr) != SQLITE_OK)
    connection_->raise("cannot prepare SQL");
}
Statement::~Statement() {
  sqlite3_finalize(statement_);
}
Statement::Statement(Statement&& other) noexcept
    : connection_(std::move(other.connection_)), statement_(std::exchange(other.statement_, nullptr)) {}
Statement& Statement::operator=(Statement&& other) noexcept {
  std::swap(connection_, other.connection_);
  std::swap(statement_, other.statement_);
  return *this;
}

Statement& Statement::bind(int index, int64_t value) {
  if (sqlite3_bind_int64(statement_, index, value) != SQLITE_OK) connection_->raise("cannot bind");
  return *this;
}
Statement& Statement::bind(int index, double value) {
  if (sqlite3_bind_double(statement_, index, value) != SQLITE_OK) connection_->raise("cannot bind");
  return *this;
}
Statement& Statement::bind(int index, std::string_view value) {
  const char* data = value.data() ? value.data() : "";
  if (sqlite3_bind_text64(statement_, index, data, value.size(), SQLITE_STATIC, SQLITE_UTF8) != SQLITE_OK)
    connection_->raise("cannot bind");
  return *this;
}
Statement& Statement::bind(int index, std::span<const std::byte> value) {
  const void* data = value.empty() ? "" : static_cast<const void*>(value.data());
  if (sqlite3_bind_blob64(statement_, index, data, value.size(), SQLITE_STATIC) != SQLITE_OK)
    connection_->raise("cannot bind");
  return *this;
}
Statement& Statement::bind_null(int index) {
  if (sqlite3_bind_null(statement_, index) != SQLITE_OK) connection_->raise("cannot bind");
  return *this;
}

bool Statement::step() {
  switch (sqlite3_step(statement_)) {
    case SQLITE_ROW: return true;
    case SQLITE_DONE: return false;
    default: {
      // The message must be taken before reset clears the state, and the statement must not stay busy.
      try {
        connection_->raise(sqlite3_stmt_readonly(statement_) ? "cannot read" : "cannot write");
      } catch (...) {
        sqlite3_reset(statement_);
        throw;
      }
    }
  }
}
void Statement::reset() {
  sqlite3_reset(statement_);
}

int Statement::columns() const {
  return sqlite3_column_count(statement_);
}
std::string_view Statement::name(int column) const {
  const char* name = sqlite3_column_name(statement_, column);
  return name ? name : "";
}
bool Statement::is_null(int column) const {
  return type(column) == Type::null;
}
int64_t Statement::integer(int column) const {
  return sqlite3_column_int64(statement_, column);
}
double Statement::real(int column) const {
  return sqlite3_column_double(statement_, column);
}
std::string_view Statement::text(int column) const {
  const auto* data = reinterpret_cast<const char*>(sqlite3_column_text(statement_, column));
  return data ? std::string_view(data, static_cast<size_t>(sqlite3_column_bytes(statement_, column)))
              : std::string_view();
}
std::span<const std::byte> Statement::blob(int column) const {
  const auto* data = static_cast<const std::byte*>(sqlite3_column_blob(statement_, column));
  return {data, data ? static_cast<size_t>(sqlite3_column_bytes(statement_, column)) : 0};
}
Statement::Type Statement::type(int column) const {
  switch (sqlite3_column_type(statement_, column)) {
    case SQLITE_INTEGER: return Type::integer;
    case SQLITE_FLOAT: return Type::real;
    case SQLITE_TEXT: return Type::text;
    case SQLITE_BLOB: return Type::blob;
    default: return Type::null;
  }
}
bool Statement::read_only() const {
  return sqlite3_stmt_readonly(statement_) != 0;
}

Transaction::Transaction(Database& database) : database_(database) {
  database_.execute("BEGIN IMMEDIATE");
}
Transaction::~Transaction() {
  // After a failure SQLite may have rolled back by itself.
  if (open_ && sqlite3_get_autocommit(database_.handle()) == 0)
    sqlite3_exec(database_.handle(), "ROLLBACK", nullptr, nullptr, nullptr);
}
void Transaction::commit() {
  database_.execute("COMMIT");
  open_ = false;
}

void create_file(const fs::path& file, const FileKind& kind, bool force,
                 const std::function<void(Database&)>& fill) {
  std::error_code error;
  if (!force && fs::exists(file, error))
    fail("{}: exists; expected a new file, or --force to replace it", file.string());
  fs::path folder = fs::absolute(file).parent_path();
  if (!fs::is_directory(folder, error))
    fail("{}: cannot create: no folder {}", file.string(), folder.string());
  fs::path temporary = file;
  temporary += fmt::format(".new-{}", ::getpid());
  fs::remove(temporary, error);
  remove_side_files(temporary);
  // O_EXCL and our own open give a plainer message than SQLite's "unable to open database file".
  int descriptor = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0644);
  if (descriptor < 0) fail("{}: cannot create: {}", file.string(), std::generic_category().message(errno));
  ::close(descriptor);
  try {
    {
      Database database = Database::open_for_writing(temporary);
      database.execute("PRAGMA page_size = 16384; PRAGMA journal_mode = MEMORY; PRAGMA synchronous = FULL");
      Transaction transaction(database);
      for (const Migration& migration : kind.schema) database.execute(std::string(migration.sql));
      database.execute(fmt::format("PRAGMA application_id = {}; PRAGMA user_version = {}",
                                   kind.application_id, kind.version()));
      fill(database);
      transaction.commit();
    }
    sync_path(temporary, O_RDONLY);
    // A WAL that an earlier file of this name left behind must never be applied to the new one.
    remove_side_files(file);
    fs::rename(temporary, file);
    sync_path(folder, O_RDONLY | O_DIRECTORY);
  } catch (...) {
    fs::remove(temporary, error);
    remove_side_files(temporary);
    throw;
  }
}

namespace {

void check_kind(Database& database, const FileKind& kind) {
  const int id = database.application_id();
  if (id != kind.application_id)
    fail("{}: expected {} (application_id {:#x}), found application_id {:#x}", database.file(), kind.name,
         kind.application_id, id);
  const int version = database.user_version();
  if (version < 1 || version > kind.version())
    fail("{}: expected format version 1 to {}, found {}{}", database.file(), kind.version(), version,
         version > kind.version() ? ": made by a newer kvlapse" : "");
}

}  // namespace

Database open_file_for_reading(const fs::path& file, const FileKind& kind) {
  Database database = Database::open_for_reading(file);
  check_kind(database, kind);
  return database;
}

Database open_file_for_appending(const fs::path& file, const FileKind& kind) {
  Database database = Database::open_for_writing(file);
  check_kind(database, kind);
  if (const int version = database.user_version(); version < kind.version()) {
    Transaction transaction(database);
    for (const Migration& migration : kind.schema.subspan(static_cast<size_t>(version)))
      database.execute(std::string(migration.sql));
    database.execute(fmt::format("PRAGMA user_version = {}", kind.version()));
    transaction.commit();
  }
  database.execute(
      "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA wal_autocheckpoint = 1024");
  return database;
}

bool fold_wal(Database& database) {
  // With a reader present both need locks that they will not get; WAL mode then stays, which is as good a
  // file.
  sqlite3_busy_timeout(database.handle(), 200);
  sqlite3_wal_checkpoint_v2(database.handle(), nullptr, SQLITE_CHECKPOINT_TRUNCATE, nullptr, nullptr);
  Statement statement(database, "PRAGMA journal_mode = DELETE");
  bool folded = false;
  try {
    folded = statement.step() && statement.text(0) == "delete";
  } catch (const Error&) {
    folded = false;
  }
  sqlite3_busy_timeout(database.handle(), kBusyTimeout_ms);
  return folded;
}

struct ContentHash::State {
  XXH3_state_t* xxh = XXH3_createState();
  State() { XXH3_128bits_reset(xxh); }
  ~State() { XXH3_freeState(xxh); }
};

ContentHash::ContentHash() : state_(std::make_unique<State>()) {}
ContentHash::~ContentHash() = default;
ContentHash& ContentHash::add(std::span<const std::byte> bytes) {
  add(static_cast<int64_t>(bytes.size()));
  XXH3_128bits_update(state_->xxh, bytes.data(), bytes.size());
  return *this;
}
ContentHash& ContentHash::add(std::string_view text) {
  return add(std::as_bytes(std::span(text)));
}
ContentHash& ContentHash::add(int64_t value) {
  XXH3_128bits_update(state_->xxh, &value, sizeof value);
  return *this;
}
std::string ContentHash::hex() const {
  XXH128_hash_t hash = XXH3_128bits_digest(state_->xxh);
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace kvlapse
