// Rows of a query as RFC 4180 text, numbers in the shortest form that reads back equal. The caller
// looks at the stream for errors.
#pragma once

#include <cstdio>

#include "trace/sql.h"

namespace kvlapse::cli {

void write_csv(SqlQuery& query, std::FILE* out);
std::string csv_cell(const std::string& text);

}  // namespace kvlapse::cli
