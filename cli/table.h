// A plain text table: columns aligned, numbers to the right, two spaces between. For stdout.
#pragma once

#include <string>
#include <vector>

namespace kvlapse::cli {

class Table {
 public:
  explicit Table(std::vector<std::string> header);
  void add(std::vector<std::string> row);
  std::string text() const;

 private:
  std::vector<std::vector<std::string>> rows_;
};

}  // namespace kvlapse::cli
