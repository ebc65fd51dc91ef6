// Read-only SQL over a trace or a results file, with the chunked data of a trace as virtual tables
// (kv_eviction, kv_occupancy, kv_sketch, kv_token, kv_value: trace/FORMAT.md). One thread at a time.
#pragma once

#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace kvlapse {

// NULL, INTEGER, REAL, TEXT, BLOB.
using SqlValue = std::variant<std::monostate, int64_t, double, std::string, std::vector<std::byte>>;

class SqlQuery {
 public:
  // Any SQLite file. Throws Error for another file, UsageError for wrong SQL and for a statement that would
  // write.
  SqlQuery(const std::filesystem::path& file, std::string_view sql);
  ~SqlQuery();
  SqlQuery(const SqlQuery&) = delete;
  SqlQuery& operator=(const SqlQuery&) = delete;

  const std::vector<std::string>& columns() const;
  bool next(std::vector<SqlValue>& row);  // false: no more rows

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace kvlapse
