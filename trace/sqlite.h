// A small RAII layer over SQLite and the life of the files that kvlapse writes with it (traces, results):
// made under a temporary name, renamed when schema and header are committed, written in WAL, left as one
// file. The only other user of sqlite3.h is trace/*.cpp. A connection and its statements belong to one thread
// at a time. Every failure is an Error that names the file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

struct sqlite3;
struct sqlite3_stmt;

namespace kvlapse {

// One numbered step of a schema; entry i brings a file from user_version i to i + 1. Never edited after
// landing. Made from <layer>/schema/000N_*.sql by kvlapse_embed_schema of cmake/embed_schema.cmake.
struct Migration {
  std::string_view name;
  std::string_view sql;
};

// What tells one of our file formats from another.
struct FileKind {
  std::string_view name;       // in messages: "a kvlapse trace"
  int32_t application_id = 0;  // PRAGMA application_id
  std::span<const Migration> schema;
  int version() const { return static_cast<int>(schema.size()); }  // PRAGMA user_version
};

// What sqlite reported, beside the message.
class SqliteError;

class Statement;

class Database {
 public:
  // The file must exist. Never writes to it, SQLite's own WAL recovery aside; also opens files on read-only
  // media.
  static Database open_for_reading(const std::filesystem::path& file);
  // The file must exist.
  static Database open_for_writing(const std::filesystem::path& file);

  const std::string& file() const;
  Statement prepare(std::string_view sql);
  void execute(const std::string& sql);         // any number of statements, results dropped
  int64_t query_integer(std::string_view sql);  // first column of the first row, 0 without a row
  int application_id();
  int user_version();
  sqlite3* handle() const;

 private:
  friend class Statement;
  struct Connection;
  explicit Database(std::shared_ptr<Connection> connection) : connection_(std::move(connection)) {}
  static Database open(const std::filesystem::path& file, int flags, const std::string& uri);
  std::shared_ptr<Connection> connection_;  // statements keep it open
};

class Statement {
 public:
  Statement(Database& database, std::string_view sql);
  ~Statement();
  Statement(Statement&& other) noexcept;
  Statement& operator=(Statement&& other) noexcept;

  // Parameters count from 1. Text and blobs must outlive the step.
  Statement& bind(int index, int64_t value);
  Statement& bind(int index, int value) { return bind(index, static_cast<int64_t>(value)); }
  Statement& bind(int index, double value);
  Statement& bind(int index, std::string_view value);
  Statement& bind(int index, std::span<const std::byte> value);
  Statement& bind_null(int index);

  bool step();   // true: a row stands ready; false: done
  void reset();  // ready for the next execution; bindings stay

  // Binds all, runs to the end, resets.
  template <typename... Args>
  void run(const Args&... args) {
    int index = 0;
    (bind(++index, args), ...);
    while (step()) {
    }
    reset();
  }

  // Columns count from 0. Spans and views stay valid until the next step or reset.
  int columns() const;
  std::string_view name(int column) const;
  bool is_null(int column) const;
  int64_t integer(int column) const;
  double real(int column) const;
  std::string_view text(int column) const;
  std::span<const std::byte> blob(int column) const;
  enum class Type : uint8_t { null, integer, real, text, blob };
  Type type(int column) const;
  bool read_only() const;  // the statement cannot change a file
  sqlite3_stmt* handle() const { return statement_; }

 private:
  std::shared_ptr<Database::Connection> connection_;
  sqlite3_stmt* statement_ = nullptr;
};

// Rolls back unless committed.
class Transaction {
 public:
  explicit Transaction(Database& database);
  ~Transaction();
  Transaction(const Transaction&) = delete;
  Transaction& operator=(const Transaction&) = delete;
  void commit();

 private:
  Database& database_;
  bool open_ = true;
};

// Makes `file` with kind's schema and what `fill` writes, in one transaction, under a temporary name in the
// same folder, then renames it: a file of that name is always whole. Refuses an existing file unless `force`.
// Equal calls of `fill` give equal bytes.
void create_file(const std::filesystem::path& file, const FileKind& kind, bool force,
                 const std::function<void(Database&)>& fill);
// Opens a file of this kind and checks that it is one: SQLite, application id, a version that we know.
Database open_file_for_reading(const std::filesystem::path& file, const FileKind& kind);
// The same, to append in WAL (synchronous=NORMAL: a crash of the machine can lose the last commits, never the
// file). A file of an older version is brought up to date.
Database open_file_for_appending(const std::filesystem::path& file, const FileKind& kind);
// Folds the WAL into the file and leaves no side files. Returns false when a reader still holds the file: the
// last connection that closes removes them.
bool fold_wal(Database& database);

// Hash over an ordered list of facts (XXH3, 128 bits), as traces and results use it for identity.
class ContentHash {
 public:
  ContentHash();
  ~ContentHash();
  ContentHash(const ContentHash&) = delete;
  ContentHash& operator=(const ContentHash&) = delete;
  ContentHash& add(std::string_view text);  // with its length, so that fields cannot run together
  ContentHash& add(int64_t value);
  ContentHash& add(std::span<const std::byte> bytes);
  std::string hex() const;  // 32 digits

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace kvlapse
