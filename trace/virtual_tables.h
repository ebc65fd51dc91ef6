// The chunked data of a trace as read-only SQL tables of one connection: kv_token, kv_eviction, kv_occupancy,
// kv_sketch, kv_value (columns: trace/FORMAT.md). Conditions on sequence, layer and step are pushed down to
// whole chunks, so a query decodes only what it names.
#pragma once

#include <functional>
#include <memory>

#include "trace/sqlite.h"
#include "trace/trace_reader.h"

namespace kvlapse {

// `reader` is asked for when the first of these tables is used, and lives as long as the connection.
void register_trace_tables(Database& database, std::function<std::unique_ptr<TraceReader>()> reader);

}  // namespace kvlapse
