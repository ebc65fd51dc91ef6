// Text of each recorded position, "" where the file does not tell.
#pragma once

#include <string>
#include <vector>

#include "trace/trace_reader.h"

namespace kvlapse {

std::vector<std::string> read_token_texts(const TraceReader& reader, int sequence);

}  // namespace kvlapse
