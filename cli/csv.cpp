#include "cli/csv.h"

#include <fmt/format.h>

namespace kvlapse::cli {

std::string csv_cell(const std::string& text) {
  if (text.find_first_of(",\"\n\r") == std::string::npos) return text;
  std::string quoted = "\"";
  for (char c : text) quoted += c == '"' ? std::string("\"\"") : std::string(1, c);
  return quoted + "\"";
}

void write_csv(SqlQuery& query, std::FILE* out) {
  struct Text {
    std::string operator()(std::monostate) const { return ""; }
    std::string operator()(int64_t v) const { return fmt::format("{}", v); }
    std::string operator()(double v) const { return fmt::format("{}", v); }
    std::string operator()(const std::string& v) const { return csv_cell(v); }
    std::string operator()(const std::vector<std::byte>& v) const {  // hexadecimal, as SQLite's hex()
      std::string hex;
      for (std::byte b : v) hex += fmt::format("{:02X}", static_cast<unsigned>(b));
      return hex;
    }
  };
  const std::vector<std::string>& columns = query.columns();
  std::string line;
  auto add = [&](size_t i, const std::string& cell) { line += (i > 0 ? "," : "") + cell; };
  auto end = [&] {
    line += "\r\n";
    std::fwrite(line.data(), 1, line.size(), out);
    line.clear();
  };
  for (size_t i = 0; i < columns.size(); ++i) add(i, csv_cell(columns[i]));
  end();
  for (std::vector<SqlValue> row; query.next(row); end())
    for (size_t i = 0; i < row.size(); ++i) add(i, std::visit(Text{}, row[i]));
}

}  // namespace kvlapse::cli
